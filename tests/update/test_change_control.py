"""The change-control plan: each rule of its file, each bound, and who decides what waits."""

import json
import tomllib
from dataclasses import replace
from typing import get_type_hints

import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.settings import settings
from lm.core.study import load_study, study_names
from lm.model.predict import FAMILIES
from lm.update.change_control import (
    DEFAULT_PLAN,
    UPDATE_ACTIONS,
    Approval,
    Modifications,
    Protocol,
    beyond_plan,
    check_approver,
    parse_plan,
    plan_text,
    read_plan,
)

PLAN = parse_plan("")
DAY = pd.Timestamp("1990-06-28")
NONE = pd.DataFrame({"as_of": pd.to_datetime([]), "action": []})
QUIET = {
    **{"action": "recalibrate", "family": "logistic", "shift": (0.2, 1.1), "flips": 0.1},
    **{"as_of": DAY, "updates": NONE, "outcomes": 500, "events": 80},
}


def log(*rows):
    """A table of updates from (days before DAY, action)."""
    when = [DAY - pd.Timedelta(days=days) for days, _ in rows]
    return pd.DataFrame({"as_of": when, "action": [action for _, action in rows]})


def test_what_is_within_the_plan_needs_no_approval():
    assert beyond_plan(PLAN, **QUIET) == []
    assert beyond_plan(PLAN, **QUIET | {"shift": None, "flips": float("nan")}) == []
    assert beyond_plan(PLAN, **QUIET | {"updates": None, "outcomes": None, "events": None}) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"action": "reselect"}, "reselect is not automatic"),
        ({"family": "forest"}, "kind forest is not among logistic, splines"),
        ({"shift": (-1.01, 1.0)}, "intercept -1.01 is outside -1 to 1"),
        ({"shift": (1.01, 1.0)}, "intercept 1.01 is outside"),
        ({"shift": (0.0, 0.49)}, "slope 0.49 is outside 0.5 to 1.5"),
        ({"shift": (0.0, 1.51)}, "slope 1.51 is outside"),
        ({"flips": 0.251}, "25.1 % of the patients, the plan allows 25 %"),
        ({"outcomes": 99}, "99 recent outcomes, the plan asks for 100"),
        ({"events": 19}, "19 of the rarer outcome, the plan asks for 20"),
        (
            {"updates": log((89, "refit"))},
            "last change (refit) was 89 days ago, the plan asks for 90",
        ),
        ({"updates": log((5, "rollback"))}, "last change (rollback) was 5 days ago"),
        ({"updates": log((3, "first"))}, "last change (first) was 3 days ago"),
        ({"updates": log((4, "promote"))}, "last change (promote) was 4 days ago"),
        (
            {"updates": log((364, "refit"), (300, "refit"), (200, "recalibrate"), (100, "refit"))},
            "4 updates in the last 365 days, the plan allows 4",
        ),
    ],
)
def test_each_bound_of_the_plan_is_enforced_with_one_sentence(change, text):
    result = beyond_plan(PLAN, **QUIET | change)
    assert len(result) == 1 and text in result[0] and PLAN.where in result[0]


@pytest.mark.parametrize(
    "change",
    [
        {"shift": (-1.0, 0.5)},
        {"shift": (1.0, 1.5)},
        {"flips": 0.25},
        {"outcomes": 100, "events": 20},
        {"updates": log((90, "refit"))},
        {"updates": log((3, "keep"), (2, "wait"), (1, "reject"))},
        {"updates": log((90, "first"), (90, "promote"))},
        {"updates": log((-3, "refit"))},
        {"updates": log((365, "refit"), (300, "refit"), (200, "recalibrate"), (100, "refit"))},
        {"action": "first", "shift": None, "updates": log((3, "refit"))},
    ],
)
def test_the_bounds_themselves_are_allowed_and_what_changed_nothing_does_not_count(change):
    assert beyond_plan(PLAN, **QUIET | change) == []


def test_everything_at_once_is_stated_at_once():
    bad = {"action": "reselect", "family": "forest", "shift": (3, 0.1), "flips": 0.9}
    result = beyond_plan(
        PLAN, **QUIET | bad | {"outcomes": 3, "events": 1, "updates": log((1, "refit"))}
    )
    assert len(result) == 8


def test_an_unknown_action_is_refused():
    with pytest.raises(LMError, match="'retrain' is unknown: choose one of first, recalibrate in"):
        beyond_plan(PLAN, **QUIET | {"action": "retrain"})


WRONG = {
    "words": (["unknown"], "logistic", [1], [""], ["first", "first"]),
    "pair": ([1], [2.0, 1.5], ["a", "b"], 1.0, [-99, 99], [float("nan"), 2.0]),
    "number": (-0.1, 1e9, "0.1", True, float("nan"), float("inf")),
    "whole": (-1, 1.5, "9", True, 10**9),
}


KINDS = {list[str]: "words", list[float]: "pair", float: "number", int: "whole"}
RULES = {
    key: (table.__name__.lower(), KINDS[kind])
    for table in (Modifications, Protocol, Approval)
    for key, kind in get_type_hints(table).items()
    if key != "only"
}


@pytest.mark.parametrize("key", RULES)
def test_each_key_refuses_what_it_cannot_be(key):
    table, kind = RULES[key]
    for value in WRONG[kind]:
        if key == "approvers" and value in (["unknown"], ["first", "first"]):
            continue
        inputs = json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")
        with pytest.raises(LMError) as caught:
            parse_plan(f"[{table}]\n{key} = {inputs}", "mine/plan.toml")
        assert str(caught.value).startswith("mine/plan.toml: ") and key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("margin = 0.1", "margin must stand below [protocol]"),
        ("[gate]", "gate is unknown: choose from modifications, protocol, approval"),
        ("[protocol]\nmargins = 0.1", "protocol: margins is unknown: did you mean margin?"),
        ("[modifications]\nmargin = 0.1", "modifications.margin must stand below [protocol]"),
        ("[approval]\nonly = ['x']", "keys of approval.only must be among"),
        ("[approval.only]\nretrain = ['x']", "keys of approval.only must be among"),
        ("[approval.only]\nrefit = 'x'", "refit = 'x' must be a list of at least one name"),
        ("[approval.only]\nrefit = []", "refit = [] must be a list of at least one name"),
        ("[approval]\napprovers = []", "no person may approve 'first'"),
        ("[protocol]\nmin_events = 51", "do not fit into min_outcomes = 100"),
        ("[protocol", "cannot be read"),
    ],
)
def test_a_broken_file_is_reported_in_one_sentence(text, message):
    with pytest.raises(LMError) as caught:
        parse_plan(text, "mine/plan.toml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_general_approver_is_needed_where_every_action_has_one():
    each = "\n".join(f"{json.dumps(action)} = ['x']" for action in UPDATE_ACTIONS)
    plan = parse_plan(f"[approval]\napprovers = []\n[approval.only]\n{each}")
    assert check_approver(plan, "refit", "X") == "x"


def test_approvers_are_named_per_action():
    plan = parse_plan('[approval]\napprovers = ["A B"]\n[approval.only]\nreselect = ["C"]')
    assert check_approver(plan, "refit", " a  b ") == "A B"
    assert check_approver(plan, "reselect", "c") == "C"
    for action, name in (("refit", "C"), ("reselect", "A B"), ("refit", ""), ("refit", "A")):
        with pytest.raises(LMError, match="may not decide about"):
            check_approver(plan, action, name)


def test_a_part_of_a_plan_keeps_the_defaults_for_the_rest():
    plan = parse_plan("[protocol]\nmargin = 0.01")
    assert plan == replace(PLAN, margin=0.01) and plan.needs_approval == ("reselect",)
    assert json.loads(json.dumps(plan.to_dict()))["oe"] == [0.8, 1.25]


def test_the_default_names_every_key_and_explains_it():
    inputs = tomllib.loads(DEFAULT_PLAN)
    assert {k for t in inputs.values() for k in t} - {"only"} == set(RULES)
    lines = DEFAULT_PLAN.splitlines()
    for key in RULES:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key} = "))
        above = next(line for line in reversed(lines[:at]) if " = " not in line)
        assert above.startswith("#")
    assert all(word in DEFAULT_PLAN for word in (*UPDATE_ACTIONS, *FAMILIES))


def test_the_studies_have_plans_and_follow_what_they_extend():
    for name in study_names():
        assert read_plan(load_study(name)).approvers
    five, two = load_study("rotterdam_5y"), load_study("rotterdam")
    assert read_plan(five) == read_plan(two) and read_plan(five).where == "rotterdam/plan.toml"
    assert plan_text(five) == (settings().data / "rotterdam" / "plan.toml").read_text()
    assert read_plan(load_study("gbsg")).automatic == ("first",)


def test_a_study_without_a_plan_has_the_default_and_its_own_comes_first(tmp_path):
    monica = replace(load_study("monica"), folder=tmp_path / "mine")
    assert read_plan(monica).where == "the default plan" and plan_text(monica) == DEFAULT_PLAN
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.toml").write_text('extends = "../other"')
    assert plan_text(monica) == DEFAULT_PLAN
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.toml").write_text("[protocol]\nmargin = 0.004")
    assert read_plan(monica).margin == 0.004 and read_plan(monica).where == "other/plan.toml"
    (tmp_path / "mine" / "plan.toml").write_text("[protocol]\nmargin = 0.003")
    assert read_plan(monica).margin == 0.003
    (tmp_path / "mine" / "plan.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(LMError, match=r"mine/plan\.toml cannot be read"):
        read_plan(monica)

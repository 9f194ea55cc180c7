"""Beside a patient: the nearest earlier ones, why a risk has changed, the facts. No look-ahead."""

import numpy as np
import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import typed_features
from lm.data.records import UnknownRecord
from lm.machine.machine import Machine
from lm.machine.patient import NO_CHANGE
from lm.model.neighbours import MOST, gower, nearest, similar
from lm.model.predict import fit
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client

STUDIES = ("monica", "rotterdam")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A machine with two versions; 200 patients answered by the first, 100 by the second."""
    study = load_study("monica")
    rows = read_rows(study)
    first, later = (rows[(rows["arrived"] >= study.first_model) ^ early] for early in (True, False))
    model = fit(study, first)
    with Machine(study, tmp_path_factory.mktemp("similar")) as machine:
        for part in (model, model.recalibrated(-0.2)):
            machine.registry.register(part, {}, {}, {}, "for the test")
        send(machine, first)
        begin = {"as_of": study.first_model, "action": "first", "reason": "first model"}
        machine.adopt(begin | {"from_version": None, "to_version": 1})
        send(machine, later[:200])
        machine.promote(2, "for the test", machine.plan.approvers[0])
        send(machine, later[200:300])
        yield machine, rows


def send(machine, rows):
    """Patients as they arrived, and the outcomes that were known when the last one came."""
    names = ["record_id", "arrived", *machine.study.feature_names]
    machine.receive_many(rows[names], on_arrival=True)
    machine.add_outcomes(rows[rows["known_at"] <= rows["arrived"].max()])


# ---------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("seed", range(5))
def test_gower_is_a_distance_between_0_and_1_and_agrees_with_the_plain_sum(name, seed):
    study, rng = load_study(name), np.random.default_rng(seed)
    rows = read_rows(study).sample(30, random_state=seed)[study.feature_names]
    rows = rows.mask(rng.random(rows.shape) < 0.2)
    frame = typed_features(study, rows)
    one = frame.iloc[0].to_dict()
    result = gower(study, one, frame)
    assert result["distance"].iloc[0] == 0 and result["distance"].between(0, 1).all()
    for i in (3, 17):
        assert np.isclose(result["distance"].iloc[i], by_hand(study, frame, frame.iloc[0], i))


def by_hand(study, frame, one, i):
    """Gower's distance feature by feature."""
    parts = []
    for feature in study.features:
        a, b = one[feature.name], frame.iloc[i][feature.name]
        if pd.isna(a) or pd.isna(b):
            continue
        if feature.kind == "level":
            parts.append(float(a != b))
            continue
        see = np.log1p if feature.transform == "log1p" else float
        seen = (
            see(frame[feature.name].dropna()) if see is np.log1p else frame[feature.name].dropna()
        )
        parts.append(abs(see(a) - see(b)) / (seen.max() - seen.min()))
    return np.mean(parts)


def test_the_order_of_the_earlier_patients_does_not_matter():
    study = load_study("monica")
    rows = read_rows(study)
    rows = rows[rows["y"].notna()][:500]
    asked = rows.iloc[100][study.feature_names].to_dict()
    results = [nearest(study, asked, rows.sample(frac=1, random_state=s), 30)[0] for s in range(3)]
    assert all(t["record_id"].tolist() == results[0]["record_id"].tolist() for t in results)
    ties = results[0].groupby("gower_distance")["arrived"]
    assert all(times.is_monotonic_decreasing for _, times in ties)  # The latest come first


@pytest.mark.parametrize("k", [0, -1, MOST + 1])
def test_a_k_that_cannot_be_is_refused(k):
    with pytest.raises(LMError, match="must be between 1 and 200"):
        similar(load_study("monica"), {}, pd.DataFrame({"y": [1.0]}), k)


# ------------------------------------------------------------------------------------ the machine


def test_none_who_came_later_and_no_outcome_learned_later_has_a_say(served):
    machine, rows = served
    name = machine.table("predictions", last=150)["record_id"].iloc[0]
    mine = rows.set_index("record_id").loc[name]
    result = machine.similar(name, 200)
    known = rows.set_index("record_id")
    assert result["patients"] == 200 and name not in [row["record_id"] for row in result["nearest"]]
    for row in result["nearest"]:
        other = known.loc[row["record_id"]]
        assert other["arrived"] < mine["arrived"]
        assert (
            other["arrived"] + machine.study.horizon <= mine["arrived"] and row["y"] == other["y"]
        )
    could = (rows["arrived"] + machine.study.horizon <= mine["arrived"]) & rows["y"].notna()
    could &= rows["known_at"] <= mine["arrived"]
    could &= rows["record_id"].isin(machine.table("outcomes")["record_id"])
    assert result["considered"] == could.sum()
    events = sum(row["y"] for row in result["nearest"])
    assert (
        result["events"] == events
        and result["low"] < events / 200 == result["share"] < result["high"]
    )


def test_the_first_patient_of_all_has_no_neighbour(served):
    machine, _ = served
    result = machine.similar(machine.table("records")["record_id"].iloc[0])
    assert result["patients"] == result["considered"] == 0 and result["share"] is None
    assert result["nearest"] == [] and result["sentence"].startswith("No earlier patient")


def test_a_change_of_model_and_a_change_of_data_add_up(served):
    machine, _ = served
    names = machine.table("predictions")["record_id"]
    first, last = names.iloc[0], names.iloc[-1]
    model = machine.explain_change(last)
    assert (model["from_version"], model["to_version"]) == (1, 2) and model["changed"] == []
    assert model["data_risk"] == 0 and np.isclose(model["log_odds"], -0.2)
    both = machine.explain_change(last, since=first)
    risks = [machine.explain(name)["risk"] for name in (first, last)]
    assert np.allclose([both["risk_before"], both["risk_after"]], risks)
    assert np.isclose(both["data_risk"] + both["model_risk"], risks[1] - risks[0])
    whole = sum(both["data"].values()) + sum(both["model"].values())
    assert np.isclose(whole, both["log_odds"]) and both["changed"]
    now = machine.explain_change(first, version=2)
    asked = machine.score([machine.explain(first)["features"]], version=2)["risk"].item()
    assert np.isclose(now["risk_after"], asked) and now["from_version"] == 1
    assert "by version 1, which answered" in now["sentence"]


def test_what_cannot_be_compared_is_a_sentence(served):
    machine, _ = served
    names = machine.table("predictions")["record_id"]
    before = machine.table("records")["record_id"].iloc[0]  # No model served then
    results = [
        machine.explain_change(names.iloc[0]),
        machine.explain_change(before),
        machine.explain_change(names.iloc[-1], since=before),
        machine.explain_change(names.iloc[0], since=names.iloc[-1]),
    ]
    for result, text in zip(
        results, ("first model", "no model", "no earlier", "no earlier"), strict=True
    ):
        assert text in result["sentence"].lower()
        assert {key: result[key] for key in NO_CHANGE} == NO_CHANGE
    with pytest.raises(LMError, match="give one of them"):
        machine.explain_change(names.iloc[-1], since=before, version=1)


def test_rolled_back_the_version_before_is_the_one_that_served_before(served, tmp_path):
    machine, rows = served
    machine.rollback(1, "for the test")
    send(machine, rows[rows["arrived"] >= machine.study.first_model].iloc[300:310])
    last = machine.table("predictions", last=1)["record_id"].item()
    result = machine.explain_change(last)
    assert (result["from_version"], result["to_version"]) == (2, 1)
    machine.promote(2, "for the test", machine.plan.approvers[0])
    assert machine.explain_change(last)["from_version"] == 2  # What came after does not count


def test_the_facts_are_those_of_the_version(served):
    machine, _ = served
    for version in (1, 2):
        assert machine.facts(version)["version"] == version
    with pytest.raises(LMError, match=r"version 9 .* unknown"):
        machine.facts(9)


# ------------------------------------------------------------------------------------ the service


def test_the_client_says_what_the_machine_says_and_only_to_those_who_care(served):
    machine, _ = served
    name = machine.table("predictions", last=1)["record_id"].item()
    tokens = Tokens(machine.store.folder)
    with background(machine) as url:
        made = {
            role: tokens.create(f"one {role}", role) for role in ("clinician", "viewer", "machine")
        }
        with Client(url, token=made["clinician"]) as client:
            assert client.similar(name, k=7) == machine.similar(name, 7)
            assert client.explain_change(name) == machine.explain_change(name)
            assert client.explain_change(name, version=1) == machine.explain_change(name, version=1)
            assert client.facts(2) == machine.facts(2)
            for ask in (client.similar, client.explain_change):
                with pytest.raises(UnknownRecord):
                    ask("no/body")
            with pytest.raises(LMError, match="must be between"):
                client.similar(name, k=0)
        for role in ("viewer", "machine"):
            with Client(url, token=made[role]) as client:
                for ask in (client.similar, client.explain_change):
                    with pytest.raises(LMError, match="may not"):
                        ask(name)
                with pytest.raises(LMError, match="may not"):
                    client.facts(1)

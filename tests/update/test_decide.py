"""Decisions: each rung can come out, each keep has its reason, and the future does not matter."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from lm.core.labels import label_outcomes
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.schema import as_json
from lm.model.predict import fit
from lm.model.selection import search
from lm.monitor.verdict import last_answered_change
from lm.offline.prequential import known_as_of
from lm.update.change_control import read_plan
from lm.update.decide import Case, Recipe, decide_update, follow_up_test, make_model
from lm.update.ladder import RUNGS, trainable

MONICA, FIVE = load_study("monica"), load_study("rotterdam_5y")
NO_ONE = ["version", "risk", "low", "high", "log_odds", "unlike"]
LATER = pd.Timestamp("1993-06-01")


def world(study, change=None, seed=1):
    """First model, rows and what it served; `change` gives new outcomes from log-odds."""
    rows = read_rows(study)
    served = pd.DataFrame(np.nan, rows.index, NO_ONE)
    first = fit(study, trainable(known_as_of(study, rows, served, study.first_model)))
    after = rows["arrived"] > study.first_model
    z = first.log_odds(rows)
    served.loc[after, ["risk", "log_odds"]] = np.column_stack([expit(z), z])[after]
    served.loc[after, "version"] = 1
    if change is not None:
        rows = change(study, rows, z, after, np.random.default_rng(seed))
    return first, rows, served


def drawn(function):
    """Outcomes within the horizon of monica whose log-odds are a function of the model's."""

    def change(study, rows, z, after, rng):
        y = rng.random(len(rows)) < expit(function(z, rows))
        rows, event = rows.copy(), rows["arrived"] + pd.Timedelta(days=2)
        end = rows["arrived"] + study.horizon
        rows.loc[after, "event"] = event.where(y)[after]
        rows.loc[after, "followed_until"] = event.where(y, end)[after]
        return label_outcomes(study, rows.drop(columns=["y", "known_at"], errors="ignore"))

    return change


def hazard(factor):
    """Events at a multiple of the predicted hazard."""

    def change(study, rows, z, after, rng):
        days = rng.exponential(study.horizon_days / (factor * np.logaddexp(0, z))).clip(0, 20_000)
        event = rows["arrived"] + pd.to_timedelta(days, unit="D").floor("s").as_unit("us")
        soon, end = days <= study.horizon_days, rows["arrived"] + study.horizon
        rows = rows.copy()
        rows.loc[after, "event"] = event.where(soon)[after]
        rows.loc[after, "followed_until"] = event.where(soon, end)[after]
        return label_outcomes(study, rows.drop(columns=["y", "known_at"], errors="ignore"))

    return change


def verdict(*charts, **evidence):
    alarms = [{"chart": chart} for chart in charts]
    return {"action": "recalibrate", "reason": "x", "evidence": {"alarms": alarms} | evidence}


def case_of(study, change=None, as_of=LATER, **more):
    first, rows, served = world(study, change)
    return Case(
        study, known_as_of(study, rows, served, as_of), as_of, first, study.first_model, **more
    )


RUNG = {
    "keep": lambda z, rows: z,
    "recalibrate in the large": lambda z, rows: z - 0.9,
    "recalibrate": lambda z, rows: 0.3 * z - 1.0,
    "refit": lambda z, rows: z + 2.2 * ((rows["sex"] == "f").to_numpy() - 0.5),
}


@pytest.mark.parametrize("rung", RUNG)
def test_each_rung_comes_out_where_it_is_true(rung):
    case = case_of(MONICA, drawn(RUNG[rung]))
    result = decide_update(case, verdict("calibration up"))
    assert result.evidence["tests"][0]["rung"] == rung, result.evidence["tests"]
    assert result.reason and "nan" not in result.reason
    json.loads(as_json(result.evidence))
    if result.model is not None:
        assert result.action == rung
        recipe = Recipe(**json.loads(as_json(result.evidence["recipe"])))
        assert make_model(case, recipe).fingerprint() == result.model.fingerprint()
    again = decide_update(replace(case), verdict("calibration up"))
    assert (again.action, again.reason, again.beyond_plan) == (
        result.action,
        result.reason,
        result.beyond_plan,
    )


@pytest.mark.parametrize(("factor", "sign"), [(0.5, -1), (2.0, 1)])
def test_follow_up_alone_moves_the_risks_the_right_way(factor, sign):
    case = case_of(FIVE, hazard(factor))
    result = decide_update(case, verdict("early up" if sign > 0 else "early down"))
    assert result.action == RUNGS[0] and result.evidence["recipe"]["on"] == "follow-up"
    shift = result.model.recalibration_[0]
    assert sign * shift > 0.3 and abs(shift) < 1.3


def test_follow_up_as_foretold_moves_nothing():
    result = decide_update(case_of(FIVE, hazard(1.0)), verdict("early up"))
    assert result.action == "keep" and "it may be 1" in result.reason and "nan" not in result.reason


def test_families_to_select_from_do_not_deafen_the_follow_up():
    case = case_of(FIVE, hazard(0.5), families=("logistic", "splines"))
    assert decide_update(case, verdict("early down")).action == RUNGS[0]


def test_what_happens_later_changes_nothing():
    first, rows, served = world(MONICA, drawn(RUNG["recalibrate in the large"]))
    as_of = pd.Timestamp("1990-01-01")
    future = (rows["known_at"] > as_of) & (rows["arrived"] <= as_of)
    other = rows.assign(y=rows["y"].mask(future, 1 - rows["y"]))
    other = other[other["arrived"] <= as_of]
    known = [known_as_of(MONICA, r, served.loc[r.index], as_of) for r in (rows, other)]
    results = [
        decide_update(Case(MONICA, k, as_of, first, MONICA.first_model), verdict("calibration up"))
        for k in known
    ]
    assert results[0].action == results[1].action and results[0].reason == results[1].reason
    models = [f.model and f.model.fingerprint() for f in results]
    assert models[0] == models[1]


def test_every_keep_has_a_reason():
    case = case_of(MONICA)
    empty = replace(case, known=case.known[:0])
    quiet = {"action": "nothing", "reason": "all is well"}
    strict = replace(case, plan=replace(read_plan(MONICA), min_outcomes=10**6, min_events=1))
    for inputs, result in (
        *((case, quiet), (case, quiet | {"action": "look at the data"})),
        *((empty, verdict("calibration up")), (strict, verdict("calibration up"))),
        *((empty, quiet | {"action": "retrain", "evidence": None}), (empty, verdict("early up"))),
        (empty, verdict(growth={"promise": 0.01})),
    ):
        results = decide_update(inputs, result)
        assert results.action == "keep" and results.model is None
        assert len(results.reason) > 20 and "nan" not in results.reason.lower(), results.reason


def test_growth_asks_for_a_refit_without_a_shift():
    case = case_of(MONICA, as_of=pd.Timestamp("1992-01-01"))
    result = decide_update(case, verdict(growth={"promise": 0.01}))
    (gate,) = result.evidence["gates"]
    assert gate["on"] == "growth" and gate["rung"] == "refit" and result.action in ("keep", "refit")
    if result.model is not None:
        assert result.model.recalibration_ == (0.0, 1.0)


def test_growth_after_a_change_keeps_to_it():
    case = case_of(MONICA, drawn(RUNG["recalibrate in the large"]))
    began = "1989-01-01"
    corrected = replace(case, champion=case.champion.recalibrated(-0.9))
    plain, stored = (
        make_model(corrected, Recipe("refit", "growth", began=day)) for day in (None, began)
    )
    since = case.known[case.known["arrived"] >= began]
    means = [m.predict_proba(since)[:, 1].mean() for m in (corrected.champion, stored, plain)]
    assert np.isclose(means[0], means[1], rtol=1e-6) and means[2] > 1.1 * means[0]
    updates = pd.DataFrame(
        {"to_version": [2, np.nan], "evidence": [{"recipe": {"began": began}}, {}]}
    )
    assert last_answered_change(updates) == last_answered_change(
        updates.assign(evidence=updates.evidence.map(json.dumps))
    )
    assert last_answered_change(updates) == began and last_answered_change(updates[1:]) is None
    table = updates.assign(as_of=LATER, action=["recalibrate", "keep"])
    result = decide_update(replace(corrected, updates=table), verdict(growth={"promise": 0.01}))
    (gate,) = result.evidence["gates"]
    assert gate["on"] == "growth"
    if result.model is not None:
        assert result.evidence["recipe"]["began"] == began


def test_a_change_is_settled_from_all_since():
    case = case_of(MONICA, drawn(RUNG["recalibrate in the large"]))
    due = {"began": "1988-06-01", "due": True}
    result = decide_update(case, verdict(**{"settling": due}))
    assert result.action == RUNGS[0] and result.evidence["recipe"]["on"] == "change"
    assert -1.3 < result.model.recalibration_[0] < -0.5
    since = case.history[case.history["arrived"] >= "1988-06-01"]
    assert abs(result.model.predict_proba(since)[:, 1].sum() - since["y"].sum()) < 2
    assert (
        make_model(case, Recipe(**result.evidence["recipe"])).fingerprint()
        == result.model.fingerprint()
    )


def test_follow_up_must_foretell_better_than_the_champion():
    better = follow_up_test(case_of(FIVE, hazard(0.4)))
    right = follow_up_test(case_of(FIVE, hazard(1.0)))
    assert better.passed and not right.passed
    assert better.checks[0].value <= 0.01 < right.checks[0].value <= 1


@pytest.mark.slow
def test_a_reselection_carries_the_table_of_its_search(monkeypatch):
    monkeypatch.setattr(
        "lm.update.decide.search", partial(search, n=2)
    )  # 12 take six times as long
    case = case_of(MONICA, drawn(RUNG["refit"]), families=("logistic", "splines"))
    result = decide_update(case, verdict("calibration up"))
    assert result.model is not None and set(result.search) == {"params", "history", "files"}
    assert result.search["params"]["search_families"] == "logistic,splines"
    assert {"folds.csv", "candidates.csv"} <= set(result.search["files"])
    assert decide_update(replace(case, families=()), verdict("calibration up")).search == {}

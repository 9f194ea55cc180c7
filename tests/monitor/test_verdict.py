"""Alarm dates against a plain loop, the verdicts one by one, and what a monitor must survive."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from lm.core.errors import LMError
from lm.core.evidence import VERDICT_ACTIONS
from lm.core.labels import label_outcomes
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import typed_features
from lm.data.store import Store
from lm.data.synthetic import shuffled
from lm.model.metrics import oe
from lm.model.predict import fit, predict
from lm.monitor.impact import predicted_risks
from lm.monitor.verdict import (
    before_and_since,
    calibrate_limits,
    estimates_and_outcomes,
    evidently_report,
    judged_patients,
    limits_from_json,
    limits_to_json,
    reach_verdict,
    reference_and_current,
    repeated_shift_gain,
    suspected_faults,
)
from lm.offline.prequential import SERVED_COLUMNS, known_as_of
from lm.update.decide import Case, decide_update
from lm.update.ladder import trainable

SINCE = pd.Timestamp("1987-01-01")
DAY = pd.Timestamp("1988-06-01")


@pytest.fixture(scope="module")
def study():
    return load_study("monica")


@pytest.fixture(scope="module")
def rows(study):
    return read_rows(study)


@pytest.fixture(scope="module")
def model(study, rows):
    return first_model(study, rows)


def first_model(study, rows):
    """Of those whose outcome was known when it began to serve."""
    return fit(study, rows[rows.arrived + study.horizon <= SINCE])


def frozen(study, rows, model):
    """All rows with the risks of a first model that is never updated."""
    served = predict(model, typed_features(study, rows))[["risk", "unlike"]]
    return rows.assign(**served.where(rows.arrived > SINCE)).drop(columns="known_at")


def heard(study, served, day):
    """What is known at `day`."""
    known = served[served.arrived <= day]
    matured = known.arrived + study.horizon <= day
    return known.assign(matured=matured, y=known.y.where(matured))


@pytest.fixture(scope="module")
def served(study, rows, model):
    return frozen(study, rows, model)


@pytest.fixture(scope="module")
def quarters(rows):
    return pd.date_range(SINCE + pd.Timedelta(days=91), rows.arrived.max(), freq="91D")


def since(model):
    """What a monitoring run needs to know of the champion."""
    return {"since": SINCE, "version": 1, "model": model}


@pytest.fixture(scope="module")
def made(study, served, model):
    """Makes n patients predicted and matured at DAY, who look like the first ones."""

    def make(n=400, seed=0, **columns):
        rng = np.random.default_rng(seed)
        before = served[served.arrived <= SINCE].assign(matured=True)
        frame = before.sample(n, replace=True, random_state=seed, ignore_index=True)
        frame["record_id"] = [f"p{i}" for i in range(n)]
        frame["arrived"] = SINCE + pd.to_timedelta(1 + np.arange(n) * 400 / n, "D")
        frame["risk"] = predicted_risks(model, frame)
        frame["y"] = (rng.random(n) < frame.risk).astype(float)
        return pd.concat([before, frame.assign(**columns)], ignore_index=True)

    return make


def page(y, risk, odds):
    """One risk-adjusted chart as Steiner writes it down, patient by patient."""
    s, path = 0.0, []
    for outcome, p in zip(y, risk, strict=True):
        evidence = np.log(odds if outcome else 1.0) - np.log(1 - p + odds * p)
        path.append(s := max(0.0, s + evidence))
    return path


@pytest.mark.slow
def test_alarms_stand_where_a_plain_loop_stands_above_the_limit(study, served, quarters, model):
    before = served[served.arrived <= SINCE]
    limits = calibrate_limits(
        study, before.assign(risk=predicted_risks(model, before)), model, scanning=False
    ).charts
    seen = set()
    for day in quarters:
        known = heard(study, served, day)
        verdict = reach_verdict(study, known, day, **since(model), fast=True)
        result = judged_patients(study, known, day, SINCE, 100_000)
        paths = {name: page(result.y, result.risk, o) for name, o in (("up", 2), ("down", 0.5))}
        standing = {name for name, path in paths.items() if path[-1] >= limits.limits[name]}
        results = {a["chart"]: a for a in verdict.evidence["alarms"]}
        assert {n for n in results if n in paths} == standing
        assert all(np.isclose(results[n]["s"], paths[n][-1]) for n in standing)
        seen |= standing
    assert seen == {"down"} and verdict.action == "recalibrate"


def alarmed(study, known_of, quarters, model):
    """Whether any quarterly look alarms; a refit for more patients is no alarm."""
    runs = (
        reach_verdict(study, known_of(d), d, **since(model), worth=1, fast=True) for d in quarters
    )
    return any(v.action != "nothing" for v in runs)


@pytest.mark.slow
def test_hardly_an_alarm_where_the_model_is_right(study, served, quarters, model):
    streams, predicted = 0, served.risk.notna()
    for seed in range(20):
        drawn = (np.random.default_rng(seed).random(len(served)) < served.risk).astype(float)
        right = served.assign(y=served.y.where(~predicted, drawn))
        event = (served.arrived + study.horizon / 2).where(drawn == 1)  # As the label has it
        until = event.fillna(served.arrived + study.horizon)
        right["event"] = served.event.where(~predicted, event)
        right["followed_until"] = served.followed_until.where(~predicted, until)
        streams += alarmed(study, lambda d, r=right: heard(study, r, d), quarters[3::4], model)
    assert streams <= 6  # Expected 0.57 alarms at most in each, and fewer stand when looked at


@pytest.mark.slow
def test_few_alarms_where_time_carries_no_information(study, rows, quarters):
    result = 0
    for seed in range(5):
        mixed = shuffled(rows, seed)
        first = first_model(study, mixed)
        lived = frozen(study, mixed, first)
        result += alarmed(study, lambda d, f=lived: heard(study, f, d), quarters[3::4], first)
    assert result <= 3


def test_no_use_of_the_future(study, served, model):
    day = pd.Timestamp("1988-12-30")
    future = served.copy()
    late = future.arrived + study.horizon > day
    future.loc[late, "y"] = 1 - future.loc[late, "y"]
    future.loc[future.arrived > day, ["age", "risk"]] = [69.0, 0.9]
    one, other = (
        reach_verdict(study, heard(study, f, day), day, **since(model)).to_dict()
        for f in (served, future)
    )
    assert repr(one) == repr(other)


def test_judged_are_matured_predicted_and_in_the_window(study, served):
    day, since = pd.Timestamp("1991-01-01"), pd.Timestamp("1990-01-10")
    known = heard(study, served, day)
    for window, start in ((730, since), (90, day - pd.Timedelta(days=90) - study.horizon)):
        group = judged_patients(study, known, day, since, window)
        wanted = known[(known.arrived > start) & (known.arrived + study.horizon <= day)]
        assert group.record_id.tolist() == wanted[wanted.y.notna()].record_id.tolist()
    known.loc[known.index[-300:], "risk"] = np.nan
    assert judged_patients(study, known, day, since).risk.notna().all()
    assert judged_patients(study, known, day, None, 10_000).arrived.min() > SINCE


def test_then_and_now_share_no_patient(served):
    day, since = pd.Timestamp("1991-01-01"), pd.Timestamp("1990-11-01")
    then, now = reference_and_current(served[served.arrived <= day], day, since)
    assert then.arrived.max() <= since < now.arrived.min()
    assert all(group.empty for group in reference_and_current(served, day, None))


def test_a_right_model_is_left_alone_and_wrong_ones_are_not(study, made, model):
    assert reach_verdict(study, made(2000), DAY, **since(model), worth=1).action == "nothing"
    for factor in (0.4, 2.5):
        wrong = made(2000)
        odds = np.where(wrong.arrived > SINCE, factor, 1.0)
        wrong["risk"] = expit(logit(wrong.risk) + np.log(odds))
        verdict = reach_verdict(study, wrong, DAY, SINCE, version=3, model=model)
        assert verdict.action == "recalibrate" and verdict.version == 3
        assert (verdict.evidence["oe"][0] < 1) == (factor > 1)
        assert f"{verdict.evidence['oe'][0]:.2f}" in verdict.reason and "2000" in verdict.reason


def test_risks_that_distinguish_no_patient_ask_for_a_retraining(study, made, model):
    flat = made(2000)
    after = flat.arrived > SINCE
    coin = np.random.default_rng(2).random(len(flat)) < flat.risk[after].mean()
    verdict = reach_verdict(study, flat.assign(y=flat.y.where(~after, coin)), DAY, **since(model))
    charts = [a["chart"] for a in verdict.evidence["alarms"]]
    assert verdict.action == "retrain" and "slope" in charts and "up" not in charts


def test_a_failure_for_some_is_detected_and_named(study, made, model):
    some = made(2000)
    hit = (some.arrived > SINCE) & (some.premi == "y")
    some.loc[hit, "y"] = (np.random.default_rng(5).random(hit.sum()) < 0.75).astype(float)
    verdict = reach_verdict(study, some, DAY, **since(model))
    assert any("premi is y" in a["chart"] for a in verdict.evidence["alarms"])
    assert verdict.action in ("retrain", "recalibrate")


def test_an_alarm_says_since_when(study, made, model):
    late = made(2000)
    begun = SINCE + pd.Timedelta(days=200)
    late.loc[late.arrived > begun, "y"] = 0.0
    verdict = reach_verdict(study, late, DAY, **since(model))
    down = next(a for a in verdict.evidence["alarms"] if a["chart"] == "down")
    assert abs(pd.Timestamp(down["began"]) - begun) <= pd.Timedelta(days=30)
    assert begun < pd.Timestamp(down["crossed"]) and down["began"] in verdict.reason


@pytest.fixture(scope="module")
def followed():
    """Two-year outcomes of which none is known a year after the model began; many die early."""
    study = load_study("rotterdam")
    rows, began = read_rows(study), study.first_model
    served = pd.DataFrame(np.nan, rows.index, SERVED_COLUMNS)
    model = fit(study, trainable(known_as_of(study, rows, served, began)))
    after = rows.arrived > began
    served.loc[after, "risk"], served.loc[after, "version"] = predicted_risks(model, rows[after]), 1
    early = after & (np.random.default_rng(1).random(len(rows)) < 0.5)
    rows.loc[early, "event"] = rows.loc[early, "arrived"] + pd.Timedelta(days=60)
    rows = label_outcomes(
        study, rows.assign(followed_until=rows.followed_until.where(~early, rows.event))
    )
    day = began + pd.Timedelta(days=365)
    return study, known_as_of(study, rows, served, day), day, model


def test_those_in_follow_up_are_heard_before_any_outcome_has_matured(followed):
    study, known, day, model = followed
    verdict = reach_verdict(study, known, day, study.first_model, 1, model, fast=True)
    assert verdict.action == "recalibrate" and "no outcome of this version" in verdict.reason
    assert "among those still followed more events have come" in verdict.reason
    assert [a["chart"] for a in verdict.evidence["alarms"]] == ["early up"]
    late = replace(study, reported="at the horizon")
    assert (
        reach_verdict(late, known, day, study.first_model, 1, model, worth=1, fast=True).action
        == "nothing"
    )


def test_an_alarm_without_a_matured_outcome_is_answered_from_follow_up(followed):
    study, known, day, model = followed
    verdict = reach_verdict(study, known, day, study.first_model, 1, model, fast=True)
    result = decide_update(Case(study, known, day, model, study.first_model), verdict.to_dict())
    (gate,) = result.evidence["gates"]
    assert gate["on"] == "follow-up" and "in the last 182 days" in result.reason
    assert (result.action == "recalibrate in the large") == gate["passed"]
    assert result.evidence["tests"][0]["low"] > 1


def test_the_lost_count_by_weights(study, made, model):
    known = made(1000)
    gone = (known.arrived > SINCE) & (known.index % 3 == 0) & (known.y == 0)
    known["lost"] = gone
    known["event"] = (known.arrived + pd.Timedelta(days=5)).where(known.y == 1)
    until = known.arrived + study.horizon
    known["followed_until"] = until.where(~gone, known.arrived + pd.Timedelta(days=6))
    known["y"] = known.y.where(~gone)
    verdict = reach_verdict(study, known, DAY, **since(model))
    group = judged_patients(study, known, DAY, SINCE)
    plain, weighted = oe(group.y, group.risk), verdict.evidence["oe"]
    assert weighted[1] < 1 < weighted[2] and weighted[0] < plain[0] - 0.1
    asked = verdict.evidence["population"]
    assert f"{asked['unknown']:,} of {asked['patients']:,} labels unknown" in verdict.reason


def test_an_estimate_is_held_against_what_came(study, served, model):
    day = pd.Timestamp("1988-06-01")
    known = heard(study, served, day).assign(version=1)
    verdict = reach_verdict(study, known, day, **since(model))
    result = verdict.evidence["estimate"]
    assert result["patients"] == (~known.matured & known.risk.notna()).sum() > 10
    row = {"as_of": day, "version": 1, "evidence": json.dumps(verdict.evidence)}
    verdicts = pd.DataFrame([row, row | {"evidence": "{}"}])
    assert estimates_and_outcomes(verdicts, known).empty
    later = heard(study, served, day + study.horizon).assign(version=1)
    came = estimates_and_outcomes(verdicts, later).set_index("measure")
    window = later[later.record_id.isin(known.record_id[~known.matured])]
    assert came.loc["brier", "realised"] == pytest.approx(((window.y - window.risk) ** 2).mean())
    assert came.loc["oe", "estimated"] == result["oe"][0] and came.inside.dtype == bool


def test_limits_survive_the_store(study, served, model):
    before = served[served.arrived <= SINCE]
    limits = calibrate_limits(study, before.assign(risk=predicted_risks(model, before)), model)
    again = limits_from_json(limits_to_json(limits))
    assert again.charts == limits.charts and limits_to_json(again) == limits_to_json(limits)
    known = heard(study, served, DAY)
    one, other = (
        reach_verdict(study, known, DAY, **since(model), limits=g).to_dict()
        for g in (limits, again)
    )
    assert repr(one) == repr(other)
    with pytest.raises(LMError, match="no limits"):
        limits_from_json("{}")


@pytest.mark.parametrize(
    ("outcomes", "events", "action"),
    [(100, 20, "retrain"), (99, 30, "nothing"), (100, 19, "nothing"), (0, 0, "nothing")],
)
def test_a_first_model_needs_100_outcomes_and_20_events(study, made, outcomes, events, action):
    known = made(150)[-150:].reset_index(drop=True).assign(y=np.nan)
    known.loc[: outcomes - 1, "y"] = 0.0
    known.loc[: events - 1, "y"] = 1.0
    verdict = reach_verdict(study, known.assign(risk=np.nan), DAY)
    assert verdict.action == action and "no model yet" in verdict.reason
    assert verdict.version is None and verdict.evidence["patients"] == outcomes


def test_a_first_model_counts_matured_outcomes_only(study, made):
    known = made(300).assign(matured=False)
    assert reach_verdict(study, known, DAY).action == "nothing"


def test_too_few_patients_before_the_model_say_so(study, made, model):
    verdict = reach_verdict(study, made(300, y=0.0)[-300:], DAY, **since(model))
    assert verdict.action == "nothing" and "too few patients" in verdict.reason


@pytest.fixture
def both_sides(made):
    """600 patients since the model who are like those before it, no outcome matured."""
    return made(600, 3, matured=False, y=np.nan)


FAULTS = {
    "unit": lambda f, new: f.assign(age=f.age.where(~new, f.age / 12)),
    "missing": lambda f, new: f.assign(age=f.age.where(~new | (f.index % 4 > 0))),
    "unseen level": lambda f, new: f.assign(sex=f.sex.where(~new | (f.index % 20 > 0), "x")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_feed_asks_for_a_check(study, both_sides, model, fault):
    frame = both_sides
    assert reach_verdict(study, frame, DAY, **since(model)).action == "nothing"
    verdict = reach_verdict(study, FAULTS[fault](frame, frame.arrived > SINCE), DAY, **since(model))
    assert verdict.action == "look at the data"
    assert ("sex" if fault == "unseen level" else "age") in verdict.reason
    fast = reach_verdict(study, frame, DAY, **since(model), fast=True)
    assert fast.evidence.get("drift") is None


def test_older_patients_alone_change_nothing_but_are_named_with_their_impact(
    study, both_sides, model
):
    frame = both_sides
    older = frame.assign(age=frame.age.where(frame.arrived <= SINCE, frame.age + 5))
    verdict = reach_verdict(study, older, DAY, **since(model))
    moved = {r["feature"]: r for r in verdict.evidence["drift"] if r["moved"]}
    assert verdict.action == "nothing" and "age" in moved and moved["age"]["brier"] > 0
    assert "age has moved" in verdict.reason


def test_what_the_records_explain_is_a_case_for_the_feed(study, made, model):
    frame = made(1500)
    after = frame.arrived > SINCE
    wrong = frame.assign(age=frame.age.where(~after, frame.age * 12))
    wrong["risk"] = pd.Series(predicted_risks(model, wrong), wrong.index).where(after)
    verdict = reach_verdict(study, wrong, DAY, **since(model))
    assert verdict.evidence["alarms"] and verdict.action == "look at the data"
    assert "12-fold" in verdict.reason and "put back" in verdict.reason


def test_a_wrong_model_outranks_a_feed_that_does_not_explain_it(study, made, model):
    frame = made(600, y=0.0)
    frame = FAULTS["missing"](frame, frame.arrived > SINCE)
    verdict = reach_verdict(study, frame, DAY, **since(model))
    assert verdict.action == "recalibrate" and verdict.evidence["suspicions"]


def test_a_ratio_without_a_positive_side_is_no_suspicion():
    then, now = (pd.DataFrame({"age": np.full(50, v)}) for v in (0.0, 9.0))
    moved = {"feature": "age", "test": "KS", "unseen": 0, "moved": True}
    table = pd.DataFrame([moved | {"missing_reference": 0.0, "missing_current": 0.0}])
    assert suspected_faults(table, then, now) == {}


def test_met_splits_at_the_model_and_orders_by_knowledge(served):
    known = served.assign(known_at=served.arrived)
    last = known.index[known.arrived > SINCE][0]
    known.loc[last, "known_at"] = known.arrived.max() + pd.Timedelta(days=1)
    before, later = before_and_since(known, SINCE)
    assert before.arrived.max() <= SINCE < later.arrived.min() and later.index[-1] == last
    assert before_and_since(known, None)[0].empty


def edges(frame, study):
    return {
        "no patient": frame[:0],
        "one patient": frame[-1:],
        "three patients": frame[-3:],
        "three with a history": frame[:-397],
        "no outcome yet": frame.assign(y=np.nan, matured=False),
        "no event": frame.assign(y=0.0),
        "only events": frame.assign(y=1.0),
        "no prediction": frame.assign(risk=np.nan),
        "one risk for all": frame.assign(risk=frame.y.mean()),
        "risk 0, no event": frame.assign(risk=0.0, y=0.0),
        "risk 0, only events": frame.assign(risk=0.0, y=1.0),
        "risk 1, no event": frame.assign(risk=1.0, y=0.0),
        "risk 1, only events": frame.assign(risk=1.0, y=1.0),
        "a feature all missing": frame.assign(
            **dict.fromkeys(study.numbers[:1], np.nan), matured=False
        ),
        "a feature constant": frame.assign(**dict.fromkeys(study.numbers[:1], 50.0), matured=False),
    }


EDGES = {
    **dict.fromkeys(["no patient", "one patient", "three patients", "no outcome yet"], "nothing"),
    **dict.fromkeys(["three with a history", "no prediction", "risk 0, no event"], "nothing"),
    **dict.fromkeys(["risk 1, only events", "one risk for all"], "nothing"),
    **dict.fromkeys(["no event", "only events", "risk 0, only events"], "recalibrate"),
    **{"risk 1, no event": "recalibrate", "a feature all missing": "nothing"},
    **{"a feature constant": "nothing"},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("version", [None, 1])
def test_edge_cases_have_an_action_and_a_sentence_that_the_store_keeps(
    name, version, study, made, model, home
):
    known = edges(made(), study)[name]
    verdict = reach_verdict(study, known, DAY, version and SINCE, version, model, worth=1)
    assert verdict.action in VERDICT_ACTIONS and "nan" not in verdict.reason.lower()
    if version:
        assert verdict.action == EDGES[name], verdict.reason
    with Store(study, home) as store:
        store.events.append_verdict(verdict.to_dict())
        stored = store.queries.table("verdicts").iloc[0]
    assert (stored.action, stored.reason) == (verdict.action, verdict.reason)


def test_importing_the_monitor_is_light():
    heavy = ("evidently", "statsmodels", "matplotlib", "plotly", "mlflow", "shap", "sklearn")
    code = f"import lm.monitor.verdict, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("error", [ImportError("no such name"), RuntimeError("x"), KeyError("y")])
def test_a_broken_evidently_costs_one_warning(study, served, tmp_path, monkeypatch, error):
    class Broken:
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "evidently", Broken())
    with warnings.catch_warnings(record=True) as heard_:
        warnings.simplefilter("always")
        drawn = evidently_report(study, served[:200], served[200:400], tmp_path / "a" / "r.html")
    assert drawn is None and not (tmp_path / "a" / "r.html").exists()
    ours = [str(w.message) for w in heard_ if "Evidently" in str(w.message)]
    assert len(ours) == 1 and "\n" not in ours[0]


@pytest.mark.slow
def test_evidentlys_report_is_one_file_with_our_tests(study, served, tmp_path, capfd):
    then, now = served[:600].copy(), served[600:1200].copy()
    now.loc[now.index[::5], "age"] = np.nan
    path = evidently_report(study, then, now, tmp_path / "a" / "drift.html")
    page = path.read_text(encoding="utf-8")
    assert path.parent.name == "a" and 1e6 < len(page) < 2e7
    assert "K-S p_value" in page and "chi-square p_value" in page
    assert "Wasserstein" not in page.split("<script")[0]
    for name in study.feature_names:
        assert name in page
    assert '<script src="http' not in page and '<link rel="stylesheet" href="http' not in page
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_evidently_leaves_out_what_is_empty_and_says_so(study, served, tmp_path):
    then, now = served[:300].copy(), served[300:600].copy()
    number, level = study.numbers[0], study.levels[0]
    then[number], now[level] = np.nan, None
    path = evidently_report(study, then, now, tmp_path / "some.html")
    note = path.read_text(encoding="utf-8").split("<body>", 1)[1].split("</p>")[0]
    assert f"{number} (no value in the reference window)" in note
    assert f"{level} (no value in the current window)" in note
    assert not any(name in note for name in study.feature_names if name not in (number, level))
    constant = now.assign(**{number: 50.0, level: then[level].iloc[0]})
    page = evidently_report(study, constant, constant, tmp_path / "constant.html")
    assert "Left out" not in page.read_text(encoding="utf-8").split("<script", 1)[0]
    nothing = now.assign(**dict.fromkeys(study.feature_names, np.nan))
    with pytest.warns(UserWarning, match="each feature is empty in one of the two windows"):
        assert evidently_report(study, then, nothing, tmp_path / "none.html") is None
    assert not (tmp_path / "none.html").exists()


def test_a_change_promises_what_its_later_outcomes_can_tell(study, made, model):
    known = made(1500)
    began = str(SINCE.date())
    result = repeated_shift_gain(study, model, known, SINCE, began)
    later = repeated_shift_gain(study, model, known, SINCE + pd.Timedelta(days=200), began)
    assert result["promise"] > later["promise"] > 0 and result["patients"] > 100
    assert repeated_shift_gain(study, model, known, SINCE, None)["promise"] == 0
    assert repeated_shift_gain(study, model, known, SINCE, str(DAY.date()))["promise"] == 0
    quiet = reach_verdict(study, known, DAY, **since(model), began=began, fast=True)
    assert quiet.evidence["settling"]["due"] and quiet.action == "recalibrate"
    assert began in quiet.reason

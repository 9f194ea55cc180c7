"""The rules one by one, alarm dates against the bare formula, and what a monitor must survive."""

import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from scipy.special import expit, logit

from lm.monitor import (
    ACTIONS,
    calibration_tests,
    evidently_report,
    feed_suspicions,
    judged,
    look,
    then_and_now,
)
from lm.predict import fit, predict
from lm.source import shuffled
from lm.store import Store
from lm.study import load_study, read_rows, typed

SINCE = pd.Timestamp("1987-01-01")
DAY = pd.Timestamp("1988-06-01")


@pytest.fixture(scope="module")
def study():
    return load_study("monica")


@pytest.fixture(scope="module")
def rows(study):
    return read_rows(study)


def frozen(study, rows):
    """All rows with the risks of a first model that is never updated."""
    model = fit(study, rows[rows.arrived + study.horizon <= SINCE])
    risk = predict(model, typed(study, rows)).risk
    return rows.assign(risk=risk.where(rows.arrived > SINCE))


def heard(study, served, day):
    """What is known at `day`."""
    known = served[served.arrived <= day]
    matured = known.arrived + study.horizon <= day
    return known.assign(matured=matured, y=known.y.where(matured))


@pytest.fixture(scope="module")
def served(study, rows):
    return frozen(study, rows)


@pytest.fixture(scope="module")
def quarters(rows):
    return pd.date_range(SINCE + pd.Timedelta(days=91), rows.arrived.max(), freq="91D")


def made(study, n=400, seed=0, risk=0.25, **columns):
    """n patients predicted and matured at DAY, with outcomes of a right model."""
    dice = np.random.default_rng(seed)
    risks = expit(logit(risk) + dice.normal(0, 1, n))
    frame = pd.DataFrame({"record_id": [f"p{i}" for i in range(n)]})
    frame["arrived"] = SINCE + pd.to_timedelta(1 + np.arange(n) * 400 / n, "D")
    for f in study.features:
        frame[f.name] = f.low if f.kind == "number" else f.levels[0]
    frame["y"] = (dice.random(n) < risks).astype(float)
    return frame.assign(risk=risks, matured=True).assign(**columns)


def bare_alarm(study, served, day, since, window_days=730, alpha=0.01, least=100):
    """The test written out: observed minus expected over its error, since the last update."""
    start = max(since, day - pd.Timedelta(days=window_days) - study.horizon)
    arrived, y, p = (served[c].to_numpy() for c in ("arrived", "y", "risk"))
    use = (arrived > start) & (arrived <= day - study.horizon) & ~np.isnan(y) & ~np.isnan(p)
    z = (y[use].sum() - p[use].sum()) / np.sqrt((p[use] * (1 - p[use])).sum())
    return use.sum() >= least and 2 * stats.norm.sf(abs(z)) < alpha


def test_alarm_dates_are_those_of_the_bare_formula(study, served, quarters):
    looks = [look(study, heard(study, served, d), d, SINCE, version=1, fast=True) for d in quarters]
    asked = [v.as_of for v in looks if v.action == "recalibrate"]
    assert asked == [d for d in quarters if bare_alarm(study, served, d, SINCE)]
    assert asked[0] == pd.Timestamp("1990-06-28") and asked[-1] == quarters[-1]
    assert all(v.evidence["oe"][0] < 1 for v in looks if v.action == "recalibrate")


def alarms(study, served, quarters):
    """How many of the quarterly looks at level 0.001 ask for a recalibration, for a retraining."""
    rules = {"alpha": 0.001, "fast": True}
    actions = [look(study, heard(study, served, d), d, SINCE, 1, **rules).action for d in quarters]
    return actions.count("recalibrate"), actions.count("retrain")


def test_few_alarms_where_time_carries_no_information(study, rows, quarters):
    """A first model from some 900 patients is itself a little wrong, so a few are heard."""
    heard_of = np.array(
        [alarms(study, frozen(study, shuffled(rows, seed)), quarters) for seed in range(12)]
    )
    assert (heard_of[:, 0] > 0).mean() <= 0.25 and (heard_of.sum(axis=1) > 0).mean() <= 0.5


def test_hardly_an_alarm_where_the_model_is_right(study, rows, quarters):
    right = predict(fit(study, rows), typed(study, rows)).risk
    streams = 0
    for seed in range(12):
        drawn = np.random.default_rng(seed).random(len(rows)) < right
        served = rows.assign(y=drawn.astype(float), risk=right.where(rows.arrived > SINCE))
        streams += sum(alarms(study, served, quarters)) > 0
    assert streams <= 2


def test_no_look_ahead(study, served):
    day = pd.Timestamp("1988-12-30")
    future = served.copy()
    late = future.arrived + study.horizon > day
    future.loc[late, "y"] = 1 - future.loc[late, "y"]
    future.loc[future.arrived > day, ["age", "risk"]] = [69.0, 0.9]
    one, other = (
        look(study, heard(study, f, day), day, SINCE, version=1).to_dict() for f in (served, future)
    )
    assert repr(one) == repr(other)


def test_judged_are_matured_predicted_and_in_the_window(study, served):
    day, since = pd.Timestamp("1991-01-01"), pd.Timestamp("1990-01-10")
    known = heard(study, served, day)
    for window, start in ((730, since), (90, day - pd.Timedelta(days=90) - study.horizon)):
        group = judged(study, known, day, since, window)
        wanted = known[(known.arrived > start) & (known.arrived + study.horizon <= day)]
        assert group.record_id.tolist() == wanted[wanted.y.notna()].record_id.tolist()
    known.loc[known.index[-300:], "risk"] = np.nan
    assert judged(study, known, day, since).risk.notna().all()
    assert judged(study, known, day, None, 10_000).arrived.min() > SINCE


def test_then_and_now_share_nobody(served):
    day, since = pd.Timestamp("1991-01-01"), pd.Timestamp("1990-11-01")
    then, now = then_and_now(served[served.arrived <= day], day, since)
    assert then.arrived.max() <= since < now.arrived.min()
    assert all(group.empty for group in then_and_now(served, day, None))


def test_z_test_is_nearly_the_exact_one():
    dice = np.random.default_rng(3)
    risk = dice.uniform(0.05, 0.6, 250)
    exact = stats.poisson_binom(risk)
    for shift in (0, 12, 25):
        y = np.zeros(250)
        y[: round(risk.sum()) + shift] = 1
        tail = min(1, 2 * exact.sf(y.sum() - 0.5 - 1e-9))
        p = calibration_tests(y, risk)["p"]
        assert np.isclose(np.log10(p), np.log10(tail), atol=0.35)


def test_slope_test_is_walds_against_1():
    dice = np.random.default_rng(4)
    z = dice.normal(-1, 1, 500)
    y = (dice.random(500) < expit(0.4 * z)).astype(float)
    line = sm.Logit(y, sm.add_constant(z)).fit(disp=0)
    wald = 2 * stats.norm.sf(abs(line.params[1] - 1) / line.bse[1])
    assert np.isclose(calibration_tests(y, expit(z))["p_slope"], wald, rtol=1e-4)


def test_a_right_model_is_left_alone_and_wrong_ones_are_not(study):
    assert look(study, made(study, 2000), DAY, SINCE, version=1).action == "nothing"
    for factor in (0.4, 2.5):
        wrong = made(study, 2000)
        wrong["risk"] = expit(logit(wrong.risk) + np.log(factor))
        verdict = look(study, wrong, DAY, SINCE, version=3)
        assert verdict.action == "recalibrate" and verdict.version == 3
        assert (verdict.evidence["oe"][0] < 1) == (factor > 1)
        assert f"{verdict.evidence['oe'][0]:.2f}" in verdict.reason and "2000" in verdict.reason


def test_a_wrong_slope_asks_for_a_retraining(study):
    steep = made(study, 2000, risk=0.5)
    steep["risk"] = expit(2.5 * logit(steep.risk))
    verdict = look(study, steep, DAY, SINCE, version=1)
    assert verdict.evidence["p"] > 0.001 and verdict.action == "retrain"
    assert "slope" in verdict.reason


def test_false_alarms_of_a_look_keep_to_the_level(study):
    actions = [
        look(study, made(study, 300, seed), DAY, SINCE, 1, alpha=0.05, fast=True).action
        for seed in range(300)
    ]
    assert 0.01 < np.mean(np.array(actions) != "nothing") < 0.15
    assert 0.02 < np.mean(np.array(actions) == "recalibrate") < 0.085


@pytest.mark.parametrize(
    ("outcomes", "events", "action"),
    [(100, 20, "retrain"), (99, 30, "nothing"), (100, 19, "nothing"), (0, 0, "nothing")],
)
def test_a_first_model_needs_100_outcomes_and_20_events(study, outcomes, events, action):
    known = made(study, 150, risk=0.3).assign(y=np.nan)
    known.loc[: outcomes - 1, "y"] = 0.0
    known.loc[: events - 1, "y"] = 1.0
    verdict = look(study, known.assign(risk=np.nan), DAY)
    assert verdict.action == action and "no model yet" in verdict.reason
    assert verdict.version is None and verdict.evidence["patients"] == outcomes


def test_a_first_model_counts_matured_outcomes_only(study):
    known = made(study, 300, risk=0.4).assign(matured=False)
    assert look(study, known, DAY).action == "nothing"


def test_too_few_outcomes_say_how_many_of_how_many(study):
    wrong = made(study, 99, risk=0.9, y=0.0)
    verdict = look(study, wrong, DAY, SINCE, version=1)
    assert verdict.action == "nothing" and "99" in verdict.reason and "100" in verdict.reason
    more = look(study, made(study, 100, risk=0.9, y=0.0), DAY, SINCE, version=1)
    assert more.action == "recalibrate"


def both_sides(study, seed=0):
    """600 patients of varied ages before the model and 600 since, all alike, nobody matured."""
    frame = made(study, 1200, seed, matured=False)
    frame["arrived"] = SINCE + pd.to_timedelta(np.linspace(-170, 150, 1200), "D")
    frame["age"] = np.random.default_rng(seed).normal(55, 8, 1200).clip(25, 69)
    return frame.assign(y=np.nan, risk=frame.risk.where(frame.arrived > SINCE))


FAULTS = {
    "unit": lambda f, new: f.assign(age=f.age.where(~new, f.age / 12)),
    "missing": lambda f, new: f.assign(age=f.age.where(~new | (f.index % 4 > 0))),
    "unseen level": lambda f, new: f.assign(sex=f.sex.where(~new | (f.index % 20 > 0), "x")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_feed_asks_somebody_to_look(study, fault):
    frame, day = both_sides(study), SINCE + pd.Timedelta(days=150)
    assert look(study, frame, day, SINCE, version=1).action == "nothing"
    verdict = look(study, FAULTS[fault](frame, frame.arrived > SINCE), day, SINCE, version=1)
    assert verdict.action == "look at the data"
    assert ("sex" if fault == "unseen level" else "age") in verdict.reason
    assert look(study, frame, day, SINCE, version=1, fast=True).evidence.get("drift") is None


def test_older_patients_alone_change_nothing_but_are_named(study):
    frame, day = both_sides(study), SINCE + pd.Timedelta(days=150)
    older = frame.assign(age=frame.age.where(frame.arrived <= SINCE, frame.age + 5))
    verdict = look(study, older, day, SINCE, version=1)
    moved = {r["feature"] for r in verdict.evidence["drift"] if r["moved"]}
    assert verdict.action == "nothing" and moved == {"age"}


def test_a_wrong_model_outranks_a_broken_feed(study):
    frame, day = both_sides(study), SINCE + pd.Timedelta(days=250)
    frame = FAULTS["missing"](frame, frame.arrived > SINCE).assign(matured=True, y=0.0)
    verdict = look(study, frame, day, SINCE, version=1)
    assert verdict.action == "recalibrate" and verdict.evidence["suspicions"]


def test_a_ratio_without_a_positive_side_is_no_suspicion(study):
    then, now = (pd.DataFrame({"age": np.full(50, v)}) for v in (0.0, 9.0))
    moved = {"feature": "age", "test": "KS", "unseen": "", "moved": True}
    table = pd.DataFrame([moved | {"missing_reference": 0.0, "missing_current": 0.0}])
    assert feed_suspicions(table, then, now) == []


def edges(study):
    frame = made(study)
    return {
        "nobody": frame[:0],
        "one patient": frame[:1],
        "three patients": frame[:3],
        "no outcome yet": frame.assign(y=np.nan, matured=False),
        "no event": frame.assign(y=0.0),
        "only events": frame.assign(y=1.0),
        "nobody predicted": frame.assign(risk=np.nan),
        "one risk for all": frame.assign(risk=0.25),
        "risk 0, no event": frame.assign(risk=0.0, y=0.0),
        "risk 0, only events": frame.assign(risk=0.0, y=1.0),
        "risk 1, no event": frame.assign(risk=1.0, y=0.0),
        "risk 1, only events": frame.assign(risk=1.0, y=1.0),
        "features all missing": frame.assign(**dict.fromkeys(study.numbers, np.nan)),
    }


EDGES = {
    "nobody": "nothing",
    "one patient": "nothing",
    "three patients": "nothing",
    "no outcome yet": "nothing",
    "no event": "recalibrate",
    "only events": "recalibrate",
    "nobody predicted": "nothing",
    "one risk for all": "nothing",
    "risk 0, no event": "nothing",
    "risk 0, only events": "recalibrate",
    "risk 1, no event": "recalibrate",
    "risk 1, only events": "nothing",
    "features all missing": "nothing",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("version", [None, 1])
def test_edge_cases_have_an_action_and_a_sentence_that_the_store_keeps(name, version, study, home):
    verdict = look(study, edges(study)[name], DAY, version and SINCE, version)
    assert verdict.action in ACTIONS and "nan" not in verdict.reason.lower()
    if version:
        assert verdict.action == EDGES[name], verdict.reason
    with Store(study, home) as store:
        store.add_verdict(verdict.to_dict())
        kept = store.table("verdicts").iloc[0]
    assert (kept.action, kept.reason) == (verdict.action, verdict.reason)


def fastest(function, times=7):
    """Seconds of the quickest of some calls: the rest is other people's work."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        took.append(time.perf_counter() - start)
    return min(took)


def test_a_look_is_quick_enough_for_hundreds_of_them(study, rows, served):
    day = rows.arrived.max() + pd.Timedelta(days=60)
    known = heard(study, served, day)
    assert len(known) > 3500
    assert fastest(lambda: look(study, known, day, SINCE, 1, 4000, fast=True)) < 0.03
    assert fastest(lambda: look(study, known, day, SINCE, 1, 4000)) < 0.15


def test_importing_the_monitor_is_light():
    heavy = ("evidently", "statsmodels", "matplotlib", "plotly", "mlflow", "shap", "sklearn")
    code = f"import lm.monitor, sys; print([m for m in {heavy!r} if m in sys.modules])"
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

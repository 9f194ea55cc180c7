"""Charts against a plain loop and likelihoods by hand: limits, budgets, alarms, odd patients."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.synthetic import synthetic
from lm.monitor.cusum import (
    ALARM_COLUMNS,
    ALL_PATIENTS_CHARTS,
    ODDS_RATIO,
    SUBGROUP_ODDS_RATIO,
    CusumCharts,
    Subgroup,
    calibrate_cusum,
    chart_weights,
    cusum,
    cusum_alarms,
    log_likelihood_ratio,
    run_cusum,
    watched_subgroups,
)
from lm.monitor.false_alarms import CHART_SHARES, control_limit

STUDY = load_study("rotterdam")
WOMEN = synthetic(STUDY, 3000, seed=51)
WOMEN["risk"] = WOMEN["truth"]
REFERENCE, LATER = WOMEN[:1000], WOMEN[1000:].reset_index(drop=True)


@pytest.fixture(scope="module")
def calibrated():
    return calibrate_cusum(STUDY, REFERENCE, learned_from=10**9)


def outcomes(frame, seed, log_odds=0.0):
    """These patients with outcomes drawn from their risks, their log-odds moved."""
    p = expit(logit(frame["risk"]) + log_odds)
    return frame.assign(y=(np.random.default_rng(seed).random(len(frame)) < p).astype(float))


def watched(calibrated, frame):
    """The alarms about these patients."""
    return cusum_alarms(calibrated, run_cusum(calibrated, frame["y"], frame["risk"], frame))


def steiner(y, risk, odds):
    """Risk-adjusted chart as Steiner et al. write it: odds ratio 1 against `odds`, by a loop."""
    s, path = 0.0, []
    for outcome, p in zip(y, risk, strict=True):
        below = 1 - p + odds * p
        s = max(0.0, s + (np.log(odds / below) if outcome == 1 else np.log(1 / below)))
        path.append(s)
    return path


@pytest.mark.parametrize("odds", [ODDS_RATIO, 1 / ODDS_RATIO, SUBGROUP_ODDS_RATIO])
def test_charts_are_those_of_a_loop_by_steiner(odds):
    y, risk = LATER["y"].to_numpy(), LATER["risk"].to_numpy()
    other = expit(logit(risk) + np.log(odds))
    assert np.allclose(
        cusum(log_likelihood_ratio(y, risk, other)), steiner(y, risk, odds), atol=1e-9
    )


def test_run_gives_every_chart_of_the_loop(calibrated):
    y, risk = LATER["y"].to_numpy(), LATER["risk"].to_numpy()
    paths = run_cusum(calibrated, y, risk, LATER)
    assert list(paths) == calibrated.names and paths.index.equals(LATER.index)
    assert np.allclose(paths["up"], steiner(y, risk, 2))
    assert np.allclose(paths["down"], steiner(y, risk, 0.5))
    for group in calibrated.groups:
        inside = group.holds(LATER)
        for way, odds in (("more", 3), ("less", 1 / 3)):
            path = paths[f"{way} often where {group.name}"].to_numpy()
            assert np.allclose(path[inside], steiner(y[inside], risk[inside], odds))
            still = ~inside[1:]
            assert np.allclose(path[1:][still], path[:-1][still])  # Others leave it where it is
    flat = np.full(2000, expit(calibrated.centre))
    likelihoods = (stats.bernoulli.pmf(y, p) for p in (flat, risk))
    ratio = np.divide(*likelihoods)
    assert np.allclose(paths["slope"], cusum(np.log(ratio)))


def test_evidence_by_hand():
    result = log_likelihood_ratio(
        np.array([1, 0, 1, 0]), np.array([0.2, 0.2, 0.5, 0.9]), np.array([0.4, 0.4, 0.5, 0.1])
    )
    assert np.allclose(result, [np.log(2), np.log(0.75), 0, np.log(9)])
    sure = log_likelihood_ratio(np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1]), np.array([0.5] * 4))
    expected = np.log([0.5 / 1e-6, 0.5 / (1 - 1e-6), 0.5 / (1 - 1e-6), 0.5 / 1e-6])
    assert np.allclose(sure, expected)
    up, down, slope, *group = chart_weights(
        np.array([1.0]), np.array([0.2]), 0.0, [np.array([True])]
    )
    by_hand = [np.log(5 * 2 / 6), np.log(5 * 1 / 9), np.log(2.5), np.log(5 * 3 / 7), np.log(5 / 13)]
    assert np.allclose(np.concatenate([up, down, slope, *group]), by_hand)


def test_evidence_has_the_mean_that_theory_gives_it():
    risk, y = np.full(2, 0.3), np.array([0.0, 1.0])
    for evidence in chart_weights(y, risk, 0.5):
        assert np.isclose((np.exp(evidence) * [0.7, 0.3]).sum(), 1)  # A likelihood ratio has mean 1
        assert (evidence * [0.7, 0.3]).sum() < 0  # And speaks against, where nothing is wrong


@pytest.mark.parametrize("seed", range(5))
def test_cusum_is_pages_and_nothing_uses_the_future(seed):
    steps = np.random.default_rng(seed).normal(-0.1, 1, (3, 400))
    result = cusum(steps)
    for row, path in zip(steps, result, strict=True):
        s = 0.0
        for one, value in zip(row, path, strict=True):
            s = max(0.0, s + one)
            assert abs(s - value) < 1e-9
    assert np.array_equal(cusum(steps[:, :123]), result[:, :123])
    assert np.allclose(cusum(3 * steps), 3 * result) and (result >= 0).all()
    assert cusum(np.array([])).shape == (0,)


def test_alarms_say_where_they_began_crossed_and_stand():
    calibrated = CusumCharts(0.0, (), {"up": 3.0, "down": 2.0, "slope": 5.0, "groups": 9.0}, 0.2)
    paths = pd.DataFrame(
        {
            "up": [0, 1, 0, 0, 2, 3, 4, 0, 3.5],  # Leaves 0 at e, crosses at f, stands
            "down": [1, 2, 1, 0, 0, 0, 0, 0, 1],  # Was never at 0 before it crossed; stands no more
            "slope": [0, 4.9, 4.9, 0, 0, 0, 0, 4.9, 4.9],  # Never reaches its limit
            "more often where x": [0, 0, 0, 0, 0, 0, 0, 0, 9],  # In one step
        },
        index=list("abcdefghi"),
    )
    table = cusum_alarms(calibrated, paths)
    assert list(table) == ALARM_COLUMNS
    assert table.to_numpy().tolist() == [
        ["up", 3.5, 3.0, "f", "e", True],
        ["more often where x", 9, 9.0, "i", "i", True],
        ["down", 1, 2.0, "b", "a", False],
    ]
    assert (
        cusum_alarms(calibrated, paths[:1]).empty
        and list(cusum_alarms(calibrated, paths[:0])) == ALARM_COLUMNS
    )


@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_the_limit_of_a_known_process_is_known(budget):
    rng = np.random.default_rng(3)
    steps = rng.exponential(1, (600, 2000)) * (rng.random((600, 2000)) < 0.02)
    known = np.log(1000 * 0.02 / budget)  # Rare marks, each above h with probability exp(-h)
    assert abs(control_limit(steps, budget) - known) < 0.25


@pytest.mark.filterwarnings("error")
def test_smaller_budgets_have_higher_limits_and_prolong_the_line():
    steps = np.random.default_rng(4).normal(-0.5, 1, (200, 1500))  # Their S exceeds h as exp(-h)
    results = [control_limit(cusum(steps), budget) for budget in (10, 1, 0.1, 1e-2, 1e-4, 1e-6)]
    assert all(a < b for a, b in pairwise(results))
    slopes = np.diff(results[-2:]) / np.log(100)
    assert 0.99 <= slopes[0] < 1.5  # A limit higher by ln 100 is a hundred times rarer
    assert np.isclose(control_limit(np.zeros((9, 50)), 0.5), np.log(2000))
    jump = np.where(np.arange(100) < 50, 4.0, 0.0)[:, None] * np.ones((100, 30))
    assert control_limit(jump, 1e-3) > 4


def test_the_budget_holds_on_outcomes_never_seen():
    budget, rng = 0.6, np.random.default_rng(8)
    calibrated = calibrate_cusum(STUDY, REFERENCE, budget, learned_from=10**9)
    limits = np.array([calibrated.limit(name) for name in calibrated.names])
    part = np.array(
        [name if name in ALL_PATIENTS_CHARTS else "groups" for name in calibrated.names]
    )
    firsts = {name: [] for name in (*CHART_SHARES, "all")}
    for seed in range(120):
        frame = outcomes(REFERENCE.iloc[rng.integers(0, 1000, 2000)], seed)
        hit = run_cusum(calibrated, frame["y"], frame["risk"], frame).to_numpy() >= limits
        for name, first in firsts.items():
            one = hit[:, (part == name) | (name == "all")].any(axis=1)
            first.append((one.any(), one.argmax() + 1 if one.any() else 2000))
    for name, share in (CHART_SHARES | {"all": 1.0}).items():
        seen, exposure = np.sum(firsts[name], axis=0)
        low, high = stats.poisson.ppf([0.005, 0.995], budget * share * exposure / 1000)
        assert (name == "all" or low <= seen) and seen <= high  # Several at once count once in all
    assert seen > high / 3


def test_doubt_about_the_model_raises_the_limits_and_none_lowers_the_others(calibrated):
    doubtful = calibrate_cusum(STUDY, REFERENCE, learned_from=150)
    for name in ("up", "down"):
        assert doubtful.limits[name] > calibrated.limits[name] + 0.5
    truths = np.tile(logit(REFERENCE["risk"]), (200, 1))
    assert (
        abs(calibrate_cusum(STUDY, REFERENCE, truths=truths).limits["up"] - calibrated.limits["up"])
        < 1
    )
    again = calibrate_cusum(STUDY, REFERENCE, learned_from=10**9)
    assert (
        again == calibrated
        and calibrated.budget == 0.2
        and np.isclose(sum(CHART_SHARES.values()), 1)
    )
    assert np.isclose(calibrated.centre, logit(REFERENCE["risk"]).mean())


@pytest.mark.parametrize(("log_odds", "chart"), [(np.log(2.2), "up"), (-np.log(2.2), "down")])
def test_failures_are_detected_named_and_dated(calibrated, log_odds, chart):
    for seed in range(3):
        before = outcomes(LATER[:500], seed)
        after = outcomes(LATER[500:1000], seed, log_odds)
        result = watched(calibrated, pd.concat([before, after]))
        row = result[result["chart"] == chart].iloc[0]
        assert 500 <= row["crossed"] < 700 and abs(row["began"] - 500) < 120
        assert row["began"] <= row["crossed"] and row["standing"] == (row["s"] >= row["limit"])


def test_a_model_without_power_and_a_failing_group_are_distinguished(calibrated):
    shuffled = LATER.assign(risk=np.random.default_rng(0).permutation(LATER["risk"]))
    result = watched(calibrated, shuffled)
    assert "slope" in set(result["chart"]) and "up" not in set(result["chart"])
    helped = LATER["er"].to_numpy() > REFERENCE["er"].median()
    frame = outcomes(LATER, 1, np.where(helped, -np.log(4), 0.0))
    first = watched(calibrated, frame).sort_values("crossed").iloc[0]
    assert first["chart"].startswith("less often where er above")


def test_labels_of_the_index_and_the_order_of_groups_play_no_part(calibrated):
    frame = outcomes(LATER, 2, np.log(2))
    named = frame.set_index(frame["record_id"])
    one, other = watched(calibrated, frame), watched(calibrated, named)
    assert other["crossed"].tolist() == frame["record_id"][one["crossed"]].tolist()
    turned = replace(calibrated, groups=calibrated.groups[::-1])
    both = [watched(g, frame).set_index("chart").sort_index() for g in (calibrated, turned)]
    pd.testing.assert_frame_equal(*both)


def test_groups_are_halves_and_levels_that_enough_patients_have():
    result = watched_subgroups(STUDY, REFERENCE)
    for group in result:
        values = REFERENCE[group.feature]
        slow = {"is": values == group.value, "above": values > group.value}
        slow["up to"] = values <= group.value
        assert group.holds(REFERENCE).tolist() == slow[group.rule].tolist()
        assert 0.1 <= group.holds(REFERENCE).mean() <= 0.9
    assert {g.value for g in result if g.feature == "age"} == {REFERENCE["age"].median()}
    rare = REFERENCE.assign(size=np.where(np.arange(1000) < 95, ">50", "<=20"))
    assert not [g for g in watched_subgroups(STUDY, rare) if g.feature == "size"]
    assert [g.value for g in watched_subgroups(STUDY, rare, 0.09) if g.feature == "size"] == [
        "<=20",
        ">50",
    ]


def test_who_lacks_a_value_belongs_to_no_group_of_it():
    gap = pd.Series(np.nan, range(4))
    frame = pd.DataFrame({"age": [40.0, 60.0, np.nan, 50.0], "sex": ["f", None, "m", "f"]})
    frame["sex"] = frame["sex"].astype("str")
    assert Subgroup("age", "above", 50.0).holds(frame).tolist() == [False, True, False, False]
    assert Subgroup("age", "up to", 50.0).holds(frame).tolist() == [True, False, False, True]
    assert Subgroup("sex", "is", "f").holds(frame).tolist() == [True, False, False, True]
    for group in (Subgroup("age", "above", 0.0), Subgroup("age", "up to", 9e9)):
        assert not group.holds(frame.assign(age=gap)).any()
    names = [Subgroup("age", "up to", 50.0).name, Subgroup("sex", "is", "f").name]
    assert names == ["age up to 50", "sex is f"]


@pytest.mark.filterwarnings("error")
def test_features_without_a_value_or_with_one_make_no_groups():
    few = replace(STUDY, features=tuple(STUDY.feature(name) for name in ("age", "er", "size")))
    alike = REFERENCE.assign(age=50.0, er=np.nan, size="<=20")
    own = calibrate_cusum(few, alike, learned_from=10**9, patients=500)
    assert own.groups == () and own.names == list(ALL_PATIENTS_CHARTS)
    paths = run_cusum(own, LATER["y"], LATER["risk"], LATER)
    assert list(paths) == list(ALL_PATIENTS_CHARTS) and np.isfinite(own.limits["groups"])


@pytest.mark.filterwarnings("error")
def test_odd_outcomes_have_an_answer(calibrated):
    no_one = LATER[:0]
    assert watched(calibrated, no_one).empty and len(run_cusum(calibrated, [], [], no_one)) == 0
    for y in (0.0, 1.0):
        assert watched(calibrated, LATER[:3].assign(y=y)).empty
        result = watched(calibrated, LATER.assign(y=y))
        assert result["standing"].iloc[0] and ("up" in set(result["chart"])) == (y == 1)
        assert ("down" in set(result["chart"])) == (y == 0)
    right = LATER.assign(risk=LATER["y"])
    wrong = LATER.assign(risk=1 - LATER["y"])
    for frame in (right, wrong):
        assert np.isfinite(run_cusum(calibrated, frame["y"], frame["risk"], frame)).all(axis=None)
    assert watched(calibrated, right).empty and "slope" in set(watched(calibrated, wrong)["chart"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("risk", [0.0, 1.0, 0.3])
def test_a_model_that_says_the_same_of_everybody_can_be_watched(risk):
    alike = REFERENCE.assign(risk=risk)
    own = calibrate_cusum(STUDY, alike, patients=500)
    assert np.isfinite(list(own.limits.values())).all() and min(own.limits.values()) > 2
    assert watched(own, outcomes(LATER.assign(risk=risk), 3)).empty
    opposite = LATER.assign(risk=risk, y=float(risk < 0.5))
    assert len(watched(own, opposite))


def test_too_few_patients_or_no_budget_are_refused():
    for reference, budget in ((REFERENCE[:49], 0.2), (REFERENCE, 0), (REFERENCE, np.nan)):
        with pytest.raises(LMError, match="need 50 patients"):
            calibrate_cusum(STUDY, reference, budget)

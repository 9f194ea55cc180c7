"""Survival charts against slow loops and statsmodels: no look-ahead, budgets, odd patients."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2
from statsmodels.duration.hazard_regression import PHReg
from statsmodels.duration.survfunc import SurvfuncRight

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.store import Store
from lm.monitor.cusum import ALARM_COLUMNS
from lm.monitor.follow_up import (
    HAZARD_RATIOS,
    HAZARD_STEPS,
    LEAST_FOLLOWED,
    FollowUpCharts,
    calibrate_follow_up,
    follow_up_alarms,
    follow_up_days,
    hazard_shape,
    monthly_events,
    run_follow_up,
)

BEGAN, HORIZON, YEAR = pd.Timestamp("2000-01-01"), 1000, 365.25
LINE = np.linspace(0, 1, HAZARD_STEPS + 1)


def world(seed, years=4.0, change=np.inf, factor=2.0, served=1.0, per_year=300):
    """Patients of six years before `BEGAN` and of some after; hazard times `factor` for the new."""
    rng, n = np.random.default_rng(seed), int((6 + years) * per_year)
    day = np.sort(rng.uniform(-6 * YEAR, years * YEAR, n))
    hazard = rng.gamma(2.0, 0.3, n)
    true = hazard * np.where(day >= change * YEAR, factor, 1)
    died = HORIZON * (rng.exponential(size=n) / true) ** 0.7  # Sparse at first
    lost = np.where(rng.random(n) < 0.15, rng.uniform(0, HORIZON, n), HORIZON)
    arrived = pd.Series(BEGAN + pd.to_timedelta(day, unit="D"))
    event = (arrived + pd.to_timedelta(np.minimum(died, lost), unit="D")).where(died < lost)
    last = event.fillna(arrived + pd.to_timedelta(lost, unit="D"))
    columns = {"arrived": arrived, "risk": -np.expm1(-hazard * served), "event": event}
    table = pd.DataFrame(columns | {"followed_until": last})
    return table[day <= 0], table[day > 0].reset_index(drop=True)


PAST, LATER = world(1)
NOW = pd.Timestamp("2003-05-17 13:00")
SQUARE = LINE**2


@pytest.fixture(scope="module")
def charts():
    return calibrate_follow_up(PAST, HORIZON, BEGAN, 0.1)


def slow_months(patients, shape, horizon, as_of):
    """Day by day and patient by patient, as the method is defined in words."""
    first, results = patients["arrived"].min().to_period("M").start_time, []
    while first + pd.offsets.MonthBegin(1) <= as_of:
        after, observed, expected = first + pd.offsets.MonthBegin(1), 0, 0.0
        for p in patients.itertuples():
            if p.arrived > as_of or np.isnan(p.risk):
                continue
            end = min(p.followed_until, as_of, p.arrived + pd.Timedelta(days=horizon))
            if p.event <= min(as_of, p.arrived + pd.Timedelta(days=horizon)):
                end, observed = p.event, observed + (first <= p.event < after)
            share = [
                np.interp((min(t, end) - p.arrived) / pd.Timedelta(days=horizon), LINE, shape)
                for t in (max(first, p.arrived), max(after, p.arrived))
            ]
            if end > max(first, p.arrived):
                expected += -np.log(1 - min(p.risk, 1 - 1e-6)) * (share[1] - share[0])
        results.append((first, observed, expected))
        first = after
    return pd.DataFrame(results, columns=["month", "observed", "expected"])


@pytest.mark.parametrize("shape", [LINE, SQUARE], ids=["line", "square"])
@pytest.mark.parametrize("horizon", [28, 200, HORIZON])
def test_months_are_those_of_a_loop(shape, horizon):
    some = LATER[::9].copy()
    some.loc[some.index[3], "risk"] = np.nan
    result = monthly_events(some, shape, horizon, NOW)
    slow = slow_months(some, shape, horizon, NOW)
    assert result["month"].tolist() == slow["month"].tolist()
    assert result["observed"].tolist() == slow["observed"].tolist()
    assert np.allclose(result["expected"], slow["expected"])
    assert result["month"].iloc[-1] == pd.Timestamp("2003-04-01")


def test_run_is_that_of_a_loop(charts):
    table = run_follow_up(charts, LATER, NOW)
    for name, rho in HAZARD_RATIOS.items():
        s = 0.0
        for month in table.itertuples(index=False):
            s = max(0.0, s + month[1] * np.log(rho) - (rho - 1) * month[2])
            assert np.isclose(s, month[list(table).index(name)])


@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_is_that_of_statsmodels(tied):
    days, happened = follow_up_days(PAST, HORIZON, BEGAN)
    days = np.ceil(days / 50) * 50 if tied else days
    grid = np.linspace(0, HORIZON, HAZARD_STEPS + 1)
    function = SurvfuncRight(days, happened)
    total = np.cumsum(function.n_events / function.n_risk)
    steps = np.r_[0, total][np.searchsorted(function.surv_times, grid, side="right")]
    assert np.allclose(hazard_shape(days, happened, HORIZON), steps / steps[-1])


def test_the_shape_with_risks_is_breslows_of_statsmodels():
    days, happened = follow_up_days(PAST, HORIZON, BEGAN)
    hazard = -np.log1p(-PAST["risk"].to_numpy())
    result = hazard_shape(days, happened, HORIZON, np.maximum(hazard, 0.01))
    model = PHReg(days, np.log(np.maximum(hazard, 0.01)), happened, ties="breslow")
    times, total, _ = model.baseline_cumulative_hazard(np.array([1.0]))[0]
    at = np.searchsorted(times, np.linspace(0, HORIZON, HAZARD_STEPS + 1), side="right") - 1
    steps = np.where(at < 0, 0, total[np.maximum(at, 0)])
    assert np.allclose(result, steps / steps[-1], atol=0.01)


def test_the_shape_finds_the_truth_whatever_the_risks():
    _, many = world(2, years=60)
    result = follow_up_days(many, HORIZON, pd.Timestamp("2100-01-01"))
    shape = hazard_shape(*result, HORIZON, -np.log1p(-many["risk"].to_numpy()))
    assert np.abs(shape - LINE ** (1 / 0.7)).max() < 0.015


def test_the_shape_rises_from_0_to_1_and_knows_neither_order_nor_unit():
    days, happened = follow_up_days(PAST, HORIZON, BEGAN)
    hazard = np.random.default_rng(0).gamma(1.0, 1.0, len(days))
    shape = hazard_shape(days, happened, HORIZON, hazard)
    assert shape[0] == 0 and shape[-1] == 1 and (np.diff(shape) >= 0).all()
    order = np.random.default_rng(1).permutation(len(days))
    mixed = hazard_shape(days[order], happened[order], HORIZON, hazard[order])
    assert np.allclose(mixed, shape)
    assert np.allclose(hazard_shape(days * 24, happened, HORIZON * 24, hazard * 3), shape)


def test_beyond_the_follow_up_the_shape_goes_on_as_it_was_on_average():
    rng = np.random.default_rng(0)
    wait, stop = rng.exponential(size=5000) * 1000, np.full(5000, 400.0)
    shape = hazard_shape(np.minimum(wait, stop), wait < stop, 1000)
    assert np.abs(shape - LINE).max() < 0.03


@pytest.mark.parametrize(
    "days, happened",
    [
        ([], []),
        ([5.0], [True]),
        ([5.0] * (LEAST_FOLLOWED - 1), [True] * (LEAST_FOLLOWED - 1)),
        ([100.0] * 50, [False] * 50),
        ([0.0] * 50, [False] * 50),
    ],
)
def test_without_events_or_patients_the_shape_is_a_straight_line(days, happened):
    assert np.allclose(hazard_shape(np.array(days), np.array(happened, bool), 100), LINE)


def test_events_on_the_first_day_give_a_shape_too():
    shape = hazard_shape(np.zeros(50), np.ones(50, bool), 100, np.zeros(50))
    assert shape[0] == 0 and shape[-1] == 1 and np.isfinite(shape).all()


def test_follow_up_by_hand():
    table = pd.DataFrame({"arrived": pd.to_datetime(["2020-01-01"] * 6)})
    table["event"] = pd.to_datetime([None, "2020-01-11", "2020-03-01", "2020-02-01", None, None])
    last = ["2020-01-21", "2020-01-11", "2020-03-01", "2020-02-01", "2019-12-01", None]
    table["followed_until"] = pd.to_datetime(last)
    days, happened = follow_up_days(table, 40, pd.Timestamp("2020-01-26"))
    assert days.tolist() == [20, 10, 25, 25, 0, 0]
    assert happened.tolist() == [False, True, False, False, False, False]
    days, happened = follow_up_days(table, 40, pd.Timestamp("2021-01-01"))
    assert days.tolist() == [20, 10, 40, 31, 0, 0]
    assert happened.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("as_of", ["2000-01-20", "2000-02-01", "2001-07-15", "2003-05-17"])
def test_nothing_uses_the_future(charts, as_of):
    as_of = pd.Timestamp(as_of)
    known = LATER[LATER["arrived"] <= as_of].copy()
    known["event"] = known["event"].where(known["event"] <= as_of)
    known["followed_until"] = known["followed_until"].clip(upper=as_of)  # As the store says
    then = run_follow_up(charts, known, as_of)
    pd.testing.assert_frame_equal(then, run_follow_up(charts, LATER, as_of))
    later = run_follow_up(charts, LATER, pd.Timestamp("2005-01-01"))
    pd.testing.assert_frame_equal(then, later[: len(then)])
    assert (then["month"] + pd.offsets.MonthBegin(1) <= as_of).all()


def test_charts_know_nothing_of_what_came_after_they_began(charts):
    future = PAST["event"] > BEGAN
    changed = PAST.assign(event=PAST["event"].where(~future))
    changed["followed_until"] = PAST["followed_until"].clip(upper=BEGAN)
    assert calibrate_follow_up(changed, HORIZON, BEGAN, 0.1) == charts


def test_order_and_index_do_not_matter(charts):
    mixed = LATER.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(
        run_follow_up(charts, mixed, NOW), run_follow_up(charts, LATER, NOW)
    )
    unserved = LATER[:50].assign(risk=np.nan)
    both = pd.concat([LATER, unserved], ignore_index=True)
    pd.testing.assert_frame_equal(
        run_follow_up(charts, both, NOW), run_follow_up(charts, LATER, NOW)
    )


def test_observed_and_expected_agree_where_the_model_is_right():
    _, many = world(4, years=40)
    shape = LINE ** (1 / 0.7)
    table = monthly_events(many, shape, HORIZON, pd.Timestamp("2040-01-01"))
    z = (table["observed"].sum() - table["expected"].sum()) / np.sqrt(table["expected"].sum())
    assert abs(z) < 3
    ratio = (table["observed"] - table["expected"]) ** 2 / table["expected"]
    assert chi2.ppf(0.001, len(table)) < ratio.sum() < chi2.ppf(0.999, len(table))  # Poisson


def test_the_limit_holds_for_poisson_events_that_are_simulated_separately():
    flat = PAST.assign(risk=0.4, event=pd.NaT, followed_until=pd.NaT)  # A straight line, exactly
    budget, rate, rng = 0.5, len(PAST) / 72, np.random.default_rng(9)
    limits = calibrate_follow_up(flat, HORIZON, BEGAN, budget, streams=4000).limits
    months, count, seen = int(np.clip(3000 / rate, 30, 120)), 0, 0.0
    for _ in range(1500):
        age = np.minimum((np.arange(months) + 0.5) * 30.4375, HORIZON)
        expected = rate * (1 - 0.6 ** (age / HORIZON))
        s, alarmed = dict.fromkeys(HAZARD_RATIOS, 0.0), months
        for month, d in enumerate(rng.poisson(expected)):
            for name, rho in HAZARD_RATIOS.items():
                s[name] = max(0.0, s[name] + d * np.log(rho) - (rho - 1) * expected[month])
            if any(s[name] >= limits[name] for name in s):
                alarmed = month + 1
                count += 1
                break
        seen += alarmed * rate
    low, high = chi2.ppf([0.005, 0.995], [2 * count, 2 * count + 2]) / 2 / seen * 1000
    assert low < 1.1 * budget and high > 0.8 * budget  # The charts overlap a little


def test_limits_grow_with_the_logarithm_of_the_budget():
    budgets = (1.0, 0.1, 0.02, 0.005)
    limits = pd.DataFrame([calibrate_follow_up(PAST, HORIZON, BEGAN, b).limits for b in budgets])
    steps = limits.diff().dropna() / -np.diff(np.log(budgets))[:, None]
    assert ((steps > 0.7) & (steps < 3)).all(axis=None)


def test_truths_raise_the_limits(charts):
    odds = np.log(np.expm1(-np.log1p(-PAST["risk"].to_numpy())))
    same = calibrate_follow_up(PAST, HORIZON, BEGAN, 0.1, np.tile(odds, (20, 1)))
    assert all(np.isclose(same.limits[c], charts.limits[c], atol=0.4) for c in HAZARD_RATIOS)
    drawn = np.random.default_rng(0).normal(0, 0.2, (200, 1))
    unsure = calibrate_follow_up(PAST, HORIZON, BEGAN, 0.1, odds + drawn)
    assert all(unsure.limits[c] > charts.limits[c] + 1 for c in HAZARD_RATIOS)


def test_the_same_seed_gives_the_same_charts(charts):
    assert calibrate_follow_up(PAST, HORIZON, BEGAN, 0.1) == charts
    assert calibrate_follow_up(PAST, HORIZON, BEGAN, 0.1, seed=1) != charts
    mixed = PAST.sample(frac=1, random_state=0)
    assert np.allclose(calibrate_follow_up(mixed, HORIZON, BEGAN, 0.1).shape, charts.shape)


def test_json_brings_the_charts_back(charts):
    back = FollowUpCharts(**json.loads(json.dumps(asdict(charts))))
    assert back == charts
    pd.testing.assert_frame_equal(
        run_follow_up(back, LATER, NOW), run_follow_up(charts, LATER, NOW)
    )


@pytest.mark.parametrize("factor, chart", [(2.0, "early up"), (0.4, "early down")])
def test_a_change_is_detected_dated_and_stands(charts, factor, chart):
    _, changed = world(5, years=5, change=1, factor=factor)
    result = follow_up_alarms(charts, run_follow_up(charts, changed, pd.Timestamp("2004-12-31")))
    assert result["chart"].tolist()[0] == chart and result["standing"].iloc[0]
    assert result["crossed"].iloc[0] < pd.Timestamp("2003-06-01")  # Before anybody new has matured
    assert pd.Timestamp("2000-07-01") < result["began"].iloc[0] < result["crossed"].iloc[0]


def test_an_alarm_is_known_when_it_is_stated_to_have_crossed(charts):
    _, changed = world(5, years=5, change=1)
    crossed = follow_up_alarms(charts, run_follow_up(charts, changed, NOW))["crossed"].iloc[0]
    assert len(follow_up_alarms(charts, run_follow_up(charts, changed, crossed))) == 1
    assert follow_up_alarms(
        charts, run_follow_up(charts, changed, crossed - pd.Timedelta(days=1))
    ).empty


def test_alarms_by_hand():
    charts = FollowUpCharts(100, LINE, {"early up": 3.0, "early down": 2.0}, 0.1)
    month = pd.date_range("2020-01-01", periods=6, freq="MS")
    up, down = [0, 1, 0, 2, 3, 2.5], [1, 2, 3, 0, 2, 9]
    table = pd.DataFrame({"month": month, "early up": up, "early down": down})
    result = follow_up_alarms(charts, table)
    assert list(result) == ALARM_COLUMNS
    assert result.to_numpy().tolist() == [
        ["early down", 9, 2.0, pd.Timestamp("2020-03-01"), pd.Timestamp("2020-01-01"), True],
        ["early up", 2.5, 3.0, pd.Timestamp("2020-06-01"), pd.Timestamp("2020-04-01"), False],
    ]
    assert (
        list(follow_up_alarms(charts, table[:0])) == ALARM_COLUMNS
        and follow_up_alarms(charts, table[:1]).empty
    )


ODD = {
    "no patient": LATER[:0],
    "three": LATER[:3],
    "no events": LATER.assign(event=pd.NaT),
    "never any date": LATER.assign(event=None, followed_until=pd.NaT),
    "lost at once": LATER.assign(event=pd.NaT, followed_until=LATER["arrived"]),
    "dead at once": LATER.assign(event=LATER["arrived"], followed_until=LATER["arrived"]),
    "risk 0": LATER.assign(risk=0.0),
    "risk 1": LATER.assign(risk=1.0),
    "no risk": LATER.assign(risk=np.nan),
    "all in the future": LATER.assign(arrived=LATER["arrived"] + pd.Timedelta(days=9000)),
}


@pytest.mark.parametrize("who", ODD)
@pytest.mark.parametrize("as_of", ["1999-01-01", "2000-01-02", "2003-05-17"])
def test_odd_patients_get_an_answer(charts, who, as_of):
    table = run_follow_up(charts, ODD[who], pd.Timestamp(as_of))
    assert list(table) == ["month", "observed", "expected", *HAZARD_RATIOS]
    assert np.isfinite(table.drop(columns="month").to_numpy(float)).all()
    assert (table["expected"] >= 0).all() and (table["observed"] >= 0).all()
    assert list(follow_up_alarms(charts, table)) == ALARM_COLUMNS


@pytest.mark.parametrize("who", sorted(ODD.keys() - {"no patient", "three", "no risk"}))
def test_odd_pasts_give_charts(who):
    result = calibrate_follow_up(ODD[who], HORIZON, NOW, 0.1, streams=200)
    assert np.isfinite([*result.shape, *result.limits.values()]).all()
    assert all(limit >= 0.5 for limit in result.limits.values())
    assert result.shape[0] == 0 and result.shape[-1] == 1


def test_a_past_without_dates_has_a_straight_shape():
    result = calibrate_follow_up(PAST[["arrived", "risk"]], HORIZON, BEGAN, 0.1, streams=200)
    assert np.allclose(result.shape, LINE)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"reference": PAST[:49]}, "49 patients"),
        ({"reference": PAST.assign(risk=np.nan)}, "risk"),
        ({"reference": PAST.drop(columns="risk")}, "risk"),
        ({"budget": 0}, "budget of 0"),
        ({"budget": float("nan")}, "budget of nan"),
        ({"horizon_days": 0}, "horizon of 0"),
        ({"truths": np.zeros((3, 5))}, "truths of shape"),
        ({"truths": np.zeros(len(PAST))}, "truths of shape"),
    ],
)
def test_mistakes_are_reported_in_a_sentence(wrong, text):
    inputs = {"reference": PAST, "horizon_days": HORIZON, "began": BEGAN, "budget": 0.1}
    with pytest.raises(LMError, match=text):
        calibrate_follow_up(**inputs | wrong)


@pytest.mark.parametrize("column", ["arrived", "event", "followed_until", "risk"])
def test_months_need_their_columns(charts, column):
    with pytest.raises(LMError, match=column):
        run_follow_up(charts, LATER.drop(columns=column), NOW)


def test_what_the_store_knows_is_enough(tmp_path):
    study = load_study("monica")
    with Store(study, tmp_path) as store:
        known = store.queries.as_of(pd.Timestamp("2000-01-01"))
    charts = FollowUpCharts(study.horizon_days, LINE, dict.fromkeys(HAZARD_RATIOS, 3.0), 0.1)
    assert run_follow_up(charts, known, NOW).empty

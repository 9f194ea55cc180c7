"""Observed and expected by hand, shapes against statsmodels, what limits promise, no look ahead."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from scipy.stats import poisson
from statsmodels.duration.survfunc import SurvfuncRight

from lm.settings import LMError
from lm.survival import (
    GRID,
    HAZARDS,
    MONTH,
    Survival,
    alarms,
    follow_up,
    monthly,
    run,
    shape_of,
    survival,
)

BEGAN, H = pd.Timestamp("2010-01-01"), 1000.0
LINE = np.linspace(0, 1, GRID + 1)


def made(seed=0, n=1200, factor=1.0, years=(-5.0, 5.0)):
    """Patients whose hazard is constant and `factor` times what was foretold; a few are lost."""
    dice = np.random.default_rng(seed)
    day = np.sort(dice.uniform(years[0] * 365, years[1] * 365, n))
    hazard = dice.gamma(2.0, 0.2, n)
    when = dice.exponential(size=n) / (factor * hazard) * H
    lost = np.where(dice.random(n) < 0.1, dice.uniform(0, H, n), H)
    arrived = BEGAN + pd.to_timedelta(day, "D")
    event = arrived + pd.to_timedelta(np.where(when <= lost, when, np.nan), "D")
    until = arrived + pd.to_timedelta(np.minimum(when, lost), "D")
    columns = {"arrived": arrived, "event": event, "followed_until": until}
    return pd.DataFrame({"risk": -np.expm1(-hazard), **columns})


def sides(patients):
    return patients[patients.arrived <= BEGAN], patients[patients.arrived > BEGAN]


@pytest.fixture(scope="module")
def charts():
    return survival(sides(made(99))[0], H, BEGAN, 0.2, streams=100)


def test_shape_is_the_cumulative_hazard_of_statsmodels():
    days, happened = follow_up(made(1), H, pd.Timestamp("2030-01-01"))
    theirs = SurvfuncRight(days, happened.astype(int))
    grid = np.linspace(0, H, GRID + 1)
    at = np.searchsorted(theirs.surv_times, grid, side="right") - 1
    hazard = np.where(at < 0, 0.0, -np.log(theirs.surv_prob[np.maximum(at, 0)]))
    assert np.allclose(shape_of(days, happened, H), hazard / hazard[-1], atol=1e-12)


def test_shape_goes_on_as_on_average_beyond_the_longest_follow_up():
    dice = np.random.default_rng(2)
    when = dice.exponential(2000, 4000)
    shape = shape_of(np.minimum(when, 400.0), when <= 400, H)
    assert np.allclose(shape, LINE, atol=0.03) and shape[0] == 0 and shape[-1] == 1
    assert (np.diff(shape) >= 0).all()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_shape_without_events_is_a_straight_line(n):
    assert np.allclose(shape_of(np.full(n, 50.0), np.zeros(n, bool), H), LINE)


def test_months_are_those_of_a_loop_over_patients_and_days():
    later, as_of = sides(made(3, n=60))[1], pd.Timestamp("2014-06-01")
    table = monthly(later, LINE, H, as_of)
    begin = later.arrived.min().normalize()
    observed, expected = np.zeros(len(table)), np.zeros(len(table))
    for row in later.itertuples():
        start = (row.arrived - begin) / pd.Timedelta(days=1)
        end = min(row.event if pd.notna(row.event) else row.followed_until, as_of)
        stay = min((end - row.arrived) / pd.Timedelta(days=1), H)
        for month in range(len(table)):
            inside = min(start + stay, (month + 1) * MONTH) - max(start, month * MONTH)
            expected[month] += max(inside, 0) / H * -np.log1p(-row.risk)
        if pd.notna(row.event) and row.event <= as_of:
            place = int((start + stay) // MONTH)
            if place < len(table):
                observed[place] += 1
    assert np.array_equal(table.observed, observed) and np.allclose(table.expected, expected)


def test_charts_are_those_of_a_loop(charts):
    table = run(charts, sides(made(4))[1], pd.Timestamp("2014-12-31"))
    for name, rho in HAZARDS.items():
        s = 0.0
        for row in table.to_dict("records"):
            s = max(0.0, s + np.log(rho) * row["observed"] - (rho - 1) * row["expected"])
            assert row[name] == pytest.approx(s, abs=1e-9)
    one, other = poisson.logpmf(7, 2 * 5.0), poisson.logpmf(7, 5.0)
    assert one - other == pytest.approx(np.log(2) * 7 - 5.0)  # The evidence is Poisson's


def test_nothing_looks_ahead_and_order_does_not_matter(charts):
    later, day = sides(made(5))[1], pd.Timestamp("2012-05-05")
    future = later.copy()
    unknown = ~(future.event <= day)
    future.loc[unknown, "event"] = pd.NaT
    future.loc[future.followed_until > day, "followed_until"] = day
    future.loc[future.arrived > day, "risk"] = 0.9
    one, other, mixed = (
        run(charts, f, day) for f in (later, future, later.sample(frac=1, random_state=1))
    )
    pd.testing.assert_frame_equal(one, other)
    pd.testing.assert_frame_equal(one, mixed)


@pytest.mark.parametrize(("factor", "chart"), [(3.0, "early up"), (0.4, "early down")])
def test_a_changed_hazard_is_found_long_before_the_horizon(charts, factor, chart):
    later = sides(made(6, factor=factor))[1]
    for months, found in ((1, []), (26, [chart])):
        as_of = BEGAN + pd.Timedelta(days=months * MONTH + 5)
        table = alarms(charts, run(charts, later[later.arrived <= as_of], as_of))
        assert table.chart.tolist() == found
    row = table.iloc[0]
    assert row.standing and row.began <= row.crossed <= as_of and row.s >= row.limit


def test_the_budget_holds():
    count = seen = 0
    end = pd.Timestamp("2014-12-30")
    for seed in range(40):
        past, later = sides(made(200 + seed))
        own = survival(past, H, BEGAN, 0.5, streams=60, seed=seed)
        found = alarms(own, run(own, later, end))
        count += len(found) > 0
        seen += (later.arrived <= (found.crossed.min() if len(found) else end)).sum()
    low, high = poisson.ppf([0.005, 0.995], 0.5 * seen / 1000)
    assert low <= count <= high


def test_an_uncertain_model_gets_wider_limits_and_a_smaller_budget_higher_ones():
    past = sides(made(7))[0]
    z = np.log(np.expm1(-np.log1p(-past.risk.to_numpy())))
    sure = survival(past, H, BEGAN, 0.2, z[None], streams=80)
    shifts = np.random.default_rng(1).normal(0, 0.4, 80)[:, None]
    unsure = survival(past, H, BEGAN, 0.2, z + shifts, streams=80)
    rare = survival(past, H, BEGAN, 0.002, z[None], streams=80)
    for chart in HAZARDS:
        assert unsure.limits[chart] > sure.limits[chart] + 1
        assert rare.limits[chart] > sure.limits[chart] + 2


def test_charts_survive_json(charts):
    kept = json.loads(json.dumps(asdict(charts)))
    assert Survival(**kept | {"shape": tuple(kept["shape"])}) == charts


def edges(later):
    return {
        "nobody": later[:0],
        "one": later[:1],
        "three": later[:3],
        "no event": later.assign(event=pd.NaT),
        "risk 0": later.assign(risk=0.0),
        "risk 1": later.assign(risk=1.0),
        "not predicted": later.assign(risk=np.nan),
        "lost at once": later.assign(followed_until=later.arrived, event=pd.NaT),
        "event at arrival": later.assign(event=later.arrived, followed_until=later.arrived),
        "follow-up not known": later.assign(followed_until=pd.NaT, event=pd.NaT),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", edges(made()))
def test_edges_have_an_answer_without_nan(charts, name):
    table = run(charts, edges(sides(made(8))[1])[name], pd.Timestamp("2013-01-01"))
    assert table.notna().all(axis=None)
    found = alarms(charts, table)
    assert found.notna().all(axis=None)
    silent = {"nobody", "one", "three", "not predicted", "lost at once", "follow-up not known"}
    assert not (name in silent and len(found))


@pytest.mark.parametrize(("n", "budget"), [(49, 0.1), (600, 0.0), (600, np.nan)])
def test_too_few_patients_or_no_budget_are_refused(n, budget):
    with pytest.raises(LMError, match="need 50 patients to begin from and a budget above 0"):
        survival(sides(made(9))[0][:n], H, BEGAN, budget)

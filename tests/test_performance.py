"""Every measure against an implementation that is not ours, and the cases without an answer."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from lm.performance import (
    MEASURES,
    Interval,
    auroc,
    brier,
    by_period,
    by_subgroup,
    calibration,
    compare,
    oe,
    performance,
)
from lm.settings import LMError
from lm.study import load_study


def sample(seed, n=400, shift=0.0, digits=None):
    """Outcomes and risks; rounded risks have ties."""
    dice = np.random.default_rng(seed)
    z = dice.normal(-1, 1, n)
    y = (dice.random(n) < expit(z)).astype(float)
    risk = expit(z + shift + dice.normal(0, 0.5, n))
    return y, risk if digits is None else risk.round(digits)


SAMPLES = [sample(0), sample(1, 60), sample(2, 300, 0.8), sample(3, 200, digits=1)]


@pytest.mark.parametrize(("y", "risk"), SAMPLES)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_oe_is_wilson_over_the_mean_risk(y, risk, level):
    low, high = proportion_confint(y.sum(), len(y), alpha=1 - level, method="wilson")
    expected = np.array([y.mean(), low, high]) / risk.mean()
    assert np.allclose(oe(y, risk, level), expected, atol=1e-12)


@pytest.mark.parametrize("y", [np.zeros(30), np.ones(30)])
def test_oe_stands_with_no_event_and_with_all(y):
    low, high = proportion_confint(y.sum(), 30, method="wilson")
    found = oe(y, np.full(30, 0.2))
    assert np.allclose(found, np.array([y.mean(), low, high]) / 0.2, atol=1e-12)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(("y", "risk"), SAMPLES)
def test_brier_is_that_of_scikit_learn_with_the_interval_of_a_mean(y, risk):
    found = brier(y, risk)
    assert np.isclose(found.value, brier_score_loss(y, risk))
    mean = sm.stats.DescrStatsW((risk - y) ** 2).zconfint_mean()
    assert np.allclose(found[1:], mean)


def test_compare_is_the_paired_interval():
    y, risk = sample(4)
    other = np.clip(risk * 1.3, 0, 1)
    difference = (risk - y) ** 2 - (other - y) ** 2
    found = compare(y, risk, other)
    assert np.allclose(found[1:], sm.stats.DescrStatsW(difference).zconfint_mean())
    assert np.allclose(found, -np.array(compare(y, other, risk))[[0, 2, 1]])
    apart = brier(y, risk).high - brier(y, risk).low
    assert found.high - found.low < apart


def brute_delong(y, risk):
    """Area and its variance from all pairs, as DeLong wrote them: no ranks."""
    sick, well = risk[y == 1], risk[y == 0]
    pairs = (sick[:, None] > well) + 0.5 * (sick[:, None] == well)
    of_sick, of_well = pairs.mean(axis=1), pairs.mean(axis=0)
    variance = of_sick.var(ddof=1) / len(sick) + of_well.var(ddof=1) / len(well)
    return pairs.mean(), variance


@pytest.mark.parametrize(("y", "risk"), SAMPLES)
def test_auroc_is_that_of_all_pairs(y, risk):
    found, (area, variance) = auroc(y, risk), brute_delong(y, risk)
    assert np.isclose(found.value, area, atol=1e-12)
    assert np.isclose(found.value, roc_auc_score(y, risk), atol=1e-12)
    width = logit(found.high) - logit(found.low)
    error = width / (2 * 1.959963984540054) * area * (1 - area)
    assert np.isclose(error, np.sqrt(variance), atol=1e-12)
    assert 0 < found.low < found.value < found.high < 1


def test_delongs_error_is_that_of_a_bootstrap():
    y, risk = sample(5, 300)
    dice = np.random.default_rng(0)
    draws = dice.integers(0, 300, (800, 300))
    spread = np.std([brute_delong(y[d], risk[d])[0] for d in draws])
    assert np.isclose(np.sqrt(brute_delong(y, risk)[1]), spread, rtol=0.1)


@pytest.mark.parametrize("risk", [[0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1]])
def test_auroc_of_full_separation_has_an_interval_inside_0_and_1(risk):
    found = auroc([0, 0, 1, 1], risk)
    assert found.value in (0, 1) and 0 <= found.low < found.high <= 1


def test_auroc_does_not_change_with_the_scale_and_mirrors():
    y, risk = sample(6)
    assert auroc(y, risk**3) == auroc(y, risk)
    mirrored = auroc(1 - y, risk)
    assert np.allclose(mirrored, 1 - np.array(auroc(y, risk))[[0, 2, 1]])


@pytest.mark.parametrize(("y", "risk"), SAMPLES[:3])
def test_calibration_line_is_that_of_statsmodels(y, risk):
    found = calibration(y, risk)
    line = sm.Logit(y, sm.add_constant(logit(risk))).fit(disp=0)
    ends = line.conf_int()
    assert np.allclose(found["intercept"], [line.params[0], *ends[0]], atol=1e-6)
    assert np.allclose(found["slope"], [line.params[1], *ends[1]], atol=1e-6)


def test_calibration_line_is_that_of_scikit_learn():
    y, risk = sample(7)
    line = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(risk)[:, None], y)
    found = calibration(y, risk)
    assert np.isclose(found["slope"].value, line.coef_[0, 0], atol=1e-4)
    assert np.isclose(found["intercept"].value, line.intercept_[0], atol=1e-4)


def test_calibration_undoes_a_known_distortion():
    y, risk = sample(8, 2000)
    before = calibration(y, risk)
    after = calibration(y, expit(0.7 + 2 * logit(risk)))
    slope = before["slope"].value / 2
    assert np.isclose(after["slope"].value, slope, atol=1e-6)
    assert np.isclose(after["intercept"].value, before["intercept"].value - 0.7 * slope, atol=1e-6)


UNANSWERABLE = {
    "nobody": ([], []),
    "one patient": ([1.0], [0.3]),
    "three patients": ([0, 1, 0], [0.2, 0.4, 0.3]),
    "no event": ([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]),
    "only events": ([1, 1, 1, 1], [0.1, 0.2, 0.3, 0.4]),
    "one risk for all": ([0, 1, 0, 1], [0.3] * 4),
    "risks of 0 and 1": ([0, 1, 0, 1], [0.0, 1.0, 1.0, 0.0]),
    "risk 0 for all": ([0, 1, 0, 0], [0.0] * 4),
    "separated": ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", UNANSWERABLE)
def test_an_answer_or_none_but_never_a_crash_or_half_an_answer(name):
    y, risk = (np.array(v, float) for v in UNANSWERABLE[name])
    found = performance(y, risk)
    assert (found["patients"], found["events"]) == (len(y), y.sum())
    for measure in MEASURES:
        value, low, high = found[measure]
        ordered = low <= value <= high
        assert ordered or np.isnan([low, high]).all(), (measure, found[measure])
        assert np.isfinite(found[measure]).all() or np.isnan([low, high]).all()
    assert np.isnan(found["auroc"].value) == (len(set(y)) < 2)


@pytest.mark.parametrize(
    ("y", "risk"),
    [
        ([0, np.nan], [0.1, 0.2]),
        ([0, 1], [0.1, np.nan]),
        ([0, 2], [0.1, 0.2]),
        ([0, 1], [0.1, 1.1]),
    ],
)
def test_what_is_no_outcome_or_no_risk_is_refused_in_one_sentence(y, risk):
    for measure in (oe, brier, auroc, calibration, performance):
        with pytest.raises(LMError, match="outcomes must be 0 or 1 and risks between 0 and 1"):
            measure(y, risk)
    with pytest.raises(LMError, match="do not belong together"):
        oe([0, 1, 1], [0.1, 0.2])


def frame(n=600):
    y, risk = sample(9, n)
    arrived = pd.Timestamp("1987-01-01") + pd.to_timedelta(np.arange(n), "D")
    table = pd.DataFrame({"arrived": arrived, "y": y, "risk": risk})
    table["sex"] = np.where(np.arange(n) % 3 == 0, "f", "m")
    table.loc[::7, "y"] = np.nan
    table.loc[1::11, "risk"] = np.nan
    return table


def test_periods_hold_exactly_the_patients_who_can_be_counted():
    table = frame()
    known = table.dropna()
    years = by_period(load_study("monica"), table, total=True).set_index("period")
    assert list(years.index) == ["1987", "1988", "all"]
    for name, group in [("1987", known[known.arrived < "1988"]), ("all", known)]:
        assert years.loc[name, "patients"] == len(group)
        assert years.loc[name, "events"] == group.y.sum()
        for measure, function in (("oe", oe), ("brier", brier), ("auroc", auroc)):
            row = years.loc[name, [measure, f"{measure}_low", f"{measure}_high"]]
            assert np.allclose(row.astype(float), function(group.y, group.risk))


def test_periods_of_nobody_are_a_table_with_the_same_columns():
    study, table = load_study("monica"), frame()
    empty = by_period(study, table[:0], total=True)
    assert empty.empty and list(empty) == list(by_period(study, table))
    unknown = by_period(study, table.assign(y=np.nan))
    assert unknown.empty


def test_subgroups_share_out_all_patients_and_missing_is_one_of_them():
    table = frame()
    table.loc[5:40, "sex"] = np.nan
    groups = by_subgroup(table, "sex").set_index("sex")
    known = table.dropna(subset=["y", "risk"])
    assert set(groups.index) == {"f", "m", "not known"}
    assert groups.patients.sum() == len(known) and groups.events.sum() == known.y.sum()
    men = known[known.sex == "m"]
    assert np.isclose(groups.loc["m", "auroc"], roc_auc_score(men.y, men.risk))


def test_text_is_for_people():
    assert Interval(0.784, 0.71, 0.86).text() == "0.78 (0.71 to 0.86)"
    assert Interval(np.nan, np.nan, np.nan).text() == "-"

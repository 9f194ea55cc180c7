"""Every measure against an implementation that is not ours, and the cases without an answer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve as curve_of_scikit_learn
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, confusion_matrix, roc_auc_score
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.proportion import proportion_confint

from lm.core.errors import LMError
from lm.core.labels import label_outcomes
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.model.metrics import (
    CURVE,
    MEASURES,
    Interval,
    auroc,
    brier,
    by_period,
    by_subgroup,
    by_subgroups,
    calibration,
    calibration_curve,
    censoring_weights,
    compare,
    decision_curve,
    follow_up,
    net_benefit,
    oe,
    performance,
    weighted_performance,
)
from lm.model.predict import fit


def sample(seed, n=400, shift=0.0, digits=None):
    """Outcomes and risks; rounded risks have ties."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1, n)
    y = (rng.random(n) < expit(z)).astype(float)
    risk = expit(z + shift + rng.normal(0, 0.5, n))
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
    result = oe(y, np.full(30, 0.2))
    assert np.allclose(result, np.array([y.mean(), low, high]) / 0.2, atol=1e-12)
    assert result.low <= result.value <= result.high


@pytest.mark.parametrize(("y", "risk"), SAMPLES)
def test_brier_is_that_of_scikit_learn_with_the_interval_of_a_mean(y, risk):
    result = brier(y, risk)
    assert np.isclose(result.value, brier_score_loss(y, risk))
    mean = sm.stats.DescrStatsW((risk - y) ** 2).zconfint_mean()
    assert np.allclose(result[1:], mean)


def test_compare_is_the_paired_interval():
    y, risk = sample(4)
    other = np.clip(risk * 1.3, 0, 1)
    difference = (risk - y) ** 2 - (other - y) ** 2
    result = compare(y, risk, other)
    assert np.allclose(result[1:], sm.stats.DescrStatsW(difference).zconfint_mean())
    assert np.allclose(result, -np.array(compare(y, other, risk))[[0, 2, 1]])
    distant = brier(y, risk).high - brier(y, risk).low
    assert result.high - result.low < distant


def brute_delong(y, risk):
    """Area and its variance from all pairs, as DeLong wrote them: no ranks."""
    sick, well = risk[y == 1], risk[y == 0]
    pairs = (sick[:, None] > well) + 0.5 * (sick[:, None] == well)
    of_sick, of_well = pairs.mean(axis=1), pairs.mean(axis=0)
    variance = of_sick.var(ddof=1) / len(sick) + of_well.var(ddof=1) / len(well)
    return pairs.mean(), variance


@pytest.mark.parametrize(("y", "risk"), SAMPLES)
def test_auroc_is_that_of_all_pairs(y, risk):
    result, (area, variance) = auroc(y, risk), brute_delong(y, risk)
    assert np.isclose(result.value, area, atol=1e-12)
    assert np.isclose(result.value, roc_auc_score(y, risk), atol=1e-12)
    width = logit(result.high) - logit(result.low)
    error = width / (2 * 1.959963984540054) * area * (1 - area)
    assert np.isclose(error, np.sqrt(variance), atol=1e-12)
    assert 0 < result.low < result.value < result.high < 1


def test_delongs_error_is_that_of_a_bootstrap():
    y, risk = sample(5, 300)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 300, (800, 300))
    spread = np.std([brute_delong(y[d], risk[d])[0] for d in draws])
    assert np.isclose(np.sqrt(brute_delong(y, risk)[1]), spread, rtol=0.1)


@pytest.mark.parametrize("risk", [[0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1]])
def test_auroc_of_full_separation_has_an_interval_inside_0_and_1(risk):
    result = auroc([0, 0, 1, 1], risk)
    assert result.value in (0, 1) and 0 <= result.low < result.high <= 1


def test_auroc_does_not_change_with_the_scale_and_mirrors():
    y, risk = sample(6)
    assert auroc(y, risk**3) == auroc(y, risk)
    mirrored = auroc(1 - y, risk)
    assert np.allclose(mirrored, 1 - np.array(auroc(y, risk))[[0, 2, 1]])


@pytest.mark.parametrize(("y", "risk"), SAMPLES[:3])
def test_calibration_line_is_that_of_statsmodels(y, risk):
    result = calibration(y, risk)
    line = sm.Logit(y, sm.add_constant(logit(risk))).fit(disp=0)
    ends = line.conf_int()
    assert np.allclose(result["intercept"], [line.params[0], *ends[0]], atol=1e-6)
    assert np.allclose(result["slope"], [line.params[1], *ends[1]], atol=1e-6)


def test_calibration_line_is_that_of_scikit_learn():
    y, risk = sample(7)
    line = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(risk)[:, None], y)
    result = calibration(y, risk)
    assert np.isclose(result["slope"].value, line.coef_[0, 0], atol=1e-4)
    assert np.isclose(result["intercept"].value, line.intercept_[0], atol=1e-4)


def test_calibration_undoes_a_known_distortion():
    y, risk = sample(8, 2000)
    before = calibration(y, risk)
    after = calibration(y, expit(0.7 + 2 * logit(risk)))
    slope = before["slope"].value / 2
    assert np.isclose(after["slope"].value, slope, atol=1e-6)
    assert np.isclose(after["intercept"].value, before["intercept"].value - 0.7 * slope, atol=1e-6)


UNANSWERABLE = {
    "no patient": ([], []),
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
    result = performance(y, risk)
    assert (result["patients"], result["events"]) == (len(y), y.sum())
    for measure in MEASURES:
        value, low, high = result[measure]
        ordered = low <= value <= high
        assert ordered or np.isnan([low, high]).all(), (measure, result[measure])
        assert np.isfinite(result[measure]).all() or np.isnan([low, high]).all()
    assert np.isnan(result["auroc"].value) == (len(set(y)) < 2)


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


def test_periods_of_no_patients_are_a_table_with_the_same_columns():
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


WHOLE = np.random.default_rng(20).integers(1, 5, 400).astype(float)


def uneven(seed, n=400):
    """Weights that are no whole numbers, a tenth of them 0."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2, 4, n) * (rng.random(n) > 0.1)


def test_a_weight_is_so_many_patients_for_every_value():
    y, risk = sample(10, digits=2)
    many = WHOLE.astype(int)
    heavy = performance(y, risk, weights=WHOLE, thresholds=(0.2,))
    long = performance(np.repeat(y, many), np.repeat(risk, many), thresholds=(0.2,))
    for name in (*MEASURES, "nb_0.2"):
        assert np.isclose(heavy[name].value, long[name].value, atol=1e-8), name
        assert heavy[name].high - heavy[name].low > long[name].high - long[name].low, name
    assert (heavy["patients"], heavy["events"]) == (400, y.sum())


def test_weights_of_0_leave_out_and_only_proportions_count():
    y, risk = sample(11)
    weights = uneven(11)
    stored = weights > 0
    result = performance(y, risk, weights=weights, thresholds=(0.3,))
    alone = performance(y[stored], risk[stored], weights=weights[stored] * 17, thresholds=(0.3,))
    unknown = performance(np.where(stored, y, np.nan), risk, weights=weights, thresholds=(0.3,))
    for other in (alone, unknown):
        assert list(other) == list(result) and other["patients"] == stored.sum()
        assert np.allclose(np.hstack(list(other.values())), np.hstack(list(result.values())))
    equal = performance(y, risk, weights=np.full(400, 3.0), thresholds=(0.3,))
    plain = performance(y, risk, thresholds=(0.3,))
    assert np.allclose(np.hstack(list(equal.values())), np.hstack(list(plain.values())))


@pytest.mark.parametrize("digits", [None, 1])
def test_weighted_brier_and_auroc_are_those_of_scikit_learn(digits):
    y, risk = sample(12, digits=digits)
    weights = uneven(12)
    expected = brier_score_loss(y, risk, sample_weight=weights)
    assert np.isclose(brier(y, risk, weights=weights).value, expected)
    expected = roc_auc_score(y, risk, sample_weight=weights)
    assert np.isclose(auroc(y, risk, weights=weights).value, expected)


def test_weighted_line_is_that_of_statsmodels_with_the_sandwich():
    y, risk = sample(13)
    weights = uneven(13)
    stored = weights > 0
    design = sm.add_constant(logit(risk[stored]))
    model = sm.GLM(y[stored], design, sm.families.Binomial(), freq_weights=weights[stored])
    values = model.fit(tol=1e-12).params
    # HC0 by hand from the pieces: `freq_weights` would count a weight of 2 as two patients
    fitted = model.family.fitted(design @ values)
    bread = np.linalg.inv(
        np.einsum("i,ij,ik", weights[stored] * fitted * (1 - fitted), design, design)
    )
    pulls = design * (weights[stored] * (y[stored] - fitted))[:, None]
    reach = 1.959963984540054 * np.sqrt(np.diag(bread @ pulls.T @ pulls @ bread))
    result = calibration(y, risk, weights=weights)
    for name, value, way in zip(("intercept", "slope"), values, reach, strict=True):
        assert np.allclose(result[name], [value, value - way, value + way], atol=1e-6)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_weighted_oe_is_wilson_for_the_variance_that_statsmodels_gives(level):
    y, risk = sample(13)
    weights = uneven(13)
    mean = sm.WLS(y, np.ones(len(y)), weights=weights).fit(cov_type="HC0")
    share, variance = mean.params[0], mean.bse[0] ** 2
    worth = share * (1 - share) / variance
    ends = proportion_confint(share * worth, worth, alpha=1 - level, method="wilson")
    expected = np.array([share, *ends]) / np.average(risk, weights=weights)
    assert np.allclose(oe(y, risk, level, weights), expected) and worth < 0.9 * (weights > 0).sum()


def test_weighted_intervals_are_as_wide_as_a_bootstrap_says():
    y, risk = sample(14)
    weights = uneven(14)
    result = performance(y, risk, weights=weights, thresholds=(0.2,))
    rng, drawn = np.random.default_rng(1), {name: [] for name in (*MEASURES, "nb_0.2")}
    for _ in range(300):
        who = rng.integers(0, 400, 400)
        again = performance(y[who], risk[who], weights=weights[who], thresholds=(0.2,))
        for name, values in drawn.items():
            values.append(again[name].value)
    for name in ("brier", "auroc", "intercept", "slope", "nb_0.2"):
        error = (result[name].high - result[name].low) / (2 * 1.96)
        assert np.isclose(error, np.std(drawn[name]), rtol=0.2), name
    events = np.std(
        [np.average(y[w], weights=weights[w]) for w in rng.integers(0, 400, (500, 400))]
    )
    width = (result["oe"].high - result["oe"].low) * np.average(risk, weights=weights)
    assert np.isclose(width / (2 * 1.96), events, rtol=0.15)


@pytest.mark.parametrize("weights", [[1, -1], [1, np.nan], [1, np.inf], [1], [[1, 1]]])
def test_what_is_no_weight_is_refused_in_one_sentence(weights):
    for measure in (oe, brier, auroc, calibration, calibration_curve, performance):
        with pytest.raises(LMError, match="weights must be finite numbers of at least 0"):
            measure([0, 1], [0.2, 0.3], weights=weights)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", UNANSWERABLE)
@pytest.mark.parametrize("kind", ["all 0", "uneven", "one patient left"])
def test_weights_leave_an_answer_or_none_too(name, kind):
    y, risk = (np.array(v, float) for v in UNANSWERABLE[name])
    weights = {
        "all 0": np.zeros(len(y)),
        "uneven": 1.0 + np.arange(len(y)),
        "one patient left": (np.arange(len(y)) == 0).astype(float),
    }[kind]
    result = performance(y, risk, weights=weights, thresholds=(0.2,))
    assert result["patients"] == (weights > 0).sum()
    for measure in (*MEASURES, "nb_0.2"):
        value, low, high = result[measure]
        assert low <= value <= high or np.isnan([low, high]).all(), (measure, result[measure])
    if kind == "all 0":
        assert all(np.isnan(result[measure]).all() for measure in MEASURES)


@pytest.mark.slow
def test_auroc_of_equal_risks_is_as_wide_as_chance():
    y = np.repeat([0.0, 1.0], [40, 20])
    result = auroc(y, np.full(60, 0.3))
    rng = np.random.default_rng(2)
    by_chance = [roc_auc_score(y, rng.random(60)) for _ in range(2000)]
    low, high = np.quantile(by_chance, [0.025, 0.975])
    assert result.value == 0.5 and np.allclose(result[1:], [low, high], atol=0.02)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.55])
def test_net_benefit_is_that_of_the_confusion_matrix(threshold):
    y, risk = sample(15, digits=2)
    weights = uneven(15)
    for w in (None, weights):
        treated = risk >= threshold
        _, false, _, true = confusion_matrix(y, treated, sample_weight=w).ravel()
        total = len(y) if w is None else w.sum()
        expected = true / total - false / total * threshold / (1 - threshold)
        assert np.isclose(net_benefit(y, risk, threshold, weights=w).value, expected)
    impact = threshold / (1 - threshold)
    gains = np.where(treated, np.where(y == 1, 1, -impact), 0)
    result = net_benefit(y, risk, threshold, 0.9)
    assert np.allclose(result[1:], sm.stats.DescrStatsW(gains).zconfint_mean(alpha=0.1))


def test_decision_curve_has_the_model_between_all_and_none():
    y, risk = sample(16)
    curve = decision_curve(y, risk, [0.01, 0.2, 0.99])
    assert list(curve) == [
        "threshold",
        "model",
        "model_low",
        "model_high",
        "treat_all",
        "treat_none",
    ]
    for row in curve.itertuples():
        everybody = y.mean() - (1 - y.mean()) * row.threshold / (1 - row.threshold)
        assert np.isclose(row.treat_all, everybody) and row.treat_none == 0
        result = net_benefit(y, risk, row.threshold)
        assert (row.model, row.model_low, row.model_high) == result
    assert curve.model.iloc[0] == curve.treat_all.iloc[0] and curve.model.iloc[-1] == 0
    assert decision_curve([], [], [0.2]).model.isna().all() and decision_curve(y, risk, []).empty


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 20, np.nan])
def test_a_threshold_that_is_no_risk_is_refused(threshold):
    with pytest.raises(LMError, match="a threshold must lie between 0 and 1"):
        net_benefit([0, 1], [0.2, 0.3], threshold)


def test_calibration_curve_is_that_of_scikit_learn_with_wilson():
    y, risk = sample(17)
    curve = calibration_curve(y, risk, groups=8, level=0.9)
    observed, mean = curve_of_scikit_learn(y, risk, n_bins=8, strategy="quantile")
    assert np.allclose(curve.observed, observed) and np.allclose(curve.risk, mean)
    assert (curve.patients == 50).all() and curve.events.sum() == y.sum()
    ends = proportion_confint(curve.events, curve.patients, alpha=0.1, method="wilson")
    assert np.allclose(curve[["low", "high"]], np.column_stack(ends))


def test_calibration_curve_never_parts_ties():
    y, risk = sample(18, digits=1)
    curve = calibration_curve(y, risk)
    assert len(curve) < 10 and curve.patients.sum() == len(y) and curve.risk.is_monotonic_increasing
    border, ascending = np.cumsum(curve.patients)[:-1], np.sort(risk)
    assert (ascending[border - 1] < ascending[border]).all()
    order = np.random.default_rng(0).permutation(len(y))
    pd.testing.assert_frame_equal(curve, calibration_curve(y[order], risk[order]))
    assert len(calibration_curve(y, np.full(len(y), 0.3))) == 1


@pytest.mark.parametrize(("y", "risk", "weights"), [([], [], None), ([1, 0], [0.2, 0.3], [0, 0])])
def test_calibration_curve_of_no_patients_is_empty(y, risk, weights):
    curve = calibration_curve(y, risk, weights=weights)
    assert curve.empty and tuple(curve) == CURVE
    with pytest.raises(LMError, match="at least 1 group"):
        calibration_curve(y, risk, groups=0)


HORIZON = 365


def followed(seed, n=300, whole=True):
    """Follow-up that for many ends before the horizon; whole days have ties of every kind."""
    rng = np.random.default_rng(seed)
    risk = expit(rng.normal(-0.5, 1, n))
    onset = np.where(rng.random(n) < risk, rng.uniform(0, HORIZON, n), rng.uniform(HORIZON, 900, n))
    leaves = rng.uniform(0, 600, n)
    onset, leaves = (np.ceil(t / 20) * 20 + 5 if whole else t for t in (onset, leaves))
    return np.minimum(onset, leaves), onset <= leaves, risk


def weights_by_loops(days, event, horizon):
    """1 / probability of still being followed, patient by patient; losses come after events."""
    weights = []
    for d, e in zip(days, event, strict=True):
        if d < horizon and not e:
            weights.append(0.0)
            continue
        until, stays = min(d, horizon), 1.0
        for t in sorted(set(days[(~event) & (days < until)])):
            lost = ((days == t) & ~event).sum()
            stays *= 1 - lost / ((days > t).sum() + lost)
        weights.append(1 / stays)
    return np.array(weights)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_censoring_weights_are_those_of_a_slow_loop(seed, whole):
    days, event, _ = followed(seed, whole=whole)
    result = censoring_weights(days, event, HORIZON)
    assert np.allclose(result, weights_by_loops(days, event, HORIZON))
    assert np.isclose(result.sum(), len(days)) and result.max() > 1.5


def test_censoring_weights_are_those_of_statsmodels():
    days, event, _ = followed(2, whole=False)  # Without ties between events and losses
    curve = SurvfuncRight(days, ~event)
    before = np.searchsorted(curve.surv_times, np.minimum(days, HORIZON), side="left")
    stays = np.append(1.0, curve.surv_prob)[before]
    known = event | (days >= HORIZON)
    assert np.allclose(censoring_weights(days, event, HORIZON), np.where(known, 1 / stays, 0))


def kaplan_meier(days, event, horizon):
    """Survival at the horizon and its standard error, by statsmodels."""
    curve = SurvfuncRight(days, event)
    last = np.searchsorted(curve.surv_times, horizon, side="right") - 1
    return curve.surv_prob[last], curve.surv_prob_se[last]


@pytest.mark.parametrize("whole", [True, False])
def test_weighted_oe_is_the_kaplan_meier_curve_over_the_mean_risk(whole):
    days, event, risk = followed(3, whole=whole)
    survival, error = kaplan_meier(days, event, HORIZON)
    result = weighted_performance(days, event, risk, HORIZON, draws=0)["oe"]
    assert np.isclose(result.value, (1 - survival) / risk.mean())
    worth = survival * (1 - survival) / error**2
    ends = proportion_confint((1 - survival) * worth, worth, method="wilson")
    assert np.allclose(result[1:], np.array(ends) / risk.mean())
    weights = censoring_weights(days, event, HORIZON)
    happened = event & (days <= HORIZON)
    assert np.isclose(np.average(happened, weights=weights), 1 - survival)


def test_weighted_measures_are_those_of_scikit_learn_with_the_weights():
    days, event, risk = followed(4)
    weights, y = censoring_weights(days, event, HORIZON), event & (days <= HORIZON)
    result = weighted_performance(days, event, risk, HORIZON, draws=0, thresholds=(0.3,))
    assert np.isclose(result["brier"].value, brier_score_loss(y, risk, sample_weight=weights))
    assert np.isclose(result["auroc"].value, roc_auc_score(y, risk, sample_weight=weights))
    assert result["nb_0.3"].value == net_benefit(y, risk, 0.3, weights=weights).value
    assert (result["patients"], result["events"]) == (len(days), y.sum())
    assert all(np.isnan(result[m][1:]).all() for m in ("brier", "auroc", "slope", "nb_0.3"))


@pytest.mark.slow
def test_weighted_intervals_come_from_drawing_patients_anew():
    days, event, risk = followed(5)
    result = weighted_performance(days, event, risk, HORIZON, draws=300, seed=1)
    assert result == weighted_performance(days, event, risk, HORIZON, draws=300, seed=1)
    rng, drawn = np.random.default_rng(99), []
    for _ in range(300):
        w = rng.integers(0, len(days), len(days))
        weights = weights_by_loops(days[w], event[w], HORIZON)
        happened = event[w] & (days[w] <= HORIZON)
        drawn.append(roc_auc_score(happened, risk[w], sample_weight=weights))
    width = logit(result["auroc"].high) - logit(result["auroc"].low)
    assert np.isclose(width / (2 * 1.96), np.std(logit(drawn)), rtol=0.2)
    narrow = weighted_performance(days, event, risk, HORIZON, level=0.5, draws=300, seed=1)
    assert all(narrow[m].low > result[m].low for m in MEASURES)


def test_with_everybody_followed_it_is_plain_performance():
    y, risk = sample(19, 200)
    days = np.where(y == 1, 100.0, HORIZON)
    assert (censoring_weights(days, y, HORIZON) == 1).all()
    result = weighted_performance(days, y, risk, HORIZON, draws=0)
    plain = performance(y, risk)
    assert np.allclose(result["oe"], plain["oe"])
    assert np.allclose([result[m].value for m in MEASURES], [plain[m].value for m in MEASURES])


FOLLOWED = {
    "no patient": ([], [], []),
    "one patient": ([400], [0], [0.2]),
    "three patients": ([100, 400, 400], [1, 0, 0], [0.2, 0.3, 0.1]),
    "all lost": ([100, 200, 300], [0, 0, 0], [0.2, 0.3, 0.1]),
    "last one lost": ([100, 200, 300], [1, 1, 0], [0.2, 0.3, 0.1]),
    "only events": ([100, 200, 300], [1, 1, 1], [0.2, 0.3, 0.1]),
    "no event": ([400] * 5, [0] * 5, [0.2] * 5),
    "one risk for all": ([100, 150] * 10 + [400] * 20, [1, 0] * 10 + [0] * 20, [0.3] * 40),
    "risk 0 for all": ([100, 400] * 5, [1, 0] * 5, [0.0] * 10),
    "separated": ([100, 400] * 10, [1, 0] * 10, [0.8, 0.2] * 10),
    "on the day": ([0, 365, 365, 0], [1, 1, 0, 0], [0.8, 0.2, 0.1, 0.4]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FOLLOWED)
def test_follow_up_has_an_answer_or_none_but_never_a_crash_or_false_certainty(name):
    days, event, risk = FOLLOWED[name]
    result = weighted_performance(days, event, risk, HORIZON, draws=30, thresholds=(0.25,))
    assert result["patients"] == len(days)
    for measure in (*MEASURES, "nb_0.25"):
        value, low, high = result[measure]
        tolerance = 1e-12
        ordered = low - tolerance <= value <= high + tolerance
        assert ordered or np.isnan([low, high]).all(), (measure, result[measure])
    assert result["auroc"].low != result["auroc"].high
    if name in ("no patient", "all lost", "last one lost"):
        assert all(np.isnan(result[measure]).all() for measure in MEASURES)


@pytest.mark.parametrize(
    ("days", "event", "horizon", "match"),
    [
        ([1, -1], [0, 1], 5, "days of at least 0"),
        ([1, np.nan], [0, 1], 5, "days of at least 0"),
        ([1, 2], [0], 5, "days of at least 0"),
        ([1, 2], [0, 2], 5, "events must be true or false"),
        ([1, 2], [0, 1], 0, "the horizon above 0"),
    ],
)
def test_unusable_follow_up_is_refused_in_one_sentence(days, event, horizon, match):
    with pytest.raises(LMError, match=match):
        censoring_weights(days, event, horizon)
    with pytest.raises(LMError, match=match):
        weighted_performance(days, event, [0.1, 0.2], horizon)


def test_follow_up_ends_with_the_event_or_where_the_clinic_lost_sight():
    start = pd.Timestamp("1987-01-01")
    rows = pd.DataFrame({"arrived": [start] * 2, "event": [start + pd.Timedelta("36h"), pd.NaT]})
    rows["followed_until"] = [start + pd.Timedelta("90D"), start + pd.Timedelta("30D")]
    days, event = follow_up(rows)
    assert days.tolist() == [1.5, 30] and event.tolist() == [True, False]


@pytest.mark.slow
def test_weighting_mends_most_of_what_seems_wrong_in_the_german_trial():
    rotterdam, trial = load_study("rotterdam_5y"), replace(load_study("gbsg"), horizon_days=1826)
    learned, german = read_rows(rotterdam), label_outcomes(trial, read_rows(trial))
    days, event = follow_up(german)
    known = german.y.notna().to_numpy()
    survival, _ = kaplan_meier(days, event, 1826)
    expected = {"logistic": (1.59, 1.22), "boosting": (1.37, 1.04)}
    for family, figures in expected.items():
        risk = fit(rotterdam, learned[learned.y.notna()], family).predict_proba(german)[:, 1]
        plain = oe(german.y[known], risk[known])
        weighted = weighted_performance(days, event, risk, 1826, draws=0)["oe"]
        assert np.isclose(plain.value, german.y[known].mean() / risk[known].mean())
        assert np.isclose(weighted.value, (1 - survival) / risk.mean())
        assert np.allclose((plain.value, weighted.value), figures, atol=0.02)


def test_tables_take_weights_and_thresholds():
    table = frame()
    table["weight"] = uneven(30, len(table))
    table.loc[table.y.isna(), "weight"] = 0.0
    study = load_study("monica")
    rows = by_period(study, table, weights="weight", thresholds=(0.2, 0.2))
    known = table.dropna()
    group = known[known.arrived < "1988"]
    expected = performance(group.y, group.risk, weights=group.weight, thresholds=(0.2,))
    assert rows.patients[0] == expected["patients"] == (group.weight > 0).sum()
    for name in (*MEASURES, "nb_0.2"):
        ends = rows.loc[0, [name, f"{name}_low", f"{name}_high"]].astype(float)
        assert np.allclose(ends, expected[name])
    men = by_subgroup(table, "sex", weights="weight").set_index("sex").loc["m"]
    group = known[known.sex == "m"]
    assert np.isclose(men.oe, oe(group.y, group.risk, weights=group.weight).value)
    no_one = by_period(study, table.assign(weight=0.0), weights="weight")
    assert (no_one.patients == 0).all() and no_one.oe.isna().all()


def test_subgroups_of_the_study_cut_numbers_at_the_median():
    study = replace(load_study("monica"), subgroups=("sex", "age"), thresholds=(0.2,))
    table = frame()
    table["age"] = np.random.default_rng(31).uniform(30, 70, len(table)).round()
    table.loc[3:20, "age"] = np.nan
    groups = by_subgroups(study, table)
    assert list(groups)[:4] == ["subgroup", "value", "patients", "events"]
    assert "nb_0.2_low" in groups
    known = table.dropna(subset=["y", "risk"])
    assert groups.groupby("subgroup").patients.sum().eq(len(known)).all()
    middle = table.age.median()
    young = groups[groups.value == f"up to {middle:g}"].iloc[0]
    chosen = known[known.age <= middle]
    assert young.patients == len(chosen) and np.isclose(
        young.brier, brier(chosen.y, chosen.risk)[0]
    )
    assert "not known" in set(groups.value[groups.subgroup == "age"])
    older = by_subgroups(study, table, reference=table.assign(age=60.0))
    assert {"up to 60", "above 60"} < set(older.value)


@pytest.mark.filterwarnings("error")
def test_subgroups_of_no_patients_and_no_subgroups_are_empty_tables():
    study, table = load_study("monica"), frame().assign(premi="n", age=50.0)
    columns = list(by_subgroups(study, table))
    for empty in (table[:0], table.assign(y=np.nan)):
        result = by_subgroups(study, empty)
        assert result.empty and list(result) == columns
    result = by_subgroups(replace(study, subgroups=()), table)
    assert result.empty and list(result) == columns
    missing = by_subgroups(replace(study, subgroups=("age",)), table.assign(age=np.nan))
    assert missing.value.tolist() == ["not known"]

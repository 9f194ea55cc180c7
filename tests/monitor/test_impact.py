"""What moved, put back: distributions, impacts by hand, faults undone, and statsmodels' line."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit, logit
from scipy.stats import ks_2samp

from lm.core.study import load_study
from lm.data.synthetic import synthetic
from lm.model.predict import fit
from lm.monitor.impact import (
    ShiftImpact,
    miscalibration_cost,
    predicted_risks,
    restored_feature,
    risks_without_shift,
    shift_impact,
)

STUDY = load_study("rotterdam")
WOMEN = synthetic(STUDY, 1800, seed=61)
REFERENCE, NOW = WOMEN[:1000], WOMEN[1000:]


@pytest.fixture(scope="module")
def model():
    return fit(STUDY, REFERENCE)


def text(*counts):
    """So many of each of a, b, c, then so many missing."""
    return pd.Series(np.repeat(np.array(["a", "b", "c", None], object), counts), dtype="str")


@pytest.mark.parametrize("feature", ["age", "nodes", "er", "pgr"])
@pytest.mark.parametrize("how", [lambda v: 10 * v, lambda v: v + 40, lambda v: np.exp(v / 100)])
def test_whatever_keeps_the_ranks_is_undone_exactly(feature, how):
    back = restored_feature("number", NOW[feature], how(NOW[feature]))
    assert np.allclose(back, NOW[feature], rtol=1e-12)
    same, moved = (
        restored_feature("number", REFERENCE[feature], f(NOW[feature])) for f in (abs, how)
    )
    assert np.allclose(same, moved, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("m", [1, 2, 37, 500, 1300])
def test_numbers_have_the_quantiles_of_then_at_the_ranks_of_now(seed, m):
    rng = np.random.default_rng(seed)
    then, now = pd.Series(rng.gamma(1, 9, 500)), pd.Series(rng.normal(900, 1, m))
    back = restored_feature("number", then, now)
    expected = np.quantile(then, (np.arange(m) + 0.5) / m, method="hazen")
    assert np.allclose(np.sort(back), expected, rtol=1e-12)
    assert back.rank().equals(now.rank()) and back.between(then.min(), then.max()).all()
    assert m != 500 or np.allclose(np.sort(back), np.sort(then), rtol=1e-12)
    assert ks_2samp(then, back).statistic <= 0.5 / m + 1 / 500 + 1e-12


def test_equal_values_stay_equal_and_keep_their_order():
    now = pd.Series([3.0, 1, 3, 2, 3, 1], index=list("uvwxyz"), name="n")
    back = restored_feature("number", REFERENCE["age"], now)
    assert back.index.equals(now.index) and back.name == "n"
    assert back["u"] == back["w"] == back["y"] > back["x"] > back["v"] == back["z"]


@pytest.mark.parametrize("seed", range(30))
def test_categories_have_the_shares_of_then_and_no_more_change_than_needed(seed):
    rng = np.random.default_rng(seed)
    then, now = (text(*rng.multinomial(n, rng.dirichlet([1] * 4))) for n in (400, 171))
    now = now.sample(frac=1, random_state=seed)
    back = restored_feature("level", then, now, seed)
    wanted, had, has = (s.value_counts(dropna=False) for s in (then * 1, now, back))
    table = pd.concat([wanted * 171 / 400, had, has], axis=1).fillna(0)
    assert (table.iloc[:, 0] - table.iloc[:, 2]).abs().max() < 1
    changed = ~((back == now) | (back.isna() & now.isna()))
    assert changed.sum() == (table.iloc[:, 1] - table.iloc[:, 2]).clip(lower=0).sum()
    assert back.index.equals(now.index) and back.dtype == "str"
    assert back.equals(restored_feature("level", then, now, seed))


def test_text_of_the_same_size_are_returned_exactly():
    then, now = text(50, 30, 15, 5), text(0, 60, 20, 20)
    assert np.array_equal(
        *(
            s.value_counts(dropna=False).sort_index()
            for s in (then, restored_feature("level", then, now))
        )
    )
    assert restored_feature("level", then, then).equals(then)
    unseen = pd.Series(["huge"] * 100, dtype="str")
    assert set(restored_feature("level", then, unseen).dropna()) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("had", "has", "left"), [(0, 40, 0), (10, 40, 10), (40, 10, 10), (25, 25, 25)]
)
def test_values_missing_beyond_the_share_of_then_are_filled(had, has, left):
    rng = np.random.default_rng(had)
    then, now = pd.Series(rng.normal(size=100)), pd.Series(rng.normal(8, 1, 100))
    then[:had], now[:has] = np.nan, np.nan
    back = restored_feature("number", then, now)
    assert back.isna().sum() == left and set(np.flatnonzero(back.isna())) <= set(range(has))
    filled = back[:has].dropna()
    assert set(filled) <= set(then.dropna()) and now[has:].rank().equals(back[has:].rank())
    assert back.equals(restored_feature("number", then, now))


@pytest.mark.filterwarnings("error")
def test_sides_without_values_have_a_stated_answer():
    none, some = pd.Series([np.nan] * 4), pd.Series([1.0, np.nan, 3.0, 4.0])
    for then, now in ((some[:0], some), (some, some[:0]), (none, some), (none, none)):
        assert restored_feature("number", then, now).equals(now)
    assert restored_feature("number", some, none).notna().sum() == 3
    assert restored_feature("number", some.dropna(), none).notna().all()
    assert set(restored_feature("number", pd.Series([7.0]), some).dropna()) == {7.0}
    gone, stored = pd.Series([np.nan] * 3, dtype="str"), text(2, 1, 0, 0)
    for then, now in ((stored[:0], stored), (stored, stored[:0])):
        assert restored_feature("level", then, now).equals(now)
    assert restored_feature("level", gone, stored).isna().all()
    assert sorted(restored_feature("level", stored, gone)) == ["a", "a", "b"]


def test_the_impact_by_hand():
    result = shift_impact(np.array([0.1, 0.4]), np.array([0.3, 0.4]))
    assert np.isclose(result.brier, 0.02) and np.isclose(result.oe, 0.7 / 0.5)
    same = np.array([0.2, 0.9])
    assert shift_impact(same, same) == ShiftImpact(0.0, 1.0)
    assert all(np.isnan(shift_impact(same[:0], same[:0])))


def test_the_impact_is_what_the_brier_score_rises_by():
    rng = np.random.default_rng(0)
    served, restored = rng.random(50), rng.random(50)

    def expected(p):
        return (restored * (1 - p) ** 2 + (1 - restored) * p**2).mean()

    assert np.isclose(shift_impact(served, restored).brier, expected(served) - expected(restored))


@pytest.mark.parametrize("features", [["pgr"], ["size"], STUDY.feature_names])
def test_what_has_not_moved_costs_next_to_nothing(model, features):
    served = predicted_risks(model, NOW)
    result = shift_impact(served, risks_without_shift(STUDY, model, REFERENCE, NOW, features))
    assert result.brier < 0.002 and abs(result.oe - 1) < 0.05
    numbers = [f for f in features if f in STUDY.numbers]
    itself = risks_without_shift(STUDY, model, NOW, NOW, numbers)
    assert np.allclose(itself, served, rtol=1e-12)


@pytest.mark.parametrize(
    ("feature", "factor"), [("pgr", 10), ("er", 0.1), ("age", 12), ("nodes", 10)]
)
def test_another_unit_put_back_gives_the_risks_back(model, feature, factor):
    served = predicted_risks(model, NOW)
    wrong = NOW.assign(**{feature: NOW[feature] * factor})
    exact = risks_without_shift(STUDY, model, NOW, wrong, [feature])
    assert np.allclose(exact, served, rtol=1e-9)
    restored, spoiled = (
        risks_without_shift(STUDY, model, REFERENCE, wrong, [feature]),
        predicted_risks(model, wrong),
    )
    assert np.mean((restored - served) ** 2) < np.mean((spoiled - served) ** 2) / 10
    result, true = shift_impact(spoiled, restored), shift_impact(spoiled, served)
    assert abs(result.brier - true.brier) < 0.1 * true.brier + 0.001
    assert abs(np.log(result.oe / true.oe)) < 0.05


def test_only_the_named_features_are_put_back_and_no_other_request_is_touched(model):
    wrong = NOW.assign(pgr=NOW["pgr"] * 10, age=NOW["age"] + 20)
    stored = wrong.copy()
    served = predicted_risks(model, wrong)
    assert np.array_equal(risks_without_shift(STUDY, model, REFERENCE, wrong, []), served)
    assert np.array_equal(risks_without_shift(STUDY, model, REFERENCE, wrong, ["risk"]), served)
    by_hand = wrong.assign(age=restored_feature("number", REFERENCE["age"], wrong["age"]))
    result = risks_without_shift(STUDY, model, REFERENCE, wrong, ["age"])
    assert np.array_equal(result, predicted_risks(model, by_hand)) and not np.allclose(
        result, served
    )
    pd.testing.assert_frame_equal(wrong, stored)
    assert len(risks_without_shift(STUDY, model, REFERENCE, wrong[:1], ["age", "size"])) == 1


@pytest.mark.parametrize("seed", range(5))
def test_miscalibration_is_that_of_the_logistic_line_of_statsmodels(seed):
    rng = np.random.default_rng(seed)
    risk = expit(rng.normal(-1, 1.5, 600))
    y = (rng.random(600) < expit(0.6 + 0.7 * logit(risk))).astype(float)
    line = sm.Logit(y, sm.add_constant(logit(risk))).fit(disp=0, tol=1e-12)
    assert np.isclose(
        miscalibration_cost(y, risk), np.mean((risk - line.predict()) ** 2), atol=1e-9
    )
    again = miscalibration_cost(y, line.predict())
    assert 0 <= again < 1e-12 < miscalibration_cost(y, risk)


@pytest.mark.filterwarnings("error")
def test_without_a_line_there_is_no_miscalibration():
    risk = np.linspace(0.1, 0.9, 40)
    nothing = [(risk[:0], risk[:0]), (np.zeros(40), risk), (np.ones(40), risk)]
    nothing += [
        (np.arange(40) % 2, np.full(40, 0.3)),
        ((risk > 0.5) * 1, risk),
        ([0, 1], [0.1, 0.2]),
    ]
    for y, p in nothing:
        assert np.isnan(miscalibration_cost(np.asarray(y, float), np.asarray(p)))
    sure = np.where(np.arange(40) % 2, 1.0, 0.0)
    mixed = np.where(np.arange(40) % 5 == 0, 1 - sure, sure)
    assert 0 < miscalibration_cost(mixed, sure) < 0.25

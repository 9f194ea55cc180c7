"""Drift against scipy and statsmodels: false alarms, power, and the cases without an answer."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lm.core.settings import LMError
from lm.core.study import load_study
from lm.data.source import Drift, synthetic
from lm.monitor.drift_tests import COLUMNS, drift, holm, level_test, missing_test, number_test, psi


@pytest.fixture(scope="module")
def study():
    return load_study("rotterdam")


@pytest.fixture(scope="module")
def women(study):
    return synthetic(study, 1600, seed=11)


def row(table, feature, test):
    return table[(table.feature == feature) & (table.test == test)].iloc[0]


def test_numbers_by_the_largest_distance_of_the_distribution_functions(women):
    then, now = women.age[:1000], women.age[1000:] + 1.5
    statistic, p = number_test(then, now)
    grid = np.sort(np.concatenate([then, now]))
    then_below, now_below = (
        np.searchsorted(np.sort(v), grid, side="right") / len(v) for v in (then, now)
    )
    assert np.isclose(statistic, np.abs(then_below - now_below).max())
    assert np.isclose(p, stats.ks_2samp(then, now).pvalue, rtol=0.15)


def test_missing_numbers_play_no_part(women):
    then, now = women.age[:1000], women.age[1000:].copy()
    now.iloc[::3] = np.nan
    assert number_test(then, now) == number_test(then, now.dropna())


def test_levels_by_pearsons_chi_squared(women):
    then, now = women["size"][:1000], women["size"][1000:]
    table = pd.crosstab(women["size"], np.arange(1600) >= 1000).to_numpy(float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert expected.min() > 5
    statistic = ((table - expected) ** 2 / expected).sum()
    found = level_test(then, now)
    assert np.allclose(found, (statistic, stats.chi2.sf(statistic, len(table) - 1)))


def test_rare_levels_are_pooled():
    then = pd.Series(["a"] * 60 + ["b"] * 37 + ["c"] * 2 + ["d"])
    now = pd.Series(["a"] * 50 + ["b"] * 44 + ["c"] * 3 + ["d"] * 3)
    pooled = [s.replace({"c": "rare", "d": "rare"}) for s in (then, now)]
    table = pd.DataFrame([s.value_counts() for s in pooled]).to_numpy()
    assert np.allclose(level_test(then, now), stats.chi2_contingency(table, correction=False)[:2])


def test_missing_rates_by_fishers_exact_test():
    then, now = pd.Series([np.nan] * 3 + [1.0] * 197), pd.Series([np.nan] * 9 + [1.0] * 91)
    difference, p = missing_test(then, now)
    draws = stats.hypergeom(300, 12, 100).pmf(np.arange(13))
    assert np.isclose(difference, 0.09 - 0.015)
    assert np.isclose(p, draws[draws <= draws[9] * (1 + 1e-7)].sum())


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_that_of_statsmodels(seed):
    p = np.random.default_rng(seed).random(12) ** 3
    p[3] = p[7]
    assert np.allclose(holm(p), multipletests(p, method="holm")[1])
    assert len(holm(np.array([]))) == 0


def test_psi_by_hand():
    then = np.repeat([1.0, 2.0], [50, 50])
    now = np.repeat([1.0, 2.0], [80, 20])
    by_hand = 0.3 * np.log(0.8 / 0.5) - 0.3 * np.log(0.2 / 0.5)
    assert np.isclose(psi(then, now), by_hand) and np.isclose(psi(now, then), by_hand)
    with pytest.raises(LMError, match="at least one value"):
        psi(then, [np.nan])
    assert np.isfinite(psi(then, [7.0, 7.0, np.nan]))


def test_the_table_holds_every_feature_twice_and_corrects_once(study, women):
    table = drift(study, women[:1000], women[1000:])
    assert list(table) == COLUMNS
    assert set(table.feature) == set(study.feature_names)
    assert len(table) == 2 * len(study.features)
    assert np.allclose(table.p_holm, multipletests(table.p, method="holm")[1])
    assert (table.p_holm.diff().dropna() >= 0).all() and table.moved.dtype == bool
    risks = women.assign(risk=women.truth)
    both = drift(study, risks[:1000], risks[1000:])
    assert set(both.feature) - set(table.feature) == {"risk"}
    assert "risk" not in set(drift(study, risks[:1000].assign(risk=np.nan), risks[1000:]).feature)


def test_order_of_patients_and_of_levels_plays_no_part(study, women):
    then, now = women[:1000], women[1000:]
    mixed = drift(study, then.sample(frac=1, random_state=0), now.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(drift(study, then, now), mixed)


KINDS = {"covariate": "age", "unit": "pgr", "unit30": "pgr", "missing": "er", "level": "size"}


@pytest.mark.parametrize("kind", KINDS)
def test_injected_drift_is_found_where_it_was_injected(kind, study):
    rows = synthetic(study, 2000, seed=2, drift=Drift(kind, start=1000))
    table = drift(study, rows[:1000], rows[1000:])
    moved = table[table.moved]
    assert KINDS[kind] in set(moved.feature)
    assert moved.feature.nunique() == 1 or kind == "covariate"
    assert (moved.test == "missing").any() == (kind == "missing")
    assert (moved.unseen != "").any() == (kind == "level")


def test_false_alarms_keep_to_the_level(study, women):
    dice = np.random.default_rng(1)
    looks = []
    for _ in range(150):
        order = dice.permutation(len(women))
        table = drift(study, women.iloc[order[:1200]], women.iloc[order[1200:]], level=0.1)
        looks.append(table.moved.any())
    assert np.mean(looks) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 150)


def cases(women):
    then, now = women[:1000], women[1000:]
    blank = {c: np.nan for c in ("age", "er")} | {
        "size": pd.Series(np.nan, women.index, dtype="str")
    }
    return {
        "three patients": (then, now[:3], set()),
        "one patient": (then, now[:1], set()),
        "all missing on both sides": (then.assign(**blank), now.assign(**blank), set()),
        "all missing now": (then, now.assign(**blank), {"age", "er", "size"}),
        "constant": (then.assign(age=50.0, size="<=20"), now.assign(age=50.0, size="<=20"), set()),
        "constant then, another now": (then.assign(age=50.0), now.assign(age=51.0), {"age"}),
        "unseen level": (then, now.assign(size=["huge", *now["size"][1:]]), {"size"}),
        "ties": (then.assign(age=then.age.round(-1)), now.assign(age=now.age.round(-1)), set()),
    }


NAMES = (
    "three patients",
    "one patient",
    "all missing on both sides",
    "all missing now",
    "constant",
    "constant then, another now",
    "unseen level",
    "ties",
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_edge_cases_have_a_stated_answer(name, study, women):
    then, now, expected = cases(women)[name]
    table = drift(study, then, now)
    assert set(table[table.moved].feature) == expected
    assert table[["p", "p_holm", "missing_reference", "missing_current"]].notna().all(axis=None)
    assert table.p.between(0, 1).all()


def test_nobody_gives_an_empty_table(study, women):
    for then, now in ((women[:0], women), (women, women[:0]), (women[:0], women[:0])):
        table = drift(study, then, now)
        assert table.empty and list(table) == COLUMNS

"""Drift between two groups of patients: false alarms, power, and the cases without an answer."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from lm.core.study import load_study
from lm.data.synthetic import Drift, synthetic
from lm.monitor.covariate_shift import compare_windows
from lm.monitor.drift_tests import DRIFT_COLUMNS, column_tests, count_drift, covariate_drift, holm
from lm.monitor.sketch import bin_codes, column_layout, count_codes


@pytest.fixture(scope="module")
def study():
    return load_study("rotterdam")


@pytest.fixture(scope="module")
def women(study):
    return synthetic(study, 1600, seed=11)


def counted(study, frame, reference):
    columns = column_layout(study, reference)
    return count_codes(columns, bin_codes(columns, frame))


def test_the_strongest_of_the_monitors_tests_speaks_for_a_feature(study, women):
    then, now = (counted(study, part, women[:1000]) for part in (women[:1000], women[1000:]))
    table = count_drift(then, now).set_index("feature")
    for column, before, after in zip(then.columns, then.counts, now.counts, strict=True):
        tests = {(t, d): (float(s), float(p)) for t, d, s, p in column_tests(column, before, after)}
        row = table.loc[column.name]
        assert tests[row.test, row.detail] == (row.statistic, row.p)
        assert row.p == min(p for _, p in tests.values())


def test_a_comparison_finds_the_p_values_of_a_scan(study, women):
    then, now = (counted(study, part, women[:1000]) for part in (women[:1000], women[1000:1400]))
    once, looked = count_drift(then, now), compare_windows(then, now, threshold=1e-5)
    names = ["feature", "test", "detail", "statistic", "p", "effect", "unseen"]
    one, other = (t.sort_values("feature", ignore_index=True)[names] for t in (once, looked))
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_missing_values_play_no_part_in_the_tests_of_numbers(study, women):
    holes = women[1000:].copy()
    holes.loc[holes.index[::3], "age"] = np.nan
    age = column_layout(study, women[:1000])[study.feature_names.index("age")]
    sides = [
        np.bincount(age.codes(v), minlength=age.bins)
        for v in (women.age[:1000], holes.age, holes.age.dropna())
    ]
    both = [{t: (s, p) for t, _, s, p in column_tests(age, sides[0], now)} for now in sides[1:]]
    assert all(both[0][test] == both[1][test] for test in ("KS", "rank"))


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_that_of_statsmodels(seed):
    p = np.random.default_rng(seed).random(12) ** 3
    p[3] = p[7]
    assert np.allclose(holm(p), multipletests(p, method="holm")[1])
    assert len(holm(np.array([]))) == 0


def test_the_table_holds_every_feature_once_and_corrects_for_every_test(study, women):
    table = covariate_drift(study, women[:1000], women[1000:])
    assert list(table) == DRIFT_COLUMNS
    assert sorted(table.feature) == sorted(study.feature_names)
    then, now = (counted(study, part, women[:1000]) for part in (women[:1000], women[1000:]))
    tests = [
        (column.name, float(p))
        for column, before, after in zip(then.columns, then.counts, now.counts, strict=True)
        for *_, p in column_tests(column, before, after)
    ]
    corrected = pd.Series(multipletests([p for _, p in tests], method="holm")[1])
    least = corrected.groupby([name for name, _ in tests]).min()
    assert np.allclose(table.set_index("feature").p_holm[least.index], least)
    assert (table.p_holm.diff().dropna() >= 0).all() and table.moved.dtype == bool
    risks = women.assign(risk=women.truth)
    both = covariate_drift(study, risks[:1000], risks[1000:])
    assert set(both.feature) - set(table.feature) == {"risk"}
    assert "risk" not in set(
        covariate_drift(study, risks[:1000].assign(risk=np.nan), risks[1000:]).feature
    )


def test_order_of_patients_and_of_levels_plays_no_part(study, women):
    then, now = women[:1000], women[1000:]
    mixed = covariate_drift(
        study, then.sample(frac=1, random_state=0), now.sample(frac=1, random_state=1)
    )
    pd.testing.assert_frame_equal(covariate_drift(study, then, now), mixed)


KINDS = {"covariate": "age", "unit": "pgr", "unit30": "pgr", "missing": "er", "level": "size"}


@pytest.mark.parametrize("kind", KINDS)
def test_injected_drift_is_detected_where_it_was_injected(kind, study):
    rows = synthetic(study, 2000, seed=2, drift=Drift(kind, start=1000))
    table = covariate_drift(study, rows[:1000], rows[1000:])
    moved = table[table.moved]
    assert KINDS[kind] in set(moved.feature)
    assert moved.feature.nunique() == 1 or kind == "covariate"
    assert (moved.test == "missing").any() == (kind == "missing")
    assert (moved.unseen > 0).any() == (kind == "level")


@pytest.mark.slow
def test_false_alarms_keep_to_the_level(study, women):
    rng = np.random.default_rng(1)
    runs = []
    for _ in range(150):
        order = rng.permutation(len(women))
        table = covariate_drift(
            study, women.iloc[order[:1200]], women.iloc[order[1200:]], level=0.1
        )
        runs.append(table.moved.any())
    assert np.mean(runs) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 150)


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
    table = covariate_drift(study, then, now)
    assert set(table[table.moved].feature) == expected
    assert table[["p", "p_holm", "missing_reference", "missing_current"]].notna().all(axis=None)
    assert table.p.between(0, 1).all()


def test_none_gives_an_empty_table(study, women):
    for then, now in ((women[:0], women), (women, women[:0]), (women[:0], women[:0])):
        table = covariate_drift(study, then, now)
        assert table.empty and list(table) == DRIFT_COLUMNS

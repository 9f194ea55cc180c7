"""Scans against scipy and a slow count of our own: budgets, power, no look-ahead, odd patients."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.synthetic import synthetic
from lm.monitor.covariate_shift import (
    SCAN_COLUMNS,
    SCAN_WINDOWS,
    ScanLimits,
    _least_p_values,
    calibrate_scan,
    compare_windows,
    moving_windows,
    scan,
    scan_history,
    smallest_p_values,
)
from lm.monitor.drift_tests import (
    chi_squared,
    column_tests,
    ks_p_value,
    ks_statistic,
    psi,
    rank_sum_z,
    share_p_value,
)
from lm.monitor.false_alarms import MONITORING_INTERVAL, scan_threshold
from lm.monitor.sketch import (
    Column,
    bin_codes,
    column_layout,
    count_blocks,
    count_codes,
    number_column,
)

STUDY = load_study("rotterdam")
FEW = replace(STUDY, features=tuple(STUDY.feature(name) for name in ("age", "size", "pgr")))
WOMEN = synthetic(STUDY, 3000, seed=31)
REFERENCE, LATER = WOMEN[:1000], WOMEN[1000:].reset_index(drop=True)


@pytest.fixture(scope="module")
def calibrated():
    return calibrate_scan(STUDY, REFERENCE, streams=100)


def arrived(calibrated, frame):
    """Blocks of these patients in the bins of the watch."""
    columns = calibrated.reference.columns
    return count_blocks(columns, bin_codes(columns, frame), MONITORING_INTERVAL)


def first_alarm(calibrated, frame):
    """Patients until the first alarm and the feature that gave it; (0, "") for none."""
    course = scan_history(calibrated, arrived(calibrated, frame))
    hit = course.le(calibrated.threshold).any(axis=1)
    return (int(hit.idxmax()), course.loc[hit.idxmax()].idxmin()) if hit.any() else (0, "")


def some(seed):
    """Counts of a reference and of three windows that differ from it, ties everywhere."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 12, 400)
    now = [np.minimum(rng.poisson(5 + i, 20 + 40 * i), 11) for i in range(3)]
    return (
        a,
        now,
        np.bincount(a, minlength=12),
        np.array([np.bincount(b, minlength=12) for b in now]),
    )


@pytest.mark.parametrize("seed", range(10))
def test_the_tests_of_numbers_are_those_of_scipy(seed):
    a, now, then, counts = some(seed)
    d, z = ks_statistic(then, counts), rank_sum_z(then, counts)
    assert d.shape == z.shape == (3,)
    for b, one, score in zip(now, d, z, strict=True):
        assert abs(one - stats.ks_2samp(a, b).statistic) < 1e-9
        peer = stats.mannwhitneyu(b, a, method="asymptotic", use_continuity=False)
        middle = len(a) * len(b) / 2
        assert abs(2 * stats.norm.sf(abs(score)) - peer.pvalue) < 1e-9
        assert np.sign(score) == np.sign(peer.statistic - middle)


@pytest.mark.parametrize(("n", "m"), [(1000, 25), (1000, 400), (60, 25), (200, 200)])
def test_p_of_the_distance_is_near_the_exact_one(n, m):
    for d in np.array([0.8, 1.0, 1.3, 1.7, 2.1]) / np.sqrt(n * m / (n + m)):
        steps = np.floor(d * n * m) / (n * m)
        exact = stats.ks_2samp(*_samples(n, m, steps), method="exact")
        assert abs(np.log(ks_p_value(exact.statistic, n, m) / exact.pvalue)) < 0.4
    assert ks_p_value(0.5, 0, np.array([3, 0])).tolist() == [1.0, 1.0]


def _samples(n, m, d):
    """Two samples without ties about d apart."""
    a = (np.arange(n) + 0.5) / n
    return a, (np.arange(m) + 0.25) / m * (1 - d) + d


@pytest.mark.parametrize("seed", range(10))
def test_levels_are_compared_as_scipy_does_rare_ones_pooled(seed):
    rng = np.random.default_rng(seed)
    then, now = (rng.multinomial(n, [0.5, 0.3, 0.17, 0.02, 0.01]) for n in (900, 100))
    statistic, freedom = chi_squared(then, now)
    keep = then * 100 / 900 >= 5
    table = np.array([[*c[keep], c[~keep].sum()] for c in (then, now)])
    peer = stats.chi2_contingency(table, correction=False)
    assert abs(statistic - peer.statistic) < 1e-9 and freedom == peer.dof
    ratio = 100 / 900 / 50  # A window that expects fewer than 5 of any but the first two
    wanted = then * ratio >= 5
    assert chi_squared(then, now, ratio)[1] == max(wanted.sum() - wanted.all(), 0)


@pytest.mark.filterwarnings("error")
def test_windows_without_categories_and_single_levels_say_nothing():
    then, now = np.array([60, 40]), np.array([[10, 15], [0, 0]])
    both = chi_squared(then, now)[0]
    assert both[0] == chi_squared(then, now[0])[0] > 0 and both[1] == 0
    for one in (np.array([100, 0]), np.array([0, 0])):
        statistic, freedom = chi_squared(one, now)
        assert statistic.tolist() == [0, 0] and freedom == 0
    assert ks_statistic(then, now)[1] == 0 == rank_sum_z(then, now)[1]
    assert ks_statistic(0 * then, now[0]) == 0 == rank_sum_z(0 * then, now[0])
    assert rank_sum_z(np.array([9, 0]), np.array([5, 0])) == 0  # All alike


@pytest.mark.parametrize("r", [0, 3, 50, 1000])
def test_shares_are_compared_by_fishers_exact_test(r):
    k = np.array([[0, 1, 4], [10, 25, 1]])
    upper, both = share_p_value(k, 25, r, 1000, upper=True), share_p_value(k, 25, r, 1000)
    for x, more, two in zip(k.ravel(), upper.ravel(), both.ravel(), strict=True):
        table = [[x, 25 - x], [r, 1000 - r]]
        sides = [stats.fisher_exact(table, alternative=a).pvalue for a in ("greater", "less")]
        assert abs(more - sides[0]) < 1e-9 and abs(two - min(2 * min(sides), 1)) < 1e-9


def test_shares_of_a_large_window_need_no_table():
    k = np.array([0, 120_000, 121_000, 200_000])
    both, upper = (share_p_value(k, 200_000, 600_000, 1_000_000, upper=u) for u in (False, True))
    want = stats.hypergeom.sf(k - 1, 1_200_000, 600_000 + k, 200_000)
    assert np.allclose(upper, want, rtol=1e-9, atol=0) and both[0] < 1e-9 < 0.05 < both[1] <= 1
    small = share_p_value(np.arange(26), 25, 50, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.monitor.drift_tests._TABLED", 0)
        assert np.allclose(
            share_p_value(np.arange(26), 25, 50, 1000), small, rtol=1e-9, atol=1e-300
        )


def test_every_test_of_a_column_is_reported_by_name_and_number():
    values = REFERENCE["pgr"].where(REFERENCE.index % 10 > 0)
    now = LATER["pgr"][:100].where(LATER.index[:100] % 4 > 0) * 3
    column = number_column("pgr", values)
    counts = [np.bincount(column.codes(v), minlength=column.bins) for v in (values, now)]
    results = {(t, d): (float(s), float(p)) for t, d, s, p in column_tests(column, *counts)}
    gone = stats.fisher_exact([[25, 75], [100, 900]], alternative="greater").pvalue
    assert np.allclose(results["missing", ""], (0.25 - 0.1, 2 * gone))
    tails = [d for t, d in results if t == "tail"]
    assert len(tails) == 4 and {t for t, _ in results} == {"KS", "rank", "missing", "tail"}
    for detail in tails:
        cut = float(detail.removeprefix("above "))
        cut = min(column.cuts, key=lambda c: abs(c - cut))
        k, r = int((now > cut).sum()), int((values > cut).sum())
        peer = stats.fisher_exact([[k, 100 - k], [r, 1000 - r]], alternative="greater")
        assert np.allclose(results["tail", detail], (k / 100 - r / 1000, peer.pvalue))
    assert not any(t == "missing" for t, *_ in column_tests(replace(column, name="risk"), *counts))


def test_a_window_is_judged_alone_whatever_the_others_lack():
    column = Column("c", "level", tuple("abc"), exact=True)
    then, now = np.array([800, 80, 120, 0, 0]), np.array([[70, 12, 18, 0, 0], [30, 9, 1, 0, 60]])
    together = [p for *_, p in column_tests(column, then, now)]
    for i, one in enumerate(now):
        alone = [p for *_, p in column_tests(column, then, one)]
        assert np.array_equal([p[i] for p in together], alone)


def test_categories_are_tested_together_and_one_by_one():
    three, two = (Column("c", "level", tuple(text), exact=True) for text in ("abc", "ab"))
    results = list(column_tests(three, np.array([50, 30, 20, 0, 9]), np.array([20, 10, 10, 0, 1])))
    expected = [("chi2", ""), ("missing", ""), ("level", "a"), ("level", "b"), ("level", "c")]
    assert [(t, d) for t, d, *_ in results] == expected
    table = np.array([[50, 30, 20], [20, 10, 10]])
    assert np.isclose(results[0][3], stats.chi2_contingency(table, correction=False).pvalue)
    results = column_tests(two, np.array([50, 50, 0, 0]), np.array([20, 20, 0, 0]))
    assert [t for t, *_ in results] == ["chi2", "missing", "level"][1:]


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_windows_are_sums_of_blocks(k):
    counts = np.random.default_rng(k).integers(0, 9, (3, 40, 5))
    result = moving_windows(counts, k)
    slow = [[one[i : i + k].sum(axis=0) for i in range(41 - k)] for one in counts]
    assert np.array_equal(result, slow)


def holey(frame):
    """Patients of whom a run of 50 has no words, and some no age."""
    lost = frame["size"].where(~frame.index.isin(range(300, 350)))
    return frame.assign(size=lost, age=frame["age"].where(frame.index % 5 > 0))


@pytest.mark.filterwarnings("error")
def test_every_run_is_the_scan_of_what_had_arrived_by_then(calibrated):
    later = holey(LATER[:700])
    course = scan_history(calibrated, arrived(calibrated, later))
    for seen in (25, 50, 200, 325, 350, 375, 525, 700):
        table = scan(calibrated, arrived(calibrated, later[:seen])).set_index("feature")
        assert np.allclose(course.loc[seen], table.loc[course.columns, "p"], rtol=1e-9, atol=0)
        assert np.isfinite(course.loc[seen]).all()


def test_nothing_uses_the_future(calibrated):
    later = holey(LATER[:700])
    whole = scan_history(calibrated, arrived(calibrated, later))
    changed = later.assign(pgr=later["pgr"].where(later.index < 400, 9999.0))
    changed["size"] = changed["size"].where(changed.index < 400, "huge")
    for other in (later[:400], later[:412], changed):
        part = scan_history(calibrated, arrived(calibrated, other)).loc[:400]
        assert np.array_equal(part, whole.loc[:400])
    assert (scan_history(calibrated, arrived(calibrated, changed)).loc[425:, "size"] == 0).all()


@pytest.mark.filterwarnings("error")
def test_a_run_of_missing_categories_is_detected_at_once(calibrated):
    course = scan_history(calibrated, arrived(calibrated, holey(LATER[:700])))["size"]
    assert course.loc[:300].min() > calibrated.threshold > 1e-20 > course.loc[325]


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("budget", [2.0, 0.3, 0.02])
def test_the_threshold_of_a_known_process_is_known(power, budget):
    p = np.random.default_rng(power).random((400, 80)) ** power
    known = (budget * MONITORING_INTERVAL / 1000) ** power
    result = scan_threshold(p, budget)
    distant = np.log(result / known) / power
    assert -0.35 < distant < 0.35 if budget > 0.1 else -1 < distant < 0.5


@pytest.mark.filterwarnings("error")
def test_smaller_budgets_have_smaller_thresholds_down_to_none():
    p = np.random.default_rng(3).random((50, 40))
    results = [scan_threshold(p, budget) for budget in (30, 3, 0.3, 0.03, 1e-3, 1e-9)]
    assert all(a > b > 0 for a, b in pairwise(results))
    assert scan_threshold(np.ones((20, 40)), 0.04) == 0.001  # One test per run of 25
    steps = np.where(np.arange(50) < 20, 1e-3, 1.0)[:, None] * np.ones((50, 40))
    assert scan_threshold(steps, 1e-3) < 1e-5  # A jump of the rate is prolonged too


@pytest.mark.slow
def test_the_budget_holds_on_patients_never_seen():
    budget, alarms, exposure = 0.5, 0, 0
    for seed in range(24):
        women = synthetic(FEW, 3000, seed=7000 + seed)
        own = calibrate_scan(FEW, women[:1000], budget, streams=60, patients=1200, seed=seed)
        first, _ = first_alarm(own, women[1000:])
        alarms, exposure = alarms + (first > 0), exposure + (first or 2000)
    low, high = stats.poisson.ppf([0.005, 0.995], budget * exposure / 1000)
    assert low <= alarms <= high and exposure > 20_000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", ["shift", "unit", "missing", "level"])
def test_faults_are_detected_where_they_are_within_the_stated_patients(calibrated, what, seed):
    later = synthetic(STUDY, 900, seed=40 + seed).reset_index(drop=True)
    after, rng = later.index >= 500, np.random.default_rng(seed)
    spoiled = {
        "shift": ("age", later["age"] + 8, 200),
        "unit": ("pgr", later["pgr"] * 10, 75),
        "missing": ("er", later["er"].where(rng.random(900) > 0.25), 50),
        "level": ("size", later["size"].where(rng.random(900) > 0.2, "huge"), 25),
    }
    feature, values, within = spoiled[what]
    later[feature] = later[feature].where(~after, values)
    quiet = first_alarm(calibrated, later[:500])
    assert quiet == (0, "")
    seen, result = first_alarm(calibrated, later)
    assert result == feature and 500 < seen <= 500 + within
    table = scan(calibrated, arrived(calibrated, later[:seen]))
    assert table["feature"][0] == feature and table["moved"].tolist()[0]
    assert table["moved"].sum() == 1 and (table["unseen"] > 0).any() == (what == "level")


def test_a_watch_is_made_the_same_way_every_time_and_needs_patients():
    first, again, other = (calibrate_scan(FEW, REFERENCE, streams=30, seed=s) for s in (1, 1, 2))
    assert first.threshold == again.threshold != other.threshold
    assert first.reference.patients == 1000 and first.lengths == tuple(
        w // MONITORING_INTERVAL for w in SCAN_WINDOWS
    )
    for bad in ({"reference": REFERENCE[:49]}, {"budget": 0}, {"budget": -1}, {"budget": np.nan}):
        with pytest.raises(LMError, match="needs 50 patients"):
            calibrate_scan(FEW, **{"reference": REFERENCE, "streams": 5} | bad)


def test_a_looser_budget_never_misses_what_a_tighter_one_sees(calibrated):
    loose = calibrate_scan(STUDY, REFERENCE, budget=0.5, streams=100)
    assert loose.threshold > calibrated.threshold
    later = LATER.assign(age=LATER["age"] + 8)
    tables = [scan(g, arrived(g, later)).set_index("feature")["moved"] for g in (calibrated, loose)]
    assert tables[0].any() and (tables[1].loc[tables[0].index] >= tables[0]).all()


def test_the_order_within_a_block_plays_no_part(calibrated):
    mixed = pd.concat([LATER[i : i + 25].sample(frac=1, random_state=i) for i in range(0, 400, 25)])
    tables = [scan(calibrated, arrived(calibrated, frame)) for frame in (LATER[:400], mixed)]
    pd.testing.assert_frame_equal(*tables)


def test_the_risk_is_scanned_like_a_number():
    then, now = (w.assign(risk=w["truth"]) for w in (REFERENCE, LATER))
    own = calibrate_scan(STUDY, then, streams=20)
    table = scan(own, arrived(own, now.assign(risk=now["risk"] / 2)[:100])).set_index("feature")
    assert table.index[0] == "risk" and table["moved"]["risk"] and table["moved"].sum() == 1


@pytest.mark.filterwarnings("error")
def test_odd_patients_have_an_answer(calibrated):
    columns = calibrated.reference.columns
    assert (
        scan(calibrated, arrived(calibrated, LATER[:0])).empty
        and scan_history(calibrated, arrived(calibrated, LATER[:24])).empty
    )
    no_one = compare_windows(
        calibrated.reference, count_codes(columns, bin_codes(columns, LATER[:0])), threshold=1.0
    )
    assert no_one.empty and list(no_one) == SCAN_COLUMNS
    three = count_codes(columns, bin_codes(columns, LATER[:3]))
    table = compare_windows(calibrated.reference, three, threshold=calibrated.threshold)
    assert not table["moved"].any() and set(table["feature"]) == set(STUDY.feature_names)
    lost = LATER[:100].assign(age=np.nan, size=pd.Series(np.nan, LATER.index[:100], dtype="str"))
    table = scan(calibrated, arrived(calibrated, lost)).set_index("feature")
    moved = table[table["moved"]]
    assert set(moved.index) == {"age", "size"} and set(moved["test"]) == {"missing"}
    assert (moved["missing_current"] == 1).all() and (moved["missing_reference"] == 0).all()
    infinite = LATER[:100].assign(pgr=np.inf)
    assert scan(calibrated, arrived(calibrated, infinite))["feature"][0] == "pgr"
    assert table[["p", "statistic", "missing_current"]].notna().all(axis=None)


@pytest.mark.filterwarnings("error")
def test_a_reference_all_alike_has_a_threshold_and_sees_another_value():
    alike = REFERENCE.assign(age=50.0, pgr=np.nan, size="<=20")
    own = calibrate_scan(FEW, alike, streams=10)
    assert own.threshold == 0.05 * MONITORING_INTERVAL / 1000
    assert first_alarm(own, alike) == (0, "")
    assert not scan(own, arrived(own, alike[:500]))["moved"].any()
    for other in ({"age": 51.0}, {"size": ">50"}, {"pgr": 3.0}):
        seen = first_alarm(own, alike.assign(**other))
        assert seen == (25, next(iter(other)))


def test_other_bins_are_refused(calibrated):
    other = column_layout(STUDY, LATER)
    with pytest.raises(LMError, match="other bins"):
        scan(calibrated, count_blocks(other, bin_codes(other, LATER), MONITORING_INTERVAL))


def test_the_population_stability_index_by_hand():
    by_hand = 0.3 * np.log(0.8 / 0.5) - 0.3 * np.log(0.2 / 0.5)
    assert np.isclose(psi(np.array([50, 50]), np.array([80, 20])), by_hand)
    assert psi(np.arange(1, 30), 7 * np.arange(1, 30)) == 0
    assert np.isnan(psi(np.zeros(3, int), np.ones(3, int)))
    assert np.isnan(psi(np.ones(3, int), np.zeros(3, int)))
    empty = 0.1 * np.log(0.9 / 1.0) * -1 + (0.1 - 0.5 / 50) * np.log(0.1 / (0.5 / 50))
    assert np.isclose(psi(np.array([50, 0]), np.array([90, 10])), empty)


def test_smallest_of_all_is_what_is_stored():
    columns = (number_column("a", np.arange(10.0)),)
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"a": rng.integers(0, 12, 250).astype(float)})
    then = count_codes(columns, bin_codes(columns, frame[:100]))
    stream = count_blocks(columns, bin_codes(columns, frame[100:]), 25)
    path = smallest_p_values(then, stream.counts, (1, 4))[0]
    for run in range(6):
        counts = [stream.counts[0][run - k + 1 : run + 1].sum(0) for k in (1, 4) if run + 1 >= k]
        least = min(
            float(p) for c in counts for *_, p in column_tests(columns[0], then.counts[0], c)
        )
        assert np.isclose(path[run], least, rtol=1e-12)


def _mixed_reference(seed):
    """Numbers with ties, gaps, one value only or none, words, and a risk; of one study."""
    rng, study = np.random.default_rng(seed), STUDY
    number = next(f for f in study.features if f.kind == "number")
    word = next(f for f in study.features if f.kind == "level")
    frame = pd.DataFrame(rng.normal(size=(1500, 3)), columns=["plain", "holey", "whole"])
    frame["holey"] = frame["holey"].where(rng.random(1500) > 0.2)
    frame["whole"] = (frame["whole"] * 2).round()
    frame["alike"], frame["never"], frame["risk"] = 1.0, np.nan, rng.beta(1, 8, 1500)
    frame["words"] = rng.choice([*word.levels, None], 1500)
    names = ["plain", "holey", "whole", "alike", "never"]
    features = [replace(number, name=name) for name in names] + [replace(word, name="words")]
    return replace(study, features=tuple(features)), frame


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_finds_what_a_slow_scan_of_every_column_finds(seed):
    study, frame = _mixed_reference(seed)
    columns = column_layout(study, frame)
    coded = bin_codes(columns, frame)
    own = ScanLimits(count_codes(columns, coded), 0.05, np.nan)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(frame), (7, 700)) // rng.integers(1, 4, (7, 1))
    fast = _least_p_values(own, coded, drawn)
    for one, result in zip(drawn, fast, strict=True):
        slow = smallest_p_values(
            own.reference,
            count_blocks(columns, coded[one], MONITORING_INTERVAL).counts,
            own.lengths,
        )
        assert np.allclose(result, slow.min(axis=0), rtol=1e-9, atol=0)


def test_the_threshold_is_that_of_the_slow_paths():
    study, frame = _mixed_reference(9)
    result = calibrate_scan(study, frame, streams=40, patients=500, seed=4)
    columns, rng = column_layout(study, frame), np.random.default_rng(4)
    coded, paths = bin_codes(columns, frame), []
    weights = rng.dirichlet(np.ones(len(coded)), 40)
    for drawn in [rng.choice(len(coded), 500, p=w) for w in weights]:
        stream = count_blocks(columns, coded[drawn], MONITORING_INTERVAL)
        paths.append(smallest_p_values(result.reference, stream.counts, result.lengths).min(axis=0))
    assert result.threshold == pytest.approx(scan_threshold(np.array(paths), 0.05), rel=1e-9)

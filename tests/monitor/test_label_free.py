"""Estimates without outcomes against slow sums of our own, chance, and NannyML's figures."""

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from support.paths import ROOT

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.synthetic import synthetic
from lm.model.metrics import NONE, Interval, performance
from lm.monitor import label_free as room
from lm.monitor.label_free import (
    ESTIMATE_COLUMNS,
    LEAST_EVENTS,
    estimate_performance,
    estimates_by_period,
    expected_performance,
    fit_calibration_line,
    realised_performance,
)

PYTHON = ROOT / ".peers" / "nannyml" / "bin" / "python"
SCRIPT = ROOT / "nbs" / "benchmarks" / "peers" / "nannyml_cbpe.py"
MEASURES = ["oe", "brier", "auroc"]

# What nbs/benchmarks/peers/nannyml_cbpe.py computed for `windows()` with these versions
VERSIONS = {"nannyml": "0.13.1", "scikit-learn": "1.6.1", "pandas": "2.3.3", "numpy": "2.2.6"}
NANNYML = {
    "null": {
        "value": 0.7451121869063414,
        "error": 0.015126100148397097,
        "realised": 0.7188563906605869,
    },
    "shift": {
        "value": 0.7320073415399739,
        "error": 0.014138559533843048,
        "realised": 0.7450245863512526,
    },
    "steep": {
        "value": 0.6361533571156156,
        "error": 0.013793249936200744,
        "realised": 0.6141873844257243,
    },
}


def patients(seed, n=1000, shift=0.0, slope=1.0):
    """Served risks and the outcomes of patients whose log-odds are `slope` times the served."""
    rng = np.random.default_rng(seed)
    served = rng.normal(-1 + shift, 1, n)
    y = (rng.random(n) < expit(slope * served)).astype(float)
    return y, expit(served)


def windows():
    """Name -> reference and window, each (y, risk): as it was, shifted, over-confident."""
    return {
        "null": (patients(1), patients(2)),
        "shift": (patients(3), patients(4, shift=0.5)),
        "steep": (patients(5, slope=0.5), patients(6, slope=0.5)),
    }


def brute(worth, risk):
    """Expected AUROC, pair by pair."""
    right = pairs = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            if i != j:
                chance = worth[i] * (1 - worth[j])
                pairs += chance
                right += chance * ((risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j]))
    return right / pairs


@pytest.mark.parametrize("digits", [1, 2, 9])  # Of the risks: many ties, some, none
def test_expected_is_the_sum_over_all_pairs(digits):
    rng = np.random.default_rng(digits)
    risk, worth = rng.random(60).round(digits), rng.random(60)
    result = expected_performance(worth, risk)
    assert result["auroc"] == pytest.approx(brute(worth, risk), abs=1e-12)
    slow = [p * (1 - r) ** 2 + (1 - p) * r**2 for p, r in zip(worth, risk, strict=True)]
    assert result["brier"] == pytest.approx(sum(slow) / 60)
    assert result["oe"] == pytest.approx(sum(worth) / sum(risk))


@pytest.mark.slow
def test_expected_is_what_comes_on_average():
    rng = np.random.default_rng(0)
    risk = rng.random(300).round(2)
    worth = expit(0.3 + 0.7 * logit(np.clip(risk, 0.01, 0.99)))
    drawn = [(rng.random(300) < worth).astype(int) for _ in range(1000)]
    result = expected_performance(worth, risk)
    for name, measure in {"auroc": roc_auc_score, "brier": brier_score_loss}.items():
        seen = [measure(y, risk) for y in drawn]
        assert result[name] == pytest.approx(np.mean(seen), abs=4 * np.std(seen) / np.sqrt(1000))


def test_certain_outcomes_give_the_realised_measures():
    y, risk = patients(1, n=200)
    measured = performance(y, risk)
    result = expected_performance(y, risk)
    assert {m: result[m] for m in MEASURES} == pytest.approx(
        {m: measured[m].value for m in MEASURES}
    )


def test_the_line_is_that_of_scikit_learn():
    y, risk = patients(7, slope=0.6)
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(risk)[:, None], y)
    line = fit_calibration_line(y, risk)
    assert line.value == pytest.approx([theirs.intercept_[0], theirs.coef_[0, 0]], abs=1e-5)
    x = np.column_stack([np.ones(len(y)), logit(risk)])
    p = theirs.predict_proba(logit(risk)[:, None])[:, 1]
    information = sum(np.outer(row, row) * q * (1 - q) for row, q in zip(x, p, strict=True))
    assert line.covariance == pytest.approx(np.linalg.inv(information), rel=1e-3)


@pytest.mark.slow
def test_intervals_are_those_of_slow_windows():
    (y, risk), (_, now) = patients(8, n=400), patients(9, n=150)
    line, rng = fit_calibration_line(y, risk), np.random.default_rng(1)
    seen = {m: [] for m in MEASURES}
    for _ in range(1500):
        a, b = rng.multivariate_normal(line.value, line.covariance)
        drawn = (rng.random(150) < expit(a + b * logit(now))).astype(int)
        seen["oe"].append(drawn.sum() / now.sum())
        seen["brier"].append(brier_score_loss(drawn, now))
        seen["auroc"].append(roc_auc_score(drawn, now))
    result = estimate_performance(y, risk, now, draws=4000)
    for m in MEASURES:
        low, high = np.quantile(seen[m], [0.025, 0.975])
        wide = high - low
        assert result[m].low == pytest.approx(low, abs=0.08 * wide)
        assert result[m].high == pytest.approx(high, abs=0.08 * wide)


def test_truths_widen_and_do_not_move_and_a_line_through_them_changes_nothing():
    (y, risk), (_, now) = patients(10), patients(11, n=500)
    rng, z, later = np.random.default_rng(0), logit(risk), logit(now)
    plain = estimate_performance(y, risk, now)
    a, b = rng.normal(0, 0.5, (50, 1)), rng.normal(1, 0.3, (50, 1))
    lines = estimate_performance(y, risk, now, truths=(a + b * z, a + b * later))
    assert np.allclose(list(lines.values()), list(plain.values()))
    off = rng.normal(0, 0.5, (50, 1))
    wrong = estimate_performance(y, risk, now, truths=(np.tile(z, (50, 1)), later + off))
    assert wrong["oe"].value == plain["oe"].value
    assert np.diff(wrong["oe"][1:]) > 1.3 * np.diff(plain["oe"][1:])
    with pytest.raises(LMError, match="do not fit the patients"):
        estimate_performance(y, risk, now, truths=(a + b * z, a + b * z))


def test_order_does_not_matter_to_the_value_nor_memory_to_the_draws(monkeypatch):
    (y, risk), (_, now) = patients(12), patients(13, n=500)
    order = np.random.default_rng(0).permutation(500)
    result, moved = estimate_performance(y, risk, now), estimate_performance(y, risk, now[order])
    assert all(result[m].value == pytest.approx(moved[m].value) for m in MEASURES)
    assert result == estimate_performance(y, risk, now)
    windows_ = room._windows(fit_calibration_line(y, risk), now, np.zeros((1, 1)), 7, 0)
    assert windows_.shape == (7, 3)
    many = room._windows(fit_calibration_line(y, risk), np.tile(now, 4000), np.zeros((1, 1)), 3, 0)
    assert many.shape == (3, 3) and np.isfinite(many).all()  # One window at a time


def test_too_little_is_a_stated_answer():
    y, risk = patients(14)
    nothing = dict.fromkeys(MEASURES, NONE)
    few = np.flatnonzero(y == 1)[LEAST_EVENTS - 1 :]
    lacking = np.delete(np.arange(len(y)), few)  # One event less than needed
    for reference in [(y[:0], risk[:0]), (y[:3], risk[:3]), (y * 0, risk), (y * 0 + 1, risk)]:
        assert estimate_performance(*reference, risk) == nothing
    assert estimate_performance(y[lacking], risk[lacking], risk) == nothing
    assert estimate_performance(y, np.full(len(y), 0.3), risk) == nothing  # Equal risks
    assert estimate_performance(y, risk, []) == nothing
    assert (
        estimate_performance((risk > 0.3).astype(float), risk, risk) == nothing
    )  # Fully apart: no line


@pytest.mark.parametrize(
    "now",
    [[0.2], [0.2, 0.3, 0.4], [0.0, 1.0] * 50, [0.2] * 100, [0.0] * 50, [1.0] * 50],
    ids=["one", "three", "0 and 1", "equal", "all 0", "all 1"],
)
def test_edge_windows_give_numbers_or_none(now):
    result = estimate_performance(*patients(15), now)
    for interval in result.values():
        assert interval == NONE or interval.low <= interval.value <= interval.high
    assert result["brier"] != NONE
    assert (result["oe"] == NONE) == (max(now) == 0)
    assert (result["auroc"] == NONE) == (len(set(now)) == 1 or len(now) < 10)


def test_none_is_never_partly_a_number():
    assert all(np.isnan(NONE))
    for interval in estimate_performance(*patients(15), [0.2, 0.3, 0.4]).values():
        assert np.isnan(interval).all() or np.isfinite(interval).all()


@pytest.mark.parametrize("wrong", [[0.2, np.nan], [-0.1], [1.1], [[0.2]]])
def test_unusable_risks_are_refused(wrong):
    with pytest.raises(LMError, match="risks must be between 0 and 1"):
        estimate_performance(*patients(16), wrong)


def test_unusable_settings_and_references_are_refused():
    y, risk = patients(16)
    for more in ({"level": 1.0}, {"draws": 0}):
        with pytest.raises(LMError, match="break the rule"):
            estimate_performance(y, risk, risk, **more)
    with pytest.raises(LMError, match="outcomes must be 0 or 1"):
        estimate_performance(np.where(y == 1, np.nan, y), risk, risk)


def test_realised_holds_estimates_against_outcomes():
    (y, risk), (later, now) = patients(17), patients(18, n=500)
    later[:50] = np.nan
    result = estimate_performance(y, risk, now)
    table = realised_performance(
        {m: list(i) for m, i in result.items()}, later, now
    )  # As JSON brings them back
    assert list(table.columns) == list(ESTIMATE_COLUMNS) and list(table["measure"]) == MEASURES
    assert (table["patients"] == 450).all() and table["inside"].dtype == bool
    auroc = table.set_index("measure").loc["auroc"]
    assert auroc["realised"] == pytest.approx(roc_auc_score(later[50:], now[50:]))
    far = realised_performance({"auroc": Interval(0.9, 0.89, 0.91)}, later, now)
    assert far["inside"].tolist() == [False] and len(far) == 1


def test_realised_leaves_out_what_cannot_be_held():
    (y, risk), now = patients(17), np.linspace(0.1, 0.5, 20)
    result = estimate_performance(y, risk, now)
    assert realised_performance(result, np.full(20, np.nan), now).empty
    assert list(realised_performance(result, np.zeros(20), now)["measure"]) == ["oe", "brier"]
    assert realised_performance(dict.fromkeys(MEASURES, NONE), np.zeros(20), now).empty
    assert realised_performance({}, np.zeros(0), np.zeros(0)).columns.tolist() == list(
        ESTIMATE_COLUMNS
    )
    with pytest.raises(LMError, match="do not belong together"):
        realised_performance(result, np.zeros(3), now)


def test_by_period_is_estimate_and_realised_for_each():
    study = load_study("monica")
    frame = synthetic(study, 1500, seed=1)
    frame["risk"] = frame["truth"]
    frame = frame.dropna(subset=["y"])
    reference, later = frame[:500], frame[500:]
    table = estimates_by_period(study, reference, later)
    assert table["period"].is_monotonic_increasing and list(table.columns) == [
        "period",
        *ESTIMATE_COLUMNS,
    ]
    last = later[later["arrived"].dt.year == int(table["period"].iloc[-1])]
    result = estimate_performance(reference["y"], reference["risk"], last["risk"])
    slow = realised_performance(result, last["y"], last["risk"])
    pd.testing.assert_frame_equal(
        table[table["period"] == table["period"].iloc[-1]][list(ESTIMATE_COLUMNS)].reset_index(
            drop=True
        ),
        slow,
    )
    assert estimates_by_period(study, reference, later[:0]).empty


def isotonic(y, risk, now):
    """CBPE as NannyML does it where it finds that calibration helps, in four lines."""
    from sklearn.isotonic import IsotonicRegression

    worth = IsotonicRegression(out_of_bounds="clip").fit(risk, y).predict(now)
    return expected_performance(worth, now)["auroc"]


@pytest.mark.parametrize("name", windows())
def test_nannyml_figures_follow_from_our_sums(name):
    """It calibrates by an isotonic curve or not at all, and pairs each patient with itself."""
    (y, risk), (later, now) = windows()[name]
    theirs = NANNYML[name]
    ours = [isotonic(y, risk, now), expected_performance(now, now)["auroc"]]
    assert min(abs(o - theirs["value"]) for o in ours) < 0.001
    assert theirs["realised"] == pytest.approx(roc_auc_score(later, now))
    result = estimate_performance(y, risk, now)["auroc"]
    assert (
        abs(result.value - theirs["value"]) < 0.02 and result.low < theirs["realised"] < result.high
    )


@pytest.mark.skipif(not PYTHON.exists(), reason="NannyML's environment is not built")
def test_nannyml_still_says_so(tmp_path):
    for name, sides in windows().items():
        (tmp_path / name / "windows").mkdir(parents=True)
        for path, (y, risk) in zip(("reference", f"windows/{name}"), sides, strict=True):
            frame = pd.DataFrame({"risk": risk, "y": y})
            frame.to_parquet(tmp_path / name / f"{path}.parquet")
    command = [PYTHON, SCRIPT, tmp_path, "--out", tmp_path / "estimates.json"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    payload = json.loads((tmp_path / "estimates.json").read_text(encoding="utf-8"))
    assert VERSIONS.items() <= payload["versions"].items()
    for name, stored in NANNYML.items():
        assert {k: payload["windows"][name][k] for k in stored} == pytest.approx(stored, abs=1e-9)

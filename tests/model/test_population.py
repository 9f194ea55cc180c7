"""The scored population against plain implementations, and on streams with known censoring."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from statsmodels.duration.survfunc import survdiff
from support import censoring

from lm.model.metrics import brier, censoring_weights, cumulative_incidence, oe
from lm.model.population import (
    BLOCK,
    FLOOR,
    known_odds,
    last_counted,
    log_rank,
    population,
    risk_if_known,
)
from lm.monitor.cusum import cusum, log_likelihood_ratio
from lm.monitor.follow_up import monthly_events

FIRST = pd.Timestamp("2020-01-01")
PATIENT = st.tuples(st.integers(0, 12), st.booleans())


def _later(arrived, days):
    """Times so many days after arrival, NaT for none."""
    return arrived + pd.to_timedelta(np.where(np.isfinite(days), days, np.nan), "D")


def known(seed: int, n: int = 2000, rate: tuple[float, float] = (0.7, 0.7), deaths: float = 0.0):
    """Patients of horizon 100 days with losses by risk and competing deaths, and the truth."""
    rng = np.random.default_rng(seed)
    risk = expit(rng.normal(-1, 1, n))
    onset = np.where(rng.random(n) < risk, rng.uniform(0, 100, n), np.inf)
    dies = np.where(
        onset < 100, np.inf, np.where(rng.random(n) < deaths, rng.uniform(0, 100, n), 999)
    )
    leaves = rng.exponential(100 / np.where(risk > 0.35, *rate[::-1]), n)
    ends = np.minimum(onset, dies)
    y = np.where(onset < leaves, 1.0, np.where(np.minimum(dies, 100) <= leaves, 0.0, np.nan))
    arrived = FIRST + pd.to_timedelta(np.arange(n) / 10, "D")
    frame = pd.DataFrame({"arrived": arrived, "risk": risk, "y": y, "matured": True})
    frame["event"] = _later(arrived, np.where(y == 1, onset, np.nan))
    frame["competing"] = _later(
        arrived, np.where((y == 0) & (dies < np.minimum(leaves, 100)), dies, np.nan)
    )
    frame["followed_until"] = _later(arrived, np.minimum(np.minimum(leaves, ends), 100))
    return frame.assign(lost=np.isnan(y)), (onset < 100).astype(float)


@given(st.lists(PATIENT, min_size=1, max_size=30))
def test_weights_are_those_of_a_plain_kaplan_meier(patients):
    days, ended = map(list, zip(*patients, strict=True))
    result = censoring_weights(days, ended, 10)
    np.testing.assert_allclose(result, censoring.weights(days, ended, 10))


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.integers(0, 2)), min_size=4))
def test_the_log_rank_test_is_that_of_statsmodels(patients):
    days, lost, group = map(np.array, zip(*patients, strict=True))
    if len(np.unique(group)) < 2 or not lost.any():
        assert log_rank(days, lost, group) == 1
        return
    with np.errstate(all="ignore"):
        try:
            statistic, p = survdiff(days, lost, group)
        except np.linalg.LinAlgError:
            return  # A group that no other patient outlives
    if np.isfinite(statistic) and 0 < p < 1:
        assert log_rank(days, lost, group) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("rate", [(0.7, 0.7), (0.4, 1.4), (1.4, 0.4)])
@pytest.mark.parametrize("deaths", [0.0, 0.4])
def test_weights_give_the_oe_and_brier_score_of_everybody(rate, deaths):
    gaps = []
    for seed in range(12):
        frame, truth = known(seed, 2000, rate, deaths)
        result = population(frame)
        y, risk, w = (result.labelled[c].to_numpy() for c in ("y", "risk", "ipcw"))
        assert 300 < result.unknown == frame["y"].isna().sum()
        gap = [oe(y, risk, weights=w).value - oe(truth, frame["risk"]).value]
        gap += [brier(y, risk, weights=w).value - brier(truth, frame["risk"]).value]
        shifted = expit(logit(risk) + result.labelled["ipcw_odds"])
        gaps.append([*gap, oe(y, shifted).value - 1, oe(y, risk).value - 1])
    mean, error = np.mean(gaps, axis=0), np.std(gaps, axis=0, ddof=1) / np.sqrt(12)
    assert (abs(mean[:2]) < 3 * error[:2] + [0.005, 0.001]).all()
    assert abs(mean[2]) < 0.03 < abs(mean[3])  # Without weights or shift O:E is wrong


def test_losses_by_risk_are_noticed_and_losses_regardless_of_it_are_not():
    by_risk = [population(known(s, 2000, (0.4, 1.4))[0]).p for s in range(10)]
    regardless = [population(known(s, 2000)[0]).p for s in range(20)]
    assert max(by_risk) < 1e-4 and np.mean(np.array(regardless) < 0.05) <= 0.2


@given(st.lists(st.sampled_from([0.0, 1.0, np.nan]), max_size=200))
@settings(max_examples=200)
def test_the_window_ends_with_a_block_that_has_labels(y):
    end = last_counted(y)
    assert (len(y) - end) % BLOCK == 0 or end == 0
    block = np.array(y[max(end - BLOCK, 0) : end])
    open_ = (block != 1).sum()
    assert end == 0 or (block == 0).sum() >= FLOOR * open_


def test_the_end_of_an_extract_where_only_events_are_known_does_not_count():
    frame, _ = known(3, 1200, (0.1, 0.1))
    late = frame.index >= 800  # The extract ends: a patient without event is censored
    frame.loc[late & (frame["y"] == 0), ["y", "lost"]] = np.nan, True
    frame.loc[late, "followed_until"] = frame.loc[late, "arrived"] + pd.Timedelta(days=1)
    frame["lost"] = frame["lost"].astype(bool)
    result = population(frame)
    assert 760 <= len(result.patients) <= 800 and result.behind == 1200 - len(result.patients)
    assert (
        f"{result.unknown:,} of 1,200 labels unknown" in result.text
        and "do not count" in result.text
    )
    y, risk, w = (result.labelled[c].to_numpy() for c in ("y", "risk", "ipcw"))
    assert 0.85 < oe(y, risk, weights=w).value < 1.15
    everyone = frame[frame["y"].notna()]
    assert oe(everyone["y"], everyone["risk"]).value > 1.15


def test_all_labels_known_means_equal_weights_and_no_shift():
    frame, _ = known(5, 500)
    frame = frame.assign(y=frame["y"].fillna(0), lost=False)
    result = population(frame)
    assert result.text == "" and result.model == "none" and result.least == 1
    assert (result.patients["ipcw"] == 1).all() and (result.patients["ipcw_odds"] == 0).all()


def test_a_label_that_none_reported_is_no_loss():
    frame, _ = known(6, 500)
    frame = frame.assign(y=frame["y"].fillna(0), lost=False)
    frame.loc[::7, "y"] = np.nan
    result = population(frame)
    assert result.unknown == len(frame[::7]) and set(result.patients["ipcw"]) == {0.0, 1.0}


def test_no_patient_and_no_label_give_an_empty_population():
    frame, _ = known(7, 100)
    for none in (frame[:0], frame.assign(matured=False), frame.assign(y=np.nan, lost=True)):
        result = population(none)
        assert result.labelled.empty and result.until is None and result.effective == 0
        assert result.to_dict()["least"] is None


def test_the_shift_is_zero_where_one_kind_is_absent_everywhere():
    assert (known_odds(np.ones(5), np.ones(5), np.zeros(5)) == 0).all()


def test_events_are_expected_of_all_who_had_a_competing_event_too():
    gaps = []
    for seed in range(12):
        frame, _ = known(seed, 2000, (0.01, 0.01), deaths=0.5)
        day = frame["arrived"].max() + pd.Timedelta(days=130)
        table = monthly_events(frame, (0.0, 1.0), 100, day)
        gaps.append(table["observed"].sum() / table["expected"].sum() - 1)
    lost = frame.assign(followed_until=frame["competing"].fillna(frame["followed_until"]))
    as_lost = monthly_events(lost.drop(columns="competing"), (0.0, 1.0), 100, day)
    assert abs(np.mean(gaps)) < 3 * np.std(gaps, ddof=1) / np.sqrt(12) + 0.03
    assert as_lost["observed"].sum() > 1.1 * as_lost["expected"].sum()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=30))
def test_the_cumulative_incidence_is_that_of_a_plain_one(patients):
    days, cause = map(np.array, zip(*patients, strict=True))
    value, variance = cumulative_incidence(days, cause == 1, 6, cause == 2)
    assert value == pytest.approx(censoring.incidence(days, cause, 6)) and variance >= -1e-12


def test_the_shift_of_known_labels_keeps_the_false_alarms_of_a_chart_in_budget():
    crossed = []
    for seed in range(60):
        frame, _ = known(seed, 1000, (0.7, 0.7))
        group = population(frame).labelled
        z = logit(np.clip([group["risk"], risk_if_known(group)], 1e-6, 1 - 1e-6))
        paths = [cusum(log_likelihood_ratio(group["y"], expit(v), expit(v + np.log(2)))) for v in z]
        crossed.append([path.max() > 6 for path in paths])
    plain, shifted = np.mean(crossed, axis=0)
    assert plain > 0.3 and shifted < 0.1

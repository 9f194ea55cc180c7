"""Counts of training patients are counts, and no model is judged on them."""

import copy

import numpy as np
import pandas as pd
import pytest

from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.model.metrics import auroc
from lm.model.predict import MOST_DISTANCES, fit
from lm.monitor.verdict import refit_gain, training_patients
from lm.update.comparison import compare_models
from lm.update.decide import Case, Recipe, current_patients

STUDY = load_study("monica")


def many(n):
    """So many patients, one every hour, all labels known."""
    rng = np.random.default_rng(n)
    rows = read_rows(STUDY)
    frame = rows.iloc[rng.integers(0, len(rows), n)].reset_index(drop=True)
    hours = pd.to_timedelta(np.arange(n), "h")
    frame = frame.assign(arrived=pd.Timestamp("2000-01-01") + hours, matured=True, lost=False)
    return frame.drop(columns=["event", "followed_until"]).assign(record_id=hours.astype(str))


@pytest.mark.parametrize("n", [9_999, 10_001, 50_000])
def test_a_model_knows_how_many_patients_taught_it(n):
    frame = many(n + 500)
    model = fit(STUDY, frame[:n])
    assert model.patients == n and len(model.distances_) == min(n, MOST_DISTANCES)
    since = frame["arrived"].iloc[n - 1] + STUDY.horizon
    result = refit_gain(STUDY, model, frame, since)
    assert result["learned"] == n and result["patients"] == n + 500
    assert refit_gain(STUDY, model, frame[:n], since)["promise"] == 0
    case = Case(STUDY, frame, frame["arrived"].max() + STUDY.horizon, model, since)
    fresh = current_patients(case, Recipe("refit", "growth"))
    assert fresh["record_id"].tolist() == frame["record_id"][n:].tolist()
    old = copy.copy(model)  # A file that was made before patients were counted
    del old.patients_, old.trained_until_
    assert training_patients(STUDY, old, frame, since) == n
    case = Case(STUDY, frame, case.as_of, old, since)
    assert len(current_patients(case, Recipe("refit", "growth"))) == 500


def test_no_model_is_judged_on_its_training_patients():
    frame = many(1500)
    old, new = fit(STUDY, frame[:600]), fit(STUDY, frame[:1100], family="splines")
    result = compare_models(STUDY, old, new, frame)
    assert result.left_out == 1100 and result.judged <= 400
    assert "1,100 patients on whom one of them was fitted do not judge" in result.text
    assert compare_models(STUDY, old, new, frame[:1100]).judged == 0


def test_an_area_over_versions_is_the_mean_over_pairs_within_them():
    rng = np.random.default_rng(3)
    y, risk = (rng.random(300) < 0.3).astype(float), rng.random(300).round(2)
    version = rng.integers(0, 3, 300)
    right = pairs = 0.0
    for i in np.flatnonzero(y == 1):
        for j in np.flatnonzero((y == 0) & (version == version[i])):
            right += (risk[i] > risk[j]) + (risk[i] == risk[j]) / 2
            pairs += 1
    assert auroc(y, risk, strata=version).value == pytest.approx(right / pairs)

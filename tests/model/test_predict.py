"""Properties of preprocess, predict and explain that hold for every study and both families."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.wording import OOD_LEVEL, finding_wording, percent
from lm.model.explain import contributions, sentence
from lm.model.predict import MOST_DISTANCES, RiskModel, fit, predict, unusual
from lm.model.preprocess import columns, design, encode, owners, preprocessor

STUDIES = ("monica", "rotterdam", "rotterdam_5y", "gbsg")


@pytest.fixture(scope="module")
def rows():
    return {name: read_rows(load_study(name)) for name in STUDIES}


@pytest.fixture(scope="module")
def fitted(rows):
    study = load_study("rotterdam")
    return {
        family: fit(study, rows["rotterdam"].head(1200), family, members=4, trees=30)
        for family in ("logistic", "boosting")
    }


def with_holes(study, frame, seed=0, share=0.3):
    rng = np.random.default_rng(seed)
    frame = frame.copy()
    for name in study.feature_names:
        frame.loc[rng.random(len(frame)) < share, name] = np.nan
    return frame


@pytest.mark.parametrize("name", STUDIES)
def test_encode_is_the_pipeline(name, rows):
    study = load_study(name)
    train, seen = rows[name].head(400), with_holes(study, rows[name].tail(200))
    for table in (train, with_holes(study, train, 1)):
        pipeline = preprocessor(study.features).fit(design(study.features, table))
        slow = pipeline.transform(design(study.features, seen)).astype(float)
        assert np.abs(encode(pipeline, columns(study.features, seen)) - slow).max() < 1e-12
        assert len(owners(pipeline)) == slow.shape[1]


@pytest.mark.parametrize("family", ["logistic", "boosting"])
def test_contract_of_the_model(family, fitted, rows):
    model, seen = fitted[family], rows["rotterdam"].tail(60)
    seen = with_holes(load_study("rotterdam"), seen)
    answer = predict(model, seen)
    assert list(answer.index) == list(seen.index)
    assert ((answer.low <= answer.risk) & (answer.risk <= answer.high)).all()
    assert ((answer[["risk", "low", "high"]] > 0) & (answer[["risk", "low", "high"]] < 1)).all(
        axis=None
    )
    shuffled = predict(model, seen[sorted(seen)].sample(frac=1, random_state=1))
    assert shuffled.loc[seen.index].equals(answer)
    alone = pd.concat([predict(model, row) for row in seen.to_dict("records")])
    assert (alone.to_numpy() == answer.to_numpy()).all()
    assert len(predict(model, seen.head(0))) == 0


ABSURD = {
    "monica": {"age": 108.0},
    "rotterdam": {"age": 100.0, "meno": "post", "nodes": 50.0, "pgr": 0.0, "er": 5900.0},
}


@pytest.mark.parametrize("name", ABSURD)
def test_patients_of_the_same_kind_are_not_called_out_of_distribution_and_absurd_ones_are(
    name, rows
):
    study, flagged, results, low = load_study(name), [], [], []
    for seed in range(8):
        mixed = rows[name].sample(frac=1, random_state=seed)
        train, rest = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
        model = fit(study, train)
        ood = predict(model, rest)["unlike"]
        assert ((ood > 0) & (ood <= 1)).all()
        flagged.append((ood < OOD_LEVEL).mean())
        low.append((ood < 0.1).mean())
        absurd = rest.head(200).assign(**ABSURD[name])
        results.append((predict(model, absurd)["unlike"] < OOD_LEVEL).mean())
        assert set(unusual(model, absurd)) <= {*ABSURD[name], ""}
    assert np.mean(flagged) <= OOD_LEVEL and np.mean(results) > 0.99
    assert abs(np.mean(low) - 0.1) < 0.02


def test_distances_are_those_of_leaving_each_patient_out(rows):
    study = load_study("rotterdam")
    train = with_holes(study, rows["rotterdam"].dropna(subset="y").head(60), share=0.1)
    model = fit(study, train.assign(y=np.arange(60) % 2))
    x = model.encoded(train)
    slow = []
    for i in range(60):
        others = np.delete(x, i, axis=0)
        spread = (others - others.mean(axis=0)).T @ (others - others.mean(axis=0))
        away = x[i] - others.mean(axis=0)
        slow.append(away @ np.linalg.inv(spread + np.eye(x.shape[1])) @ away)
    np.testing.assert_allclose(model.distances_, np.sort(slow), rtol=1e-7)
    share = [(1 + (np.array(slow) >= d).sum()) / 61 for d in np.sort(slow)]
    seen = rows["rotterdam"].tail(300)
    away = model.encoded(seen) - x.mean(axis=0)
    squared = (away @ model.precision_ * away).sum(axis=1)
    count = (np.array(slow)[:, None] >= squared).sum(axis=0)
    inside = count > 0
    expected = (count[inside] + 1) / 61
    np.testing.assert_allclose(predict(model, seen)["unlike"][inside], expected)
    assert (predict(model, seen)["unlike"][~inside] <= 1 / 61).all() and min(share) == 2 / 61


def test_a_gap_or_a_level_that_no_patient_had_is_named(rows):
    study = load_study("rotterdam")
    model = fit(study, rows["rotterdam"])
    patient = rows["rotterdam"].iloc[7].to_dict()
    changes = [{}, {"er": None}, {"grade": "1"}, {"age": 110.0}, {"size": None}]
    table = pd.DataFrame([patient | change for change in changes])
    assert unusual(model, table) == ["", "er", "grade", "age", "size"]
    assert [unusual(model, patient | change)[0] for change in changes] == unusual(model, table)
    assert unusual(model, table.head(0)) == []


def test_many_training_patients_are_stored_as_quantiles_and_equal_ones_give_an_answer(rows):
    study, train = load_study("monica"), rows["monica"]
    many = pd.concat([train] * 3)
    model = fit(study, many)
    assert len(model.distances_) == MOST_DISTANCES
    ood = predict(model, train)["unlike"].to_numpy()
    squared = model.distances_
    assert (np.diff(squared) >= 0).all() and abs(np.quantile(ood, 0.5) - 0.5) < 0.02
    same = pd.concat([train.head(1)] * 30).assign(y=np.arange(30) % 2)
    flat = fit(study, same)
    assert predict(flat, same)["unlike"].tolist() == [1.0] * 30
    other = predict(flat, train.iloc[1].to_dict() | {"age": 68.0})["unlike"][0]
    assert 0 < other < OOD_LEVEL


@pytest.mark.parametrize("family", ["logistic", "boosting"])
def test_contributions_add_up_after_two_recalibrations(family, fitted, rows):
    model = fitted[family].recalibrated(0.4, 1.2).recalibrated(-0.1, 0.9)
    seen = rows["rotterdam"].tail(80)
    base, reasons = contributions(model, seen)
    allowed = 1e-9 if family == "logistic" else 1e-6
    assert np.abs(base + reasons.sum(axis=1) - model.log_odds(seen)).max() < allowed
    expected = -0.1 + 0.9 * (0.4 + 1.2 * fitted[family].log_odds(seen))
    assert np.allclose(model.log_odds(seen), expected, atol=1e-12)
    ratio = model.standard_error(seen) / fitted[family].standard_error(seen)
    assert np.allclose(ratio, 0.9 * 1.2)


def test_contributions_are_those_of_shap(fitted, rows):
    import shap

    seen, train = rows["rotterdam"].tail(40), rows["rotterdam"].head(1200)
    train = train[train["y"].notna()]
    model = fitted["logistic"]
    masker = shap.maskers.Independent(model.encoded(train), max_samples=len(train))
    linear = shap.LinearExplainer(
        (model.estimator_.coef_[0], model.estimator_.intercept_[0]), masker
    )
    per_column = pd.DataFrame(linear.shap_values(model.encoded(seen))).T
    theirs = per_column.groupby(owners(model.encoder_), sort=False).sum().T
    assert np.abs(theirs.to_numpy() - contributions(model, seen)[1].to_numpy()).max() < 1e-9


@pytest.mark.slow
def test_delta_method_agrees_with_bootstrap(rows):
    """Median ratio of the standard errors within 0.85 to 1.3 (60 bootstrap fits)."""
    study, train = load_study("monica"), rows["monica"].head(900)
    rng = np.random.default_rng(3)
    seen, model = rows["monica"].tail(200), fit(study, train)
    again = (train.iloc[rng.integers(0, len(train), len(train))] for _ in range(60))
    spread = np.std([fit(study, sample).log_odds(seen) for sample in again], axis=0, ddof=1)
    assert 0.85 < np.median(model.standard_error(seen) / spread) < 1.3


def test_poor_data_neither_crash_nor_give_nan(rows):
    study, train = load_study("rotterdam"), rows["rotterdam"].head(500)
    train = train.assign(er=np.nan, age=60.0, size=np.nan, grade="2")
    for family in ("logistic", "boosting"):
        model = fit(study, train, family, members=2, trees=5)
        empty = dict.fromkeys(study.feature_names)
        for row in (empty, empty | {"size": "enormous"}, rows["rotterdam"].iloc[-1].to_dict()):
            assert np.isfinite(predict(model, row).to_numpy()).all()
            assert np.isfinite(contributions(model, row)[1].to_numpy()).all()


def test_perfect_separation_stays_finite(rows):
    study = load_study("monica")
    train = rows["monica"].head(300)
    train = train.assign(y=(train["age"] > 60).astype(float))
    answer = predict(fit(study, train), train)
    assert np.isfinite(answer.to_numpy()).all() and (answer["high"] < 1).all()


@pytest.mark.slow
def test_same_fit_same_fingerprint_in_fresh_processes():
    code = (
        "from lm.core.study import load_study; from lm.core.study_rows import read_rows\n"
        "from lm.model.predict import fit\n"
        "s = load_study('monica'); r = read_rows(s)\n"
        "print(*[fit(s, r.head(600), k, members=3, trees=20).fingerprint()"
        " for k in ('logistic', 'boosting')])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()[1]) == 64


def test_refused_fits(rows):
    study, train = load_study("monica"), rows["monica"].head(200)
    for frame, arguments in (
        (train.head(10), {}),
        (train.assign(y=1.0), {}),
        (train.assign(y=np.nan), {}),
        (train.drop(columns="age"), {}),
        (train, {"depth": 2}),
        (train, {"family": "oracle"}),
    ):
        with pytest.raises(LMError):
            fit(study, frame, **arguments)
    with pytest.raises(LMError):
        RiskModel(study.features).fit(train, train["y"]).recalibrated(np.nan)


@pytest.mark.parametrize("name", STUDIES)
def test_every_value_of_every_study_has_text(name, rows):
    study = load_study(name)
    for feature in study.features:
        for value in (*feature.levels, feature.low, feature.high, None, np.nan):
            message = finding_wording(feature, value)
            assert (
                message == message.strip() and "nan" not in message.split() and ":" not in message
            )
    contributions = {f: (-1) ** i * 0.5 for i, f in enumerate(study.feature_names)}
    row = rows[name].iloc[0].to_dict()
    text = sentence(study, row, 0.424, 0.38, 0.46, 0.3, contributions)
    start = f"Risk of {study.outcome}: 42 % (95 % interval 38 to 46 %), higher than the mean"
    assert text.startswith(start) and text.endswith(".") and len(text) < 400


def test_percent_has_sensible_ends():
    assert [percent(p) for p in (0, 1e-9, 0.0099, 0.01, 0.5, 0.99, 0.995, 1)] == [
        *("<1 %", "<1 %", "<1 %", "1 %", "50 %", "99 %", ">99 %", ">99 %")
    ]


@pytest.mark.parametrize("value", ["120_80", "63", b"63", True, np.True_])
def test_text_and_booleans_are_no_numbers_for_a_model(fitted, rows, value):
    study = load_study("rotterdam")
    for frame in (pd.Series([value, 50.0], dtype=object), pd.Series([value, value])):
        seen = design(study.features, read_rows(study).head(2)).assign(age=frame)
        with pytest.raises(LMError, match="'age' holds a value that is not a number"):
            columns(study.features, seen)

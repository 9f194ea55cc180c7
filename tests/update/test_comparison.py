"""Two models on the same patients: sums that are exact, regions that are honest, words that fit."""

import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.synthetic import Drift, synthetic
from lm.model.metrics import NONE
from lm.model.predict import fit
from lm.update.comparison import (
    Condition,
    Region,
    agreement,
    carriers,
    change_sentence,
    compare_models,
    difference_quantiles,
    log_odds_parts,
    model_change,
    patient_change,
    regions,
    risk_differences,
    split_change,
    who_was_right,
)

STUDY = load_study("rotterdam")
WOMEN = synthetic(STUDY, 3000, seed=41, drift=Drift("treatment", 1000))
BEFORE, LATER = WOMEN[2000:2030].reset_index(drop=True), WOMEN[2400:].reset_index(drop=True)
AFTER = BEFORE.assign(age=BEFORE["age"] + 2, nodes=BEFORE["nodes"][::-1].to_numpy())
MODELS = {
    "logistic": lambda: fit(STUDY, WOMEN[:1000]),
    "later": lambda: fit(STUDY, WOMEN[1000:2000], C=0.1),
    "recalibrated": lambda: fit(STUDY, WOMEN[:1000]).recalibrated(0.4, 0.7),
    "boosting": lambda: fit(STUDY, WOMEN[:1000], "boosting", trees=30, members=2),
    "forest": lambda: fit(STUDY, WOMEN[:1000], "forest", trees=20),
    "ensemble": lambda: fit(STUDY, WOMEN[:1000], "ensemble", trees=20, members=2),
    "boosting, turned": lambda: fit(
        STUDY, WOMEN[1000:2000], "boosting", trees=30, members=2
    ).recalibrated(-0.2, 1.3),
}


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


PAIRS = [("logistic", name) for name in MODELS] + [(name, "later") for name in MODELS]


@pytest.mark.parametrize(("old", "new"), [*PAIRS, ("boosting", "boosting, turned")])
def test_the_split_is_exact_for_any_pair_of_models(models, old, new):
    old, new = models[old], models[new]
    data, model = split_change(old, BEFORE, new, AFTER)
    whole = new.log_odds(AFTER) - old.log_odds(BEFORE)
    assert np.abs((data + model).sum(axis=1) - whole).max() < 1e-9
    end = log_odds_parts(new, AFTER) - log_odds_parts(old, BEFORE)
    assert np.abs(data + model - end).to_numpy().max() < 1e-9
    same_data = split_change(old, BEFORE, new, BEFORE.copy())[0]
    assert not same_data.to_numpy().any()
    assert not split_change(old, BEFORE, old, AFTER)[1].to_numpy().any()
    back = split_change(new, AFTER, old, BEFORE)
    assert all(np.allclose(a, -b, atol=1e-12) for a, b in zip((data, model), back, strict=True))


def test_the_parts_are_shapleys_mean_over_both_orders(models):
    old, new = models["logistic"], models["boosting"]
    data, model = split_change(old, BEFORE, new, AFTER)
    f = {
        (i, j): m.log_odds(x) for i, m in ((0, old), (1, new)) for j, x in ((0, BEFORE), (1, AFTER))
    }
    data_first, model_first = f[0, 1] - f[0, 0], f[1, 0] - f[0, 0]
    data_last, model_last = f[1, 1] - f[1, 0], f[1, 1] - f[0, 1]
    assert np.allclose(data.sum(axis=1), (data_first + data_last) / 2, atol=1e-9)
    assert np.allclose(model.sum(axis=1), (model_first + model_last) / 2, atol=1e-9)


@pytest.mark.parametrize("new", ["logistic", "later", "boosting, turned", "ensemble"])
def test_one_patient_has_the_same_split_as_in_a_table(models, new):
    result = patient_change(
        models["logistic"], BEFORE.iloc[3].to_dict(), models[new], AFTER.iloc[3].to_dict()
    )
    data, model = (
        part.iloc[3] for part in split_change(models["logistic"], BEFORE, models[new], AFTER)
    )
    assert np.allclose(result.data, data, atol=1e-12)
    assert np.allclose(result.model, model, atol=1e-12)
    assert result.log_odds == pytest.approx(float(data.sum() + model.sum()), abs=1e-9)
    risks = result.risk_after - result.risk_before
    assert result.data_risk + result.model_risk == pytest.approx(risks, abs=1e-12)
    assert result.same_model == (new == "logistic")
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_feature_that_did_not_change_has_no_data_part_in_a_regression(models):
    data, _ = split_change(models["logistic"], BEFORE, models["later"], AFTER)
    quiet = [name for name in data if name not in ("age", "nodes", "base")]
    assert not data[quiet].to_numpy().any() and np.abs(data["base"]).max() < 1e-9
    assert (np.sign(data["age"]) == np.sign(data["age"].iloc[0])).all()


def test_a_common_reference_takes_the_training_patients_out_of_the_comparison(models):
    model = models["logistic"]
    moved = copy.copy(model)
    moved.estimator_ = copy.copy(model.estimator_)
    moved.estimator_.middle_ = model.estimator_.middle_ + 1.0
    row = BEFORE.iloc[0].to_dict()
    naive = patient_change(model, row, moved, row)
    fair = patient_change(model, row, moved, row, reference=LATER)
    assert np.abs(naive.model).max() > 0.1 and abs(naive.log_odds) < 1e-9
    assert np.abs(fair.model).max() < 1e-9
    assert np.abs(model_change(model, moved, LATER)).to_numpy().max() < 1e-9


def test_a_study_that_has_gained_a_feature_can_still_be_compared(models):
    smaller = replace(STUDY, features=STUDY.features[:-1])
    old = fit(smaller, WOMEN[:1000])
    data, model = split_change(old, BEFORE, models["logistic"], AFTER)
    assert list(data) == ["base", *STUDY.feature_names]
    whole = models["logistic"].log_odds(AFTER) - old.log_odds(BEFORE)
    assert np.abs((data + model).sum(axis=1) - whole).max() < 1e-9
    assert compare_models(STUDY, old, models["logistic"], LATER).judged > 0


def test_tables_of_different_length_and_absent_features_are_refused(models):
    model = models["logistic"]
    with pytest.raises(LMError, match="must be the same, in the same order"):
        split_change(model, BEFORE, model, AFTER[:-1])
    with pytest.raises(LMError, match="must be the same"):
        split_change(model, BEFORE, model, BEFORE.iloc[0].to_dict())
    with pytest.raises(LMError):
        patient_change(model, {"age": 50.0}, model, {"age": 51.0})
    with pytest.raises(LMError, match="no patient"):
        risk_differences(model, model, LATER[:0])


def test_agreement_by_hand():
    old = np.array([0.1, 0.1, 0.3, 0.5])
    new = np.array([0.1, 0.3, 0.1, 0.6])
    logit = {k: np.log(r / (1 - r)) for k, r in (("old", old), ("new", new))}
    table = pd.DataFrame(
        {"risk_old": old, "risk_new": new, "risk": new - old}
        | {"log_odds_old": logit["old"], "log_odds_new": logit["new"]}
        | {"log_odds": logit["new"] - logit["old"]}
    )
    result = agreement(replace(STUDY, thresholds=(0.2,)), table)
    spread = np.std(new - old, ddof=1)
    assert result.loc["risk, mean", "value"] == pytest.approx(0.025)
    assert result.loc["risk, upper limit", "value"] == pytest.approx(0.025 + 1.959964 * spread)
    wide = 1.959964 * spread * np.sqrt(1 / 4 + 1.959964**2 / 6)
    row = result.loc["risk, lower limit"]
    assert row["high"] - row["value"] == pytest.approx(wide)
    assert result.loc[["up across 0.2", "down across 0.2"], "value"].tolist() == [0.25, 0.25]
    assert result.loc["beyond 0.05", "value"] == 0.75
    assert result.loc["correlation", "value"] == pytest.approx(np.corrcoef(*logit.values())[0, 1])
    assert difference_quantiles(table).loc[[0, 1], "risk"].tolist() == pytest.approx([-0.2, 0.2])


def test_the_limits_hold_their_share_of_normal_differences():
    rng = np.random.default_rng(4)
    inside = []
    for _ in range(60):
        d = rng.normal(0.02, 0.03, 200)
        table = pd.DataFrame({"risk": d, "risk_old": 0.3, "risk_new": 0.3 + d, "log_odds": d})
        table = table.assign(log_odds_old=rng.normal(size=200), log_odds_new=0.0)
        result = agreement(STUDY, table)
        row = result.loc["risk, upper limit"]
        inside.append(row["low"] < 0.02 + 1.959964 * 0.03 < row["high"])
        assert np.isnan(result.loc["correlation", "value"])
    assert 0.90 <= np.mean(inside) <= 0.99


def test_shares_add_up_and_name_the_feature_that_carries_the_difference(models):
    moved = model_change(models["logistic"], models["later"], LATER)
    result = carriers(moved)
    assert result["share"].sum() == pytest.approx(1) and result.index[0] == "er"
    total = moved.sum(axis=1)
    by_hand = np.cov(moved["er"], total, ddof=0)[0, 1] / total.var(ddof=0)
    assert result.loc["er", "share"] == pytest.approx(by_hand)
    assert np.abs(moved.drop(columns="base").mean()).max() < 1e-12
    one = carriers(model_change(models["logistic"], models["later"], LATER[:1]))
    assert not one["share"].any() and one.notna().all(axis=None)


def test_a_treatment_of_some_is_detected_where_it_was_applied():
    treated = (WOMEN["er"] > 60).to_numpy()
    first = regions(STUDY, WOMEN, np.where(treated, -0.1, 0.0), depth=1)[0]
    at = WOMEN.loc[~treated, "er"].max()
    assert (first.holds(WOMEN) == treated).all() and first.patients == treated.sum()
    assert first.label == f"oestrogen receptor above {at:g} fmol/mg protein"
    assert first.difference.value == pytest.approx(-0.1)


@pytest.mark.parametrize("study", ["rotterdam", "monica"])
def test_regions_part_the_patients_and_their_text_say_who_is_in(study):
    study = load_study(study)
    rng = np.random.default_rng(1)
    people = synthetic(study, 600, seed=3)
    for name in study.feature_names[:4]:
        people[name] = people[name].mask(rng.random(600) < 0.2)
    wave = np.sin(people[study.numbers[0]].fillna(0)) + people[study.levels[0]].isna()
    result = regions(study, people, wave, depth=3)
    inside = np.array([place.holds(people) for place in result])
    assert (inside.sum(axis=0) == 1).all() and len(result) > 3
    assert [place.patients for place in result] == inside.sum(axis=1).tolist()
    assert len({place.label for place in result}) == len(result)
    assert not any(word in p.label for p in result for word in ("nan", "inf", "None", "  "))


def test_conditions_in_text():
    er, size, hormon = (STUDY.feature(name) for name in ("er", "size", "hormon"))
    values = pd.Series([10.0, 60.0, 61.0, np.nan])
    above = Condition(er, low=60.0, missing=True)
    assert above.holds(values).tolist() == [False, False, True, True]
    assert above.label.endswith("above 60 fmol/mg protein or oestrogen receptor not known")
    only = Condition(er, low=np.inf, missing=True)
    assert only.label == "oestrogen receptor not known"
    assert only.holds(values).tolist() == [False, False, False, True]
    two = Condition(size, levels=("20-50", ">50"))
    assert two.holds(pd.Series(["<=20", ">50", None])).tolist() == [False, True, False]
    assert Condition(hormon, levels=("no",)).label == "no hormone treatment"
    assert Region((), 5, NONE).label == "all patients" and Region((), 5, NONE).holds(LATER).all()


def test_the_interval_holds_where_there_is_nothing_to_find():
    rng, covered, naive = np.random.default_rng(9), [], []
    for seed in range(80):
        noise = rng.normal(0, 0.1, len(LATER))
        first = regions(STUDY, LATER, noise, seed=seed)[0]
        covered.append(first.difference.low < 0 < first.difference.high)
        half = np.random.default_rng(seed).permutation(len(LATER)) < len(LATER) // 2
        own = noise[first.holds(LATER) & half]
        naive.append(abs(own.mean()) < 1.96 * own.std(ddof=1) / np.sqrt(len(own)))
    assert np.mean(covered) >= 0.88 and np.mean(naive) < 0.5


def test_who_was_right_asks_only_known_outcomes_of_the_region(models):
    table = risk_differences(models["logistic"], models["later"], LATER)
    inside = (LATER["er"] > 60).to_numpy()
    y = LATER["y"].where(LATER.index % 2 == 0)
    result, judged = who_was_right(y, table, inside)
    rows = inside & y.notna().to_numpy()
    loss = (table["risk_new"] - LATER["y"]) ** 2 - (table["risk_old"] - LATER["y"]) ** 2
    assert judged == rows.sum() and result.value == pytest.approx(loss[rows].mean())
    assert result.high < 0


def test_the_report_is_ready_for_json_and_the_same_every_time(models):
    reports = [compare_models(STUDY, models["logistic"], models["later"], LATER) for _ in range(2)]
    texts = [json.dumps(r.to_dict(), allow_nan=False) for r in reports]
    assert texts[0] == texts[1] and "er" in reports[0].to_dict()["carriers"]
    for few in (LATER[:1], LATER[:25].drop(columns="y")):
        small = compare_models(STUDY, models["logistic"], models["later"], few)
        json.dumps(small.to_dict(), allow_nan=False)
        assert "nan" not in small.text and "No group of patients" in small.text


def row(**values):
    return BEFORE.iloc[0][STUDY.feature_names].to_dict() | values


@pytest.mark.parametrize(
    ("old", "new", "then", "now", "wanted"),
    [
        ("logistic", "logistic", {}, {}, "Neither the findings nor the model have changed."),
        ("logistic", "later", {}, {}, "No finding has changed. The change of the model alone"),
        ("logistic", "logistic", {"nodes": 0.0}, {"nodes": 9.0}, "New findings raised it by "),
        (
            "logistic",
            "logistic",
            {"nodes": 9.0},
            {"nodes": 0.0},
            "New findings lowered it by ",
        ),
        ("logistic", "logistic", {"er": None}, {"er": np.nan}, "Neither the findings"),
        (
            "logistic",
            "logistic",
            {"size": "<=20"},
            {"size": None},
            "tumour size not known (before: ≤20",
        ),
        ("logistic", "recalibrated", {}, {}, "through its base value"),
        ("boosting", "boosting, turned", {"nodes": 0.0}, {"nodes": 9.0}, "9 positive lymph nodes"),
    ],
)
def test_the_clinicians_sentence(models, old, new, then, now, wanted):
    result = patient_change(models[old], row(**then), models[new], row(**now))
    text = change_sentence(STUDY, result)
    assert wanted in text and text.startswith(f"Risk of {STUDY.outcome}: ")
    assert not any(word in text for word in ("nan", "None", " 0.0 percentage"))


def test_a_crossed_threshold_is_named_and_a_stored_one_is_not(models):
    low, high = row(nodes=0.0, size="<=20"), row(nodes=30.0, size=">50", grade="3")
    result = patient_change(models["logistic"], low, models["logistic"], high)
    assert result.risk_before < 0.2 < 0.4 < result.risk_after
    assert "now above 20 % and 40 %" in change_sentence(STUDY, result)
    result = patient_change(models["logistic"], high, models["logistic"], low)
    assert "now below 20 % and 40 %" in change_sentence(STUDY, result)
    result = patient_change(
        models["logistic"], low, models["logistic"], low | {"age": low["age"] + 1}
    )
    assert "would act" not in change_sentence(STUDY, result)


def test_many_changes_are_counted_not_listed(models):
    now = row(age=80.0, nodes=20.0, size=">50", er=900.0, pgr=1.0)
    result = patient_change(models["logistic"], row(size="<=20"), models["logistic"], now)
    assert len(result.changed) == 5 and " and 2 more." in change_sentence(STUDY, result)

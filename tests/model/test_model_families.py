"""One contract for all model families: weights, chosen features, identity, explanations, files."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.base import clone

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.model.explain import contributions
from lm.model.model_files import TRUSTED, read_model, write_model
from lm.model.predict import FAMILIES, RiskModel, fit, predict, unusual
from lm.model.registry import recipe
from lm.model.shapley import exact_sets, ordered_sets

STUDY = load_study("rotterdam")
ROWS = read_rows(STUDY)
TRAIN, LATER = ROWS.dropna(subset="y").head(500), ROWS.tail(60)
SMALL = {"members": 3, "trees": 9}
FEW = ("age", "nodes", "size")
each = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def fitted():
    return {family: fit(STUDY, TRAIN, family, **SMALL) for family in FAMILIES}


@pytest.fixture(scope="module")
def chosen():
    return {family: fit(STUDY, TRAIN, family, selected=FEW, **SMALL) for family in FAMILIES}


def holes(frame, share=0.3):
    rng, frame = np.random.default_rng(0), frame.copy()
    for name in STUDY.feature_names:
        frame.loc[rng.random(len(frame)) < share, name] = np.nan
    frame.loc[frame.index[0], "size"] = "enormous"
    return frame


@each
def test_answers_are_in_order_finite_and_the_same_alone_or_in_company(family, fitted):
    model, seen = fitted[family], holes(LATER)
    answer = predict(model, seen)
    assert np.isfinite(answer.to_numpy()).all()
    assert ((answer.low > 0) & (answer.low < answer.risk) & (answer.risk < answer.high)).all()
    assert (answer.high < 1).all() and len(predict(model, seen.head(0))) == 0
    shuffled = predict(model, seen[sorted(seen)].sample(frac=1, random_state=1))
    assert shuffled.loc[seen.index].equals(answer)
    alone = pd.concat([predict(model, row) for row in seen.head(8).to_dict("records")])
    assert (alone.to_numpy() == answer.head(8).to_numpy()).all()
    assert abs(model.average_risk - TRAIN["y"].mean()) < 0.05


@each
def test_many_members_give_the_same_bits_alone_and_in_company(family):
    model = fit(STUDY, TRAIN, family, trees=20)
    answer = predict(model, LATER)
    for i in (0, 7):
        assert (predict(model, LATER.iloc[i].to_dict()).iloc[0] == answer.iloc[i]).all()


@each
def test_contributions_add_up_recalibrated_too(family, fitted):
    model = fitted[family].recalibrated(0.4, 1.2).recalibrated(-0.1, 0.9)
    seen = holes(LATER).head(20)
    base, reasons = contributions(model, seen)
    allowed = FAMILIES[family].tolerance
    assert np.abs(base + reasons.sum(axis=1) - model.log_odds(seen)).max() < allowed
    alone = contributions(model, seen.iloc[3].to_dict())[1]
    assert np.allclose(alone.iloc[0], reasons.iloc[3], atol=1e-12)
    plain = fitted[family]
    assert np.allclose(model.log_odds(seen), -0.1 + 0.9 * (0.4 + 1.2 * plain.log_odds(seen)))
    assert np.allclose(model.standard_error(seen), 1.08 * plain.standard_error(seen))


@each
def test_only_chosen_features_count_and_all_are_asked_for(family, chosen):
    model = chosen[family]
    reasons = contributions(model, LATER.head(10))[1]
    assert list(reasons) == STUDY.feature_names
    assert (reasons.drop(columns=list(FEW)) == 0).all(axis=None)
    assert (reasons[list(FEW)] != 0).any().all()
    other = LATER.assign(er=np.nan, pgr=5.0, grade="3", hormon="yes")
    assert (model.log_odds(other) == model.log_odds(LATER)).all()
    assert (model.standard_error(other) == model.standard_error(LATER)).all()
    assert unusual(model, LATER.iloc[0].to_dict() | {"er": 4.0e7}) == ["er"]
    with pytest.raises(LMError, match="lack"):
        model.log_odds(LATER.drop(columns="er"))


@each
def test_fingerprint_is_equal_for_the_same_fit_and_differs_for_any_other(family, fitted, chosen):
    same = clone(fitted[family]).fit(TRAIN[sorted(TRAIN)], TRAIN["y"])
    assert same.fingerprint() == fitted[family].fingerprint() != chosen[family].fingerprint()
    others = [fitted[family].recalibrated(0.1)]
    others.append(fit(STUDY, TRAIN.head(499), family, **SMALL))
    others.append(fit(STUDY, TRAIN, family, weights=1 + np.arange(500) % 2, **SMALL))
    others.append(fit(STUDY, TRAIN, family, knots=5, **SMALL))
    assert len({m.fingerprint() for m in [same, *others]}) == 5


@each
def test_the_file_gives_the_same_bits_and_holds_trusted_types_only(family, fitted, tmp_path):
    import skops.io

    write_model(fitted[family], tmp_path / "m.skops")
    assert set(skops.io.get_untrusted_types(file=tmp_path / "m.skops")) <= set(TRUSTED)
    loaded, model = read_model(tmp_path / "m.skops"), fitted[family]
    assert loaded.fingerprint() == model.fingerprint()
    assert predict(loaded, LATER).equals(predict(model, LATER))
    again = contributions(loaded, LATER.head(3))[1]
    assert again.equals(contributions(model, LATER.head(3))[1])
    assert (loaded.draws(LATER, 5) == model.draws(LATER, 5)).all()


@each
def test_weight_zero_is_an_absent_row_and_weight_one_no_weight(family, fitted):
    keep = np.arange(500) % 5 > 0
    weighted = fit(STUDY, TRAIN, family, weights=keep.astype(int), **SMALL)
    assert weighted.fingerprint() == fit(STUDY, TRAIN[keep], family, **SMALL).fingerprint()
    ones = fit(STUDY, TRAIN, family, weights=np.ones(500), **SMALL)
    assert ones.fingerprint() == fitted[family].fingerprint()


@each
def test_whole_weights_are_repeated_rows(family):
    """Regressions to 1e-6 of the log-odds; trees, which chance and bins part, in the main."""
    train = holes(TRAIN, 0.1)
    count, size = 1 + np.arange(500) % 3, {"members": 3, "trees": 60}
    weighted = fit(STUDY, train, family, weights=count, **size)
    repeated = fit(STUDY, train.loc[train.index.repeat(count)], family, **size)
    a, b = weighted.log_odds(LATER), repeated.log_odds(LATER)
    if FAMILIES[family].closed_test:
        assert np.abs(a - b).max() < 1e-6
        ratio = weighted.standard_error(LATER) / repeated.standard_error(LATER)
        assert 1 < np.median(ratio) < 1.6
    else:
        assert np.corrcoef(a, b)[0, 1] > 0.75 and abs(expit(a).mean() - expit(b).mean()) < 0.05


@each
def test_poor_data(family):
    flat = TRAIN.assign(er=np.nan, age=60.0, size=np.nan)
    few = TRAIN.head(20).assign(y=np.arange(20) % 2)
    weights = np.linspace(0.1, 3, 500)
    for model in (
        fit(STUDY, flat, family, **SMALL),
        fit(STUDY, flat, family, weights=weights, **SMALL),
        fit(STUDY, few, family, **SMALL),
        fit(STUDY, flat, family, selected=("er",), **SMALL),
    ):
        empty = dict.fromkeys(STUDY.feature_names)
        for row in (empty, LATER.iloc[0].to_dict()):
            assert np.isfinite(predict(model, row).to_numpy()).all()
            assert np.isfinite(contributions(model, row)[1].to_numpy()).all()


@each
def test_truths_spread_as_the_standard_error_says(family):
    model = fit(STUDY, TRAIN, family, members=10, trees=20)
    truths = model.draws(LATER, 400, seed=2)
    assert np.array_equal(truths, model.draws(LATER, 400, seed=2)) and truths.shape == (400, 60)
    ratio = truths.std(axis=0) / model.standard_error(LATER)
    assert abs(np.median(ratio) - 1) < 0.15


def test_refusals():
    for arguments in (
        {"weights": np.ones(3)},
        {"weights": -np.ones(500)},
        {"weights": np.zeros(500)},
        {"weights": np.full(500, np.nan)},
        {"selected": ()},
        {"selected": ("age", "shoe size")},
        {"family": "splines", "knots": 2},
        {"family": "forest", "members": 1},
        {"family": "oracle"},
    ):
        with pytest.raises(LMError):
            fit(STUDY, TRAIN, **arguments)


def test_sandwich_tells_chance_of_weighted_fits():
    """Standard error against refits with the same weights: median ratio 0.75 to 1.4 (25 refits)."""
    rng, pool = np.random.default_rng(1), ROWS.dropna(subset="y").head(1000)
    weights = np.where(pool["nodes"] > 3, 6.0, 1.0)
    model, refits = RiskModel(STUDY.features).fit(pool, pool["y"], weights), []
    for _ in range(25):
        i = rng.integers(0, len(pool), len(pool))
        again = RiskModel(STUDY.features).fit(pool.iloc[i], pool["y"].iloc[i], weights[i])
        refits.append(again.log_odds(LATER))
    spread = np.std(refits, axis=0, ddof=1)
    assert 0.75 < np.median(model.standard_error(LATER) / spread) < 1.4


def test_splines_find_a_bend_that_the_straight_line_misses():
    rng = np.random.default_rng(5)
    risk = expit(0.004 * (TRAIN["age"] - 55) ** 2 - 1.5)
    bent = TRAIN.assign(y=(rng.random(500) < risk).astype(float))
    age = LATER.head(1).loc[LATER.index[:1].repeat(3)].assign(age=[35.0, 55.0, 80.0])
    low, middle, high = fit(STUDY, bent, "splines", knots=5).log_odds(age)
    straight = fit(STUDY, bent).log_odds(age)
    assert min(low, high) > middle + 0.5 and straight[1] not in (min(straight), max(straight))
    twos = fit(STUDY, bent.assign(nodes=1.0), "splines")
    assert "nodes" not in twos.estimator_.design_owner(twos.columns)[len(twos.used_) :]


def test_ensemble_is_the_mean_probability_of_its_parts(fitted):
    model = fitted["ensemble"]
    parts, x = ("splines", "boosting", "forest"), model.encoded(LATER)
    alone = [fitted[name].raw(x) for name in parts]
    assert np.allclose(expit(model.raw(x)), np.mean(expit(alone), axis=0), atol=1e-12)
    result = recipe(model)["ensemble"]
    assert all(name in result for name in (*parts, "mean probability", "columns"))


@pytest.mark.slow
def test_forest_errs_as_a_bootstrap_of_forests_says():
    """Standard error against 10 forests of resampled patients: median ratio 0.5 to 1.7."""
    rng, pool = np.random.default_rng(2), ROWS.dropna(subset="y").head(600)
    model, refits = fit(STUDY, pool, "forest"), []
    for _ in range(10):
        again = pool.iloc[rng.integers(0, len(pool), len(pool))]
        refits.append(fit(STUDY, again, "forest").log_odds(LATER))
    spread = np.std(refits, axis=0, ddof=1)
    assert 0.5 < np.median(model.standard_error(LATER) / spread) < 1.7


def test_learning_on_comes_close_to_a_fit_of_everything():
    pool = ROWS.dropna(subset="y")
    first, second = pool.head(600), pool.iloc[600:1400]
    start, whole = fit(STUDY, first, "incremental"), fit(STUDY, pool.head(1400))
    before, grown = start.fingerprint(), start.learned(second, second["y"])
    one = start
    for row in second.head(40).to_dict("records"):
        one = one.learned(row, [row["y"]])
    together = start.learned(second.head(40), second["y"].head(40))
    assert one.fingerprint() == together.fingerprint() and start.fingerprint() == before
    off = [np.abs(m.log_odds(LATER) - whole.log_odds(LATER)).mean() for m in (start, grown)]
    assert off[1] < off[0] / 2 and (grown.standard_error(LATER) < start.standard_error(LATER)).all()
    assert np.abs(grown.estimator_.covariance_ - grown.estimator_.covariance_.T).max() < 1e-12
    assert (np.linalg.eigvalsh(grown.estimator_.covariance_) > 0).all()
    base, reasons = contributions(grown, LATER)
    assert np.abs(base + reasons.sum(axis=1) - grown.log_odds(LATER)).max() < 1e-9
    shifted = start.recalibrated(-1.0, 0.5).learned(second, second["y"])
    risk = expit(shifted.log_odds(second)).mean()
    assert abs(risk - second["y"].mean()) < abs(
        expit(start.recalibrated(-1.0, 0.5).log_odds(second)).mean() - second["y"].mean()
    )


def test_who_cannot_learn_on(fitted):
    for model, y in (
        (fitted["logistic"], TRAIN["y"].head(3)),
        (fitted["incremental"], [1, 0]),
        (fitted["incremental"], [1, 0, np.nan]),
    ):
        with pytest.raises(LMError, match=r"learn|as many outcomes"):
            model.learned(TRAIN.head(3), y)
    nothing = fitted["incremental"].learned(TRAIN.head(0), [])
    assert nothing.fingerprint() == fitted["incremental"].fingerprint()


@pytest.mark.parametrize("d", [1, 2, 5, 9])
def test_sets_of_features_give_shapley_values(d):
    """Efficiency, and the closed form for a game of single and paired gains."""
    rng = np.random.default_rng(d)
    single, pair = rng.normal(size=d), np.triu(rng.normal(size=(d, d)), 1)
    for on, weights in (exact_sets(d), ordered_sets(d)):
        game = on @ single + np.einsum("ki,ij,kj->k", on, pair, on)
        result = weights @ game
        assert abs(result.sum() - single.sum() - pair.sum()) < 1e-9
        assert np.allclose(result, single + (pair + pair.T).sum(axis=1) / 2)

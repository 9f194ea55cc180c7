"""Training: no look-ahead, no optimism from choosing features, one rule for the winner."""

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.study import Feature, load_study
from lm.core.study_rows import read_rows
from lm.model.metrics import by_subgroups
from lm.model.predict import FAMILIES, RiskModel, fit
from lm.model.selection import (
    SEARCHED,
    Candidate,
    as_good,
    calibration_svg,
    candidates,
    errors_by_subgroup,
    folds,
    hold_out,
    largest_errors,
    maturity_times,
    record_of,
    search,
    select,
    simplicity,
)

MONICA, ROTTERDAM = load_study("monica"), load_study("rotterdam")


@cache
def history(name):
    """The study's rows with a known outcome."""
    rows = read_rows(load_study(name))
    rows = rows[rows["y"].notna()]
    return rows[rows["arrived"] < "1990-01-01"].reset_index(drop=True)


@cache
def small():
    """A small search on monica, and the rows it was made of."""
    rows = history("monica").head(900)
    return search(MONICA, rows, ["logistic", "boosting"], n=4, n_folds=2, seed=2), rows


def drawn(study, n, seed, y=None):
    """Patients whose outcome has nothing to do with their features."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(n, len(study.features))), columns=study.feature_names)
    frame["arrived"] = pd.Timestamp("1980-01-01") + pd.to_timedelta(np.arange(n), "D")
    return frame.assign(y=rng.integers(0, 2, n).astype(float) if y is None else y)


def noise(count):
    """A study of `count` features that mean nothing."""
    features = [Feature(f"x{i}", "number", f"noise {i}", "", -9.0, 9.0) for i in range(count)]
    return replace(MONICA, features=tuple(features), subgroups=(), thresholds=())


@pytest.mark.parametrize("study", [MONICA, ROTTERDAM], ids=["monica", "rotterdam"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_no_outcome_that_was_unknown_at_the_first_tested_arrival_teaches(study, n):
    frame = history(study.name)
    frame = frame.sample(frac=1, random_state=n).reset_index(drop=True)
    late = np.random.default_rng(n).exponential(60, len(frame))
    frame["y_known_at"] = frame["known_at"] + pd.to_timedelta(late, "D")
    seen = []
    for teachers, tested in folds(study, frame, n):
        first = frame["arrived"].iloc[tested].min()
        assert (frame["y_known_at"].iloc[teachers] < first).all()
        assert (frame["arrived"].iloc[teachers] + study.horizon < first).all()
        left = frame.index.difference(teachers)
        assert (
            maturity_times(study, frame).loc[left] >= first
        ).all()  # And no patient is left out needlessly
        seen += tested.tolist()
    assert len(seen) == len(set(seen))
    assert (
        sorted(seen)
        == np.flatnonzero(frame["arrived"] >= frame["arrived"].iloc[seen].min()).tolist()
    )


def test_patients_of_one_moment_are_never_split():
    frame = history("monica").assign(
        arrived=lambda rows: rows["arrived"].dt.to_period("Q").dt.start_time
    )
    for teachers, tested in folds(MONICA, frame, 3):
        inside = set(frame["arrived"].iloc[tested])
        assert not inside & set(frame["arrived"].drop(index=tested))
        assert frame["arrived"].iloc[teachers].max() < min(inside)


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_too_few_patients_are_one_sentence(rows):
    with pytest.raises(LMError, match=f"{rows} patients"):
        folds(MONICA, history("monica").head(rows), 4)
    if rows:
        with pytest.raises(LMError, match="a hold-out of 365 days"):
            hold_out(MONICA, history("monica").head(rows))


def test_one_outcome_only_and_no_folds_are_one_sentence():
    frame = history("monica")
    with pytest.raises(LMError, match="either outcome"):
        search(MONICA, frame.assign(y=0.0), ["logistic"], n=1)
    with pytest.raises(LMError, match="0 folds"):
        folds(MONICA, frame, 0)


def test_every_space_is_made_of_the_models_arguments_and_every_family_has_its_place():
    assert all(cls.space for cls in FAMILIES.values())
    assert set(SEARCHED) == set(FAMILIES) - {"incremental", "extra_trees"}
    known = RiskModel().get_params()
    assert all(name in known for cls in FAMILIES.values() for name in cls.space)
    places = [cls.complexity for cls in FAMILIES.values()]
    assert places == sorted(set(places))


def test_candidates_are_distinct_and_every_family_is_tried_as_it_is():
    tried = candidates(SEARCHED, 20, seed=3)
    assert len(tried) == 20 == len({str(c) for c in tried})
    assert tried[: len(SEARCHED)] == [Candidate(name) for name in SEARCHED]
    counts = pd.Series([c.family for c in tried]).value_counts()
    assert counts.min() >= 2 and counts.max() - counts.min() <= 3


def test_a_space_that_is_used_up_ends_the_draws():
    assert len(candidates(["logistic"], 60)) == 6 * 3


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"families": ["tabular foundation model"]}, "is unknown: choose from logistic"),
        ({"families": []}, "no family"),
        ({"n": 0}, "at least one candidate"),
    ],
)
def test_wrong_wishes_are_one_sentence(wrong, text):
    with pytest.raises(LMError, match=text):
        search(MONICA, history("monica"), **wrong)


@pytest.mark.slow
def test_selection_inside_the_fold_shows_no_optimism_on_noise():
    study, areas = noise(20), []
    strict = Candidate("logistic", {}, None, 0.05)
    for seed in range(5):
        frame = drawn(study, 300, seed)
        for teachers, tested in folds(study, frame, 2):
            model = strict.fit(study, frame.iloc[teachers])
            risk, y = model.predict_proba(frame.iloc[tested])[:, 1], frame["y"].iloc[tested]
            areas.append((risk[y == 1][:, None] > risk[y == 0][None]).mean())
    error = np.std(areas, ddof=1) / np.sqrt(len(areas))
    assert abs(np.mean(areas) - 0.5) < 3 * error < 0.08


def test_selection_sees_the_teachers_only():
    study = noise(12)
    frame = drawn(study, 300, 0)
    frame["y"] = (frame["x3"] + np.random.default_rng(1).normal(size=300) > 0).astype(float)
    teachers, tested = folds(study, frame, 3)[0]
    changed = frame.copy()
    changed.loc[tested, "y"] = 1 - changed.loc[tested, "y"]
    before, after = (select(study, each.iloc[teachers]) for each in (frame, changed))
    assert before == after and "x3" in before


def test_selection_keeps_what_matters_and_at_least_one():
    study = noise(12)
    stored = [select(study, drawn(study, 200, seed), 1e-9) for seed in range(5)]
    assert all(len(names) == 1 for names in stored)
    frame = drawn(study, 500, 9)
    strong = 2 * frame["x1"] - 2 * frame["x7"] + np.random.default_rng(2).logistic(size=500)
    assert {"x1", "x7"} == set(select(study, frame.assign(y=(strong > 0) * 1.0), 0.001))
    with pytest.raises(LMError, match="level = 0"):
        select(study, frame, 0)


def test_a_feature_that_never_varies_is_dropped_without_a_crash():
    frame = history("monica").assign(age=60.0)
    assert "age" not in select(MONICA, frame)
    level = history("monica").assign(sex="f")
    assert "sex" not in select(MONICA, level)


def test_of_two_features_that_say_the_same_one_stays():
    study = noise(4)
    frame = drawn(study, 400, 3)
    frame["x1"] = frame["x0"] + np.random.default_rng(0).normal(0, 0.02, 400)
    frame["y"] = (frame["x0"] + np.random.default_rng(1).logistic(size=400) > 0) * 1.0
    assert len({"x0", "x1"} & set(select(study, frame, 0.05))) == 1


def test_a_model_on_chosen_features_is_deaf_to_the_others():
    chosen = Candidate("logistic", {"C": 0.3}, ("age", "premi"))
    rows = history("monica")
    model = chosen.fit(MONICA, rows)
    assert [f.name for f in model.features] == MONICA.feature_names
    other = rows.assign(smstat="c", stroke="y")
    assert (model.log_odds(rows) == model.log_odds(other)).all()


def test_the_winner_is_the_simplest_within_one_error_of_the_best():
    result, _ = small()
    table = result.table
    assert table["chosen"].sum() == 1 and table.loc[table["chosen"], "within"].all()
    best = table["difference"].idxmin()
    assert table.loc[best, "difference"] == 0 and (table["difference"] >= 0).all()
    within = [c for c, ok in zip(result.tried, table["within"], strict=True) if ok]
    chosen = result.tried[int(np.argmax(table["chosen"]))]
    assert chosen == min(within, key=simplicity)
    assert result.best == chosen.settled(MONICA, history("monica").head(900))


def test_one_error_is_the_error_of_the_paired_difference():
    rng = np.random.default_rng(0)
    y, risks = rng.integers(0, 2, 500) * 1.0, rng.random((3, 500))
    table = as_good(y, risks)
    losses = (risks - y) ** 2
    best = losses.mean(axis=1).argmin()
    away = losses - losses[best]
    assert np.allclose(table["difference"], away.mean(axis=1), atol=1e-12)
    assert np.allclose(table["error"], away.std(axis=1, ddof=1) / np.sqrt(500), atol=1e-12)


def test_equal_candidates_go_to_the_simplest():
    y, risk = np.array([0.0, 1, 0, 1]), np.array([0.2, 0.7, 0.3, 0.6])
    assert as_good(y, np.array([risk, risk, risk]))["within"].all()
    assert simplicity(Candidate("logistic")) < simplicity(Candidate("splines"))
    assert simplicity(Candidate("boosting", {"leaves": 2})) < simplicity(Candidate("boosting"))


def test_the_table_is_mean_and_standard_deviation_over_the_folds():
    result, rows = small()
    assert result.n_folds == 2 and len(result.per_fold) == 4 * 2
    for number, group in result.per_fold.groupby("candidate"):
        row = result.table[result.table["candidate"] == number].iloc[0]
        for name in ("brier", "log_loss", "auroc", "oe"):
            assert np.isclose(row[name], group[name].mean())
            assert np.isclose(row[f"{name}_sd"], group[name].std(ddof=1))
    mine = result.tested
    fold = mine[mine["fold"] == 2]
    row = result.per_fold[result.table["chosen"].repeat(2).to_numpy()].iloc[1]
    assert np.isclose(((fold["risk"] - fold["y"]) ** 2).mean(), row["brier"])
    p, y = fold["risk"], fold["y"]
    assert np.isclose(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(), row["log_loss"])
    assert set(mine["record_id"]) <= set(rows["record_id"])


def test_the_same_seed_gives_the_same_search_whatever_the_order():
    result, rows = small()
    again = search(
        MONICA, rows.sample(frac=1, random_state=1), ["logistic", "boosting"], 4, 2, seed=2
    )
    assert again.table.equals(result.table) and again.per_fold.equals(result.per_fold)
    assert again.best == result.best and record_of(again) == record_of(result)
    assert candidates(n=12, seed=1) != candidates(n=12, seed=2)


def test_the_hold_out_changes_nothing_in_the_search():
    rows = small()[1]
    rest, held = hold_out(MONICA, rows, 200)
    assert (maturity_times(MONICA, rest) < held["arrived"].min()).all()
    spoiled = rows.copy()
    spoiled.loc[held.index, "y"] = 1 - spoiled.loc[held.index, "y"]
    spoiled.loc[held.index, "age"] = 110.0
    again = hold_out(MONICA, spoiled, 200)[0]
    assert again.equals(rest)
    first, second = (search(MONICA, each, ["logistic"], n=2, n_folds=2) for each in (rest, again))
    assert record_of(first) == record_of(second)
    risks = [
        s.best.fit(MONICA, each).log_odds(held) for s, each in ((first, rest), (second, again))
    ]
    assert (risks[0] == risks[1]).all()


def test_errors_are_detected_where_they_were_made():
    rows = history("monica")
    rng = np.random.default_rng(0)
    y = (rng.random(len(rows)) < 0.2) * 1.0
    guess = 0.1 + 0.2 * rng.random(len(rows))
    risk = np.where(rows["sex"] == "f", np.where(y == 1, guess / 10, 0.6), guess)
    frame = rows.assign(y=y)
    table = errors_by_subgroup(MONICA, frame, risk)
    plain = by_subgroups(MONICA, frame.assign(risk=risk))
    assert table[plain.columns.tolist()].equals(plain)
    women = table[(table["subgroup"] == "sex") & (table["value"] == "f")].iloc[0]
    error = np.abs(y - risk)
    worst = error >= np.sort(error)[::-1][round(0.1 * len(rows)) - 1]
    share = worst[(rows["sex"] == "f").to_numpy()].mean() / worst.mean()
    assert women["large_low"] > 1 and abs(women["large"] - share) < 0.1
    largest = largest_errors(frame, risk, 20)
    assert np.allclose(largest["error"].abs(), np.sort(error)[::-1][:20])


def test_a_handful_of_patients_has_a_table_too():
    table = errors_by_subgroup(MONICA, history("monica").head(3), np.array([0.1, 0.2, 0.3]))
    assert len(table) and table["patients"].sum() == 6
    assert len(errors_by_subgroup(noise(2), drawn(noise(2), 30, 0), np.full(30, 0.5))) == 0


def test_the_plot_is_the_same_text_each_time_and_has_no_date():
    y, risk = np.array([0, 1] * 50), np.linspace(0.1, 0.9, 100)
    first, second = calibration_svg(y, risk, "a"), calibration_svg(y, risk, "a")
    assert first == second and "<svg" in first
    assert "dc:date" not in first and "Matplotlib v" not in first


def test_the_record_is_what_the_registry_takes():
    result, _ = small()
    stored = record_of(result)
    assert {"candidates.csv", "folds.csv", "subgroups.csv", "calibration.svg"} == set(
        stored["files"]
    )
    steps = {(name, step) for name, _, step in stored["history"]}
    assert len(steps) == len(stored["history"]) == 4 * result.n_folds
    assert all(np.isfinite(value) for _, value, _ in stored["history"])
    assert all(name.startswith("search_") for name in stored["params"])
    kinds = {type(value) for part in ("params", "files") for value in stored[part].values()}
    assert kinds == {str} and all(len(value) < 6000 for value in stored["params"].values())


def test_a_candidate_names_wrong_settings():
    with pytest.raises(LMError, match="'depth' is unknown"):
        Candidate("boosting", {"depth": 3}).fit(MONICA, history("monica"))
    assert fit(MONICA, history("monica")).family == "logistic"

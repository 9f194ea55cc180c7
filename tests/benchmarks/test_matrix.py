"""The matrix of training spans and test years: no look-ahead, sound counts, a table that holds."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from support.here import run_here

from lm.core.errors import LMError
from lm.core.settings import settings
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.model.metrics import auroc, brier

ROOT = settings().root
NOTEBOOK = ROOT / "nbs" / "benchmarks" / "matrix.ipynb"
STORED = ROOT / "reports" / "matrix"
RELATIONS = {"older against newer", "older against more", "shorter against longer"}


def code():
    """The notebook's cells, and which of them first reads patients."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return cells, next(i for i, text in enumerate(cells) if text.startswith("loaded ="))


@pytest.fixture(scope="module")
def lab():
    """What the notebook defines before it reads any patient."""
    (cells, reads), names = code(), {}
    for cell in cells[:reads]:
        exec(cell, names)
    return names


@pytest.fixture(scope="module")
def rotterdam():
    study = load_study("rotterdam")
    return study, read_rows(study)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of the tables and record of a run on one study."""
    folder = tmp_path_factory.mktemp("matrix")
    choice = {"studies": "rotterdam", "families": "logistic", "shuffles": "1", "year_patients": 250}
    return folder, run_here(NOTEBOOK, choice | {"output": str(folder)})


def test_a_small_run_writes_its_tables(small):
    folder, record = small
    table, pairs = pd.read_csv(folder / "matrix.csv"), pd.read_csv(folder / "pairs.csv")
    assert record == {
        "cells": len(table),
        "pairs": pairs["pairs"].sum(),
        "shuffles": {"logistic": 1},
    }
    assert (table["last"] <= table["test"] - 3).all() and (table["first"] <= table["last"]).all()
    assert (table["seen"] >= 100).all() and (table["seen_events"] >= 20).all()
    assert len((folder / "matrix.txt").read_text(encoding="utf-8")) > 500


@pytest.mark.parametrize("family", ["logistic", "boosting"])
def test_outcomes_that_were_not_known_then_change_nothing(lab, rotterdam, family):
    study, rows = rotterdam
    day, year = pd.Timestamp(1987, 1, 1), rows["arrived"].dt.year
    late = (
        rows["known_at"].isna() | (rows["known_at"] > day) | (rows["arrived"] + study.horizon > day)
    )
    known_early = late & (rows["known_at"] <= day)
    assert known_early.sum() > 20  # events heard of before their horizon: they must not count
    other = rows.assign(y=rows["y"].where(~late, 1 - rows["y"]))
    result = lab["risks"](study, rows, family, 1987, {})
    assert list(result) == list(lab["risks"](study, other, family, 1987, {}))
    assert result.equals(lab["risks"](study, other, family, 1987, {}))
    assert (year[result.index] == 1987).all() and result.shape[1] >= 3
    known = other.assign(y=other["y"].where(late, 1 - other["y"]))
    assert not result.equals(lab["risks"](study, known, family, 1987, {}))


def test_spans_hold_whole_years_of_patients_who_were_due(lab, rotterdam):
    study, rows = rotterdam
    result = lab["spans"](study, rows, 1988)
    assert set(result) == {
        (a, b)
        for a, b in itertools.combinations_with_replacement(range(1982, 1986), 2)
        if (a, b) != (1982, 1982)
    }
    for (first, last), seen in result.items():
        assert seen["arrived"].dt.year.between(first, last).all()
        assert (seen["arrived"] + study.horizon <= pd.Timestamp(1988, 1, 1)).all()


def test_half_a_year_of_patients_is_no_last_year(lab):
    study = load_study("monica")
    rows = read_rows(study)
    assert max(b for _, b in lab["spans"](study, rows, 1988)) == 1987  # December is not due yet
    early = rows[(rows["arrived"].dt.year != 1987) | (rows["arrived"] >= pd.Timestamp(1987, 12, 1))]
    lab = lab | {"year_patients": 20}
    assert max(b for _, b in lab["spans"](study, early, 1988)) == 1986


def test_relations_are_those_of_the_three_questions(lab):
    relation = lab["relation"]
    assert relation((1985, 1986), (1987, 1988)) == "older against newer"
    assert relation((1985, 1986), (1985, 1988)) == "older against more"
    assert relation((1987, 1988), (1985, 1988)) == "shorter against longer"
    spans = list(itertools.combinations_with_replacement(range(5), 2))
    for one, other in itertools.permutations(spans, 2):
        assert relation(one, other) is None or relation(other, one) is None


def test_differences_are_those_of_the_two_measures(lab):
    rng = np.random.default_rng(1)
    y = (rng.random(300) < 0.3).astype(float)
    table = pd.DataFrame(rng.random((300, 2)).round(2), columns=range(2))
    table.columns = pd.MultiIndex.from_tuples([(1985, 1985), (1986, 1986)])
    table = (table + 0.5 * y[:, None]).clip(0, 1)
    one, other = (table[c].to_numpy() for c in table)
    gains = {row["measure"]: row for row in lab["duels"](y, table)}
    assert gains["Brier"]["gain"] == pytest.approx(brier(y, other).value - brier(y, one).value)
    assert gains["AUROC"]["gain"] == pytest.approx(auroc(y, one).value - auroc(y, other).value)
    drawn = [rng.integers(0, 300, 300) for _ in range(2000)]
    again = [auroc(y[i], one[i]).value - auroc(y[i], other[i]).value for i in drawn]
    assert gains["AUROC"]["error"] == pytest.approx(np.std(again), rel=0.1)


def test_without_a_difference_an_interval_excludes_zero_as_often_as_it_says(lab):
    rng, sure = np.random.default_rng(2), []
    columns = pd.MultiIndex.from_tuples([(1985, 1985), (1986, 1986)])
    for _ in range(250):
        y, result = (rng.random(300) < 0.3).astype(float), rng.random((300, 2)) * 0.6
        paired = pd.DataFrame(lab["duels"](y, pd.DataFrame(result, columns=columns)))
        sure.append(lab["count"](paired)[["surely_better", "surely_worse"]].sum(axis=1))
    share = pd.concat(sure, axis=1).mean(axis=1)
    assert share.between(0.015, 0.095).all(), share


def test_shuffles_without_a_number_for_each_family_are_refused(lab):
    cells, reads = code()
    with pytest.raises(LMError, match="must hold one number for each of 'logistic boosting'"):
        exec(cells[reads], lab | {"shuffles": "3"})


def test_the_stored_table_holds_both_studies_and_every_question():
    pairs = pd.read_csv(STORED / "pairs.csv")
    table = pd.read_csv(STORED / "matrix.csv")
    assert set(pairs["relation"]) == RELATIONS and set(pairs["measure"]) == {"Brier", "AUROC"}
    assert {*zip(pairs["study"], pairs["family"], strict=True)} == {
        *itertools.product(("rotterdam", "monica"), ("logistic", "boosting"))
    }
    assert (table["last"] < table["test"]).all() and len(table) == 2 * (len(table) // 2)
    for name in ("brier", "auroc", "oe"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    assert (pairs["better"] + pairs["surely_worse"] <= 1 + 1e-9).all()
    assert (pairs["surely_better"] <= pairs["better"]).all()


def test_what_the_notebook_says_of_the_stored_table_stands_in_it():
    pairs = pd.read_csv(STORED / "pairs.csv")
    pairs = pairs.set_index(["study", "relation", "measure"]).sort_index()
    older = pairs[pairs.index.get_level_values("relation") != "shorter against longer"]
    brier = older.xs("Brier", level="measure")
    area = older.xs("AUROC", level="measure")
    assert 0.55 < area["better"].max() < 0.65
    assert (older["surely_better"] <= older["surely_better_high"]).all()
    assert (brier["better"] < brier["better_chance"]).all()
    drifted = brier.loc["monica"]
    assert (drifted["surely_worse"] > 2 * drifted["surely_worse_chance"]).all()
    assert (drifted["surely_worse"] > drifted["surely_worse_high"]).all()
    for measure, more in (("Brier", True), ("AUROC", False)):
        recent = pairs.loc[("monica", "shorter against longer", measure)]
        assert (recent["better"] > recent["better_high"]).all() == more
        assert (recent["surely_better"] > recent["surely_better_high"]).all() == more
    for name in ("better", "surely_better"):
        still = pairs.loc["rotterdam"]
        assert (still[name] <= still[f"{name}_high"]).all()

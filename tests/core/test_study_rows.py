"""The table of a study: strict, every bad row by its line, CSV and Parquet alike, days as days."""

import pandas as pd
import pytest
from support.study_files import GOOD, written

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import BadRows, read_rows
from lm.data.source import outcomes, stream

PATIENT = {"age": 60, "sex": "f"}
ROWS = [
    {"record_id": "a", "arrived": "2021-03-01T14:00", "event": "2021-03-01", "followed_until": ""},
    {"record_id": "b", "arrived": "2021-03-01T14:00", "event": "", "followed_until": "2021-03-31"},
    {"record_id": "c", "arrived": "2021-03-01T14:00", "event": "", "followed_until": "2021-03-30"},
    {"record_id": "d", "arrived": "2021-03-02", "event": "2021-04-01", "followed_until": ""},
    {
        "record_id": "e",
        "arrived": "2021-03-02",
        "event": "2021-04-02",
        "followed_until": "2021-04-02",
    },
]
LABELS = {"a": 1, "b": 0, "c": None, "d": 1, "e": 0}


def study(tmp_path, rows, more="", kind="csv"):
    """A study with that table."""
    folder = written(tmp_path, GOOD.replace('"rows.csv"', f'"rows.{kind}"') + more)
    table = pd.DataFrame([PATIENT | row for row in rows])
    getattr(table, f"to_{kind}")(folder / f"rows.{kind}", index=False)
    return load_study(folder)


def labels(rows):
    """record_id -> y."""
    return {n: None if pd.isna(y) else y for n, y in zip(rows["record_id"], rows["y"], strict=True)}


def test_days_are_compared_as_days(tmp_path):
    ward = study(tmp_path, ROWS)
    rows = read_rows(ward)
    assert labels(rows) == LABELS
    results = {e.row["record_id"]: e for e in stream(ward, rows) if e.kind == "outcome"}
    assert {name: results[name].row["y"] for name in results} == LABELS
    assert results["a"].when == pd.Timestamp("2021-03-01T14:00")  # With its record, not before it
    assert set(outcomes(ward, rows)["record_id"]) == set(LABELS)


def test_parquet_gives_the_same_rows_as_csv(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "parquet").mkdir()
    csv, parquet = (
        read_rows(study(tmp_path / kind, ROWS, kind=kind)) for kind in ("csv", "parquet")
    )
    pd.testing.assert_frame_equal(csv, parquet)


def test_every_bad_row_is_named_by_its_line(tmp_path):
    bad = [
        *ROWS[:2],
        ROWS[2] | {"age": 300, "sex": "x"},
        ROWS[3] | {"arrived": "05/06/2021"},
        ROWS[4] | {"event": "2021-02-01"},
        ROWS[4] | {"record_id": "f", "event": "2099-12-31"},
        ROWS[4] | {"record_id": "g", "followed_until": "2021-03-01"},
        ROWS[4] | {"record_id": "b"},
    ]
    with pytest.raises(BadRows, match="has 6 bad rows") as error:
        read_rows(study(tmp_path, bad))
    results = [(place, field) for place, field, _, _ in error.value.faults]
    assert results == [
        *(("line 4", "age"), ("line 4", "sex"), ("line 5", "arrived"), ("line 6", "event")),
        *(("line 7", "event"), ("line 8", "followed_until"), ("line 9", "record_id")),
    ]
    assert "line 3 has it" in str(error.value) and "\n" not in str(error.value)


def test_a_competing_event_ends_the_question_and_is_no_loss(tmp_path):
    rows = [
        ROWS[2] | {"died": "2021-03-10"},
        ROWS[0] | {"died": "2021-03-20"},
        ROWS[3] | {"died": "2021-03-20"},
    ]
    text = GOOD.replace("horizon_days", 'competing = "died"\nhorizon_days')
    folder = written(tmp_path, text)
    pd.DataFrame([PATIENT | row for row in rows]).to_csv(folder / "rows.csv", index=False)
    ward = load_study(folder)
    assert labels(read_rows(ward)) == {"c": 0, "a": 1, "d": 0}
    result = outcomes(ward, read_rows(ward)).set_index("record_id")
    assert result.loc["c", "known_at"] == pd.Timestamp("2021-03-10")
    assert result["competing"].notna().to_dict() == {"c": True, "a": False, "d": True}
    pd.DataFrame([PATIENT | row for row in ROWS]).to_csv(folder / "rows.csv", index=False)
    with pytest.raises(LMError, match=r"rows\.csv lacks died"):
        read_rows(ward)

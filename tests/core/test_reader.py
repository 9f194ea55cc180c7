"""One strict reader: what is not plainly a table is refused in one sentence."""

import csv
import io
import json
import random

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.core.errors import LMError
from lm.core.limits import OPEN, TooLarge
from lm.core.reader import (
    ARROW,
    PARQUET,
    arrow_table,
    parquet_table,
    parse_csv,
    parse_json,
    parse_rows,
    read_body,
    read_table,
    table_rows,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
QUICK = settings(max_examples=150, deadline=None)


def write(table, how=pq.write_table, **more):
    """The bytes of a Parquet file."""
    sink = io.BytesIO()
    how(table, sink, **more)
    return sink.getvalue()


@QUICK
@given(
    st.lists(TEXT.filter(str.strip), min_size=2, max_size=4, unique=True),
    st.data(),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
)
def test_what_a_csv_writer_writes_is_read_back_to_the_letter(names, data, end, mark):
    rows = data.draw(st.lists(st.tuples(*[TEXT] * len(names)), max_size=5))
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    result = parse_csv(out.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    assert result == [dict(zip(names, row, strict=True)) for row in rows] and result.names == names
    assert all(type(value) is str for row in result for value in row.values())


@QUICK
@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6), st.integers(0, 5))
def test_a_line_of_another_length_is_refused_by_its_number(width, before, fields, after):
    lines = [["c" + str(i) for i in range(width)], *[["1"] * width] * before]
    lines += [["2"] * fields, *[["1"] * width] * after]
    text = "\n".join(map(",".join, lines)).encode()
    if fields == width:
        assert len(parse_csv(text)) == before + 1 + after
        return
    with pytest.raises(LMError, match=f"line {before + 2} has {fields} fields, the head {width}"):
        parse_csv(text)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a,b\n1,2,\n", "line 2 has 3 fields, the head 2: is there a comma too many"),
        (b"a,b,\n1,2,\n", "column 3 has no name"),
        (b"a,a\n1,2\n", "2 columns 'a'"),
        (b"\na,b\n1,2\n", "begins with a blank line"),
        (b"a,b\n1,2\n\n3,4\n", "line 3 is blank"),
        (b"a\n1\n\n3\n", "line 3 is blank"),
        (b"", "is empty"),
        (b"a\tb\n1\t2\n", "separated by '\\\\t'"),
        (b'a,b\n"1,2\n', "line 2: unexpected end of data"),
        (b'a,b\n1,"2"x\n', "line 2: ',' expected"),
        (b"a,b\nx\ny,1\xff\n", "line 3: the byte 0xff is not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "line 1: the byte 0xff is not UTF-8"),
        (b"a,b\n1,\x002\n", "line 2: a NUL"),
        (
            b"a,b\n1," + b"x" * 10**7,
            "line 2 has more than 1048576 characters: is a quote not closed",
        ),
    ],
)
def test_what_is_no_csv_is_one_sentence(content, sentence):
    with pytest.raises(LMError, match=sentence) as error:
        parse_csv(content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_lines_are_those_of_the_file_also_behind_a_value_of_several_lines():
    rows = parse_csv(b'a,b\n"one\ntwo",1\n2,2\n\n\n')
    assert [rows.place(i) for i in range(2)] == ["line 2", "line 4"]
    assert rows.frame().index.tolist() == [2, 4] and rows.frame().index.name == "line"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'[{"a": 1, "a": 2}]', "field 'a' twice"),
        (b'[{"a": {"b": 1, "b": 2}}]', "field 'b' twice"),
        (b'[{"a": NaN}]', "NaN"),
        (b'[{"a": -Infinity}]', "-Infinity"),
        (b"[" * 10**6, "nested too deeply"),
        (b"[" + b"1" * 10**4 + b"]", "too many digits"),
        (b'{"a": 1}', "a JSON list of rows"),
        (b"[1]", "a JSON list of rows"),
        (b"[", "no JSON: Expecting value .line 1, column 2"),
        (b'[{"a": "\xe9"}]', "byte 0xe9 is not UTF-8"),
    ],
)
def test_what_is_no_json_table_is_one_sentence(content, sentence):
    with pytest.raises(LMError, match=sentence):
        parse_rows(content)


@QUICK
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_is_read_as_the_standard_reader_does(value):
    assert parse_json(json.dumps(value).encode()) == value


def test_a_row_that_lacks_a_column_makes_no_table():
    rows = parse_rows(b'[{"a": 1, "b": 2}, {"a": 1}]')
    assert rows == [{"a": 1, "b": 2}, {"a": 1}]
    with pytest.raises(LMError, match="row 2 lacks the column 'b'"):
        rows.frame()


COLUMNS = {
    "days": pa.array([19_000, None], pa.date32()),
    "midnights": pa.array([19_000, None], pa.date32()).cast(pa.timestamp("us")),
    "times": pa.array([1, None], pa.timestamp("us")),
    "zoned": pa.array([19_000, None], pa.date32()).cast(pa.timestamp("us", "UTC")),
    "whole": pa.array([2**60 + 1, None], pa.int64()),
    "words": pa.array(["7", None]).dictionary_encode(),
    "flags": pa.array([True, None]),
}


def test_arrow_and_parquet_keep_types_and_give_the_same_rows():
    table, sink = pa.table(COLUMNS), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    rows = read_body(sink.getvalue(), ARROW)
    assert rows == read_body(write(table), PARQUET)
    assert set(rows[1].values()) == {None}
    kinds = {name: type(value).__name__ for name, value in rows[0].items()}
    assert kinds["days"] == kinds["midnights"] == "date" and kinds["times"] == "str"
    assert rows[0]["times"] == "1970-01-01T00:00:00.000001"  # A wall clock's
    assert kinds["zoned"] == "datetime" and rows[0]["whole"] == 2**60 + 1
    assert rows[0]["words"] == "7" and rows[0]["flags"] is True


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.date32(), pa.date64()])
def test_dates_out_of_reach_are_one_sentence(kind):
    table = pa.table(
        {
            "arrived": pa.array([2**31 - 1 if kind == pa.date32() else 2**55])
            .cast(pa.int32() if kind == pa.date32() else pa.int64())
            .view(kind)
        }
    )
    with pytest.raises(LMError, match="column 'arrived' holds a date out of reach"):
        table_rows(table)


@pytest.mark.slow
def test_a_small_parquet_file_that_claims_much_is_refused_before_it_is_unpacked():
    word = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**4, np.int32)), ["x" * 10**6])
    bomb = write(pa.table({"w": word}), compression="zstd", store_schema=False)
    assert len(bomb) < 4000
    before = pa.total_allocated_bytes()
    with pytest.raises(TooLarge, match="a text of more than 100000 characters"):
        parquet_table(bomb)
    assert pa.total_allocated_bytes() - before < 2**24
    with pytest.raises(TooLarge, match="more than 10000 rows"):
        parquet_table(write(pa.table({"n": pa.nulls(10_001)})))
    wide = write(pa.table({"x": np.zeros(10**6)}))
    assert len(table_rows(parquet_table(wide, OPEN))) == 10**6
    long = write(pa.table({"x": ["y" * 2**27]}), compression="zstd", use_dictionary=False)
    with pytest.raises(TooLarge, match="unpacks to more than"):
        parquet_table(long)


def test_damaged_files_are_one_sentence():
    table = pa.table({"x": np.zeros(50), "w": ["a"] * 50, "d": pa.array([1] * 50, pa.date32())})
    sink, draw = io.BytesIO(), random.Random(1)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for read, content in ((parquet_table, write(table)), (arrow_table, sink.getvalue())):
        assert len(table_rows(read(content))) == 50
        for _ in range(200):
            spoiled = bytearray(content)
            for _ in range(draw.randint(1, 4)):
                spoiled[draw.randrange(len(content))] = draw.randrange(256)
            try:
                table_rows(read(bytes(spoiled)))
            except LMError as error:
                assert "\n" not in str(error)


def test_files_are_read_by_the_end_of_their_name(tmp_path):
    pd.DataFrame({"n": ["1"]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"n": ["1"]}).to_feather(tmp_path / "a.feather", compression="zstd")
    (tmp_path / "a.json").write_text('[{"n": "1"}]')
    (tmp_path / "a.CSV").write_text("n\n1\n")
    assert [read_table(path) for path in sorted(tmp_path.iterdir())] == [[{"n": "1"}]] * 4
    for name in ("a.xlsx", "absent.csv", "."):
        with pytest.raises(LMError):
            read_table(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(LMError, match=r"folder\.csv cannot be read"):
        read_table(tmp_path / "folder.csv")


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        (b"a,b\n", "text/csv", "has no rows below its head"),
        (b"a,b\n1,2\n", "text/csv; charset=latin-1", "it must be UTF-8"),
        (b"[]", 'application/json; charset="utf-16"', "it must be UTF-8"),
    ],
)
def test_a_body_that_is_no_table_of_ours_is_one_sentence(content, kind, sentence):
    with pytest.raises(LMError, match=sentence):
        read_body(content, kind)
    assert read_body(b"a\n1\n", "TEXT/CSV; charset=UTF-8") == [{"a": "1"}]

"""DuckDB reaches its own file and the named paths; no function, view or setting goes round."""

import os

import duckdb
import pytest

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.database import open_database, select_rows
from lm.data.source import read_query
from lm.machine.machine import Machine

READING = [
    "FROM '{path}'",
    'FROM "{path}"',
    "FROM read_text('{path}')",
    "FROM read_blob('{path}')",
    "FROM read_csv('{path}')",
    "FROM read_csv_auto(['{path}'])",
    "FROM read_json('{path}')",
    "FROM read_ndjson_objects('{path}')",
    "FROM read_parquet('{path}')",
    "FROM parquet_metadata('{path}')",
    "FROM sniff_csv('{path}')",
    "FROM glob('{folder}/*')",
    "FROM query('FROM read_text(''{path}'')')",
    "FROM query_table('{path}')",
    "FROM (FROM read_text('{folder}/allowed/../secret.csv'))",
    "FROM read_text('{folder}/allowed/link.csv')",
    "FROM read_text('file://{path}')",
    "FROM read_text('//{path}')",
    "FROM read_csv('http://127.0.0.1:1/x.csv')",
    "FROM frame",
    "SELECT getenv('HOME')",
    "SELECT getvariable('x') FROM read_text('{path}')",
]
ACTING = [
    "COPY (SELECT 1) TO '{folder}/new.csv'",
    "COPY (SELECT 1) TO '{folder}/new.parquet' (FORMAT parquet)",
    "EXPORT DATABASE '{folder}/all'",
    "IMPORT DATABASE '{folder}'",
    "ATTACH '{folder}/new.duckdb'",
    "ATTACH 'dbname=x host=127.0.0.1' AS pg (TYPE postgres)",
    "ATTACH '{path}' AS lite (TYPE sqlite)",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{path}'",
    "CREATE VIEW v AS FROM read_text('{path}'); FROM v",
    "CREATE MACRO m() AS TABLE FROM read_text('{path}'); FROM m()",
    "CREATE PERSISTENT SECRET s (TYPE http)",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET temp_directory = '{folder}/spill'",
    "SET python_enable_replacements = true",
    "SET log_query_path = '{folder}/log'",
    "SET secret_directory = '{folder}'",
    "SET profiling_output = '{folder}/profile'",
    "RESET lock_configuration",
    "PRAGMA enable_profiling = 'json'",
    "CALL enable_logging(storage = 'file', storage_config = {{'path': '{folder}/log'}})",
]


@pytest.fixture
def place(tmp_path):
    """A folder with a secret, and one file that may be read."""
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "good.csv").write_text("age\n71\n")
    (tmp_path / "secret.csv").write_text("word\nCANARY\n")
    os.symlink(tmp_path / "secret.csv", tmp_path / "allowed" / "link.csv")
    return tmp_path


@pytest.mark.parametrize("query", [*READING, *ACTING])
def test_nothing_is_read_or_written_but_what_is_named(place, query):
    frame = read_rows(load_study("monica")).head(1)
    inputs = query.format(path=place / "secret.csv", folder=place)
    before = sorted(place.rglob("*"))
    with (
        open_database(folders=[place / "allowed"]) as connection,
        pytest.raises(duckdb.Error) as error,
    ):
        assert connection.execute(f"FROM '{place}/allowed/good.csv'").fetchall() == [(71,)]
        connection.execute(inputs).fetchall()
    assert "CANARY" not in str(error.value) and len(frame) == 1
    with pytest.raises(LMError):
        select_rows(inputs, [place / "allowed"])
    assert sorted(place.rglob("*")) == before


def test_a_query_is_one_select_within_its_limits(place):
    good = place / "allowed" / "good.csv"
    assert select_rows(f"WITH a AS (FROM '{good}') SELECT age + 1 AS b FROM a", [good]) == (
        ["b"],
        [(72,)],
    )
    for query in ("", "SELECT 1; SELECT 2", f"COPY (SELECT 1) TO '{good}'", "SET threads = 1"):
        with pytest.raises(LMError, match="one SELECT"):
            select_rows(query, [good])
    assert good.read_text() == "age\n71\n"
    with pytest.raises(LMError, match="longer than"):
        select_rows(
            "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b", seconds=0.2
        )
    with pytest.raises(LMError, match="Out of Memory"):
        select_rows("SELECT list(range) FROM range(100000000)", memory="50MB")
    with pytest.raises(LMError, match="--reads"):
        read_query(f"SELECT * FROM '{place / 'secret.csv'}'", [good])


def test_the_connection_of_the_store_is_closed_too(home, place):
    row = read_rows(load_study("monica")).iloc[0]
    with Machine("monica", home) as machine:
        machine.receive(row[["record_id", "arrived", *machine.study.feature_names]].to_dict())
        assert machine.snapshot()["rows"] == 1  # It writes its snapshots
        for query in ("FROM read_text('{0}/secret.csv')", "COPY (SELECT 1) TO '{0}/new.csv'"):
            with pytest.raises(duckdb.PermissionException):
                machine.store.database.connection.cursor().execute(query.format(place)).fetchall()


@pytest.mark.parametrize("name", ["Julia's", 'a "b"', "x', '/etc", "a]; SELECT 1"])
def test_a_path_is_a_path_whatever_its_letters(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "t.csv").write_text("a\n1\n")
    with open_database(folders=[folder]) as connection:
        query = "SELECT a FROM read_csv(?)"
        assert connection.execute(query, [str(folder / "t.csv")]).fetchall() == [(1,)]
        with pytest.raises(duckdb.PermissionException):
            connection.execute("SELECT * FROM read_text('/etc/hostname')")

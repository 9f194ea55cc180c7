"""States that an earlier version has made open, verify and predict as before."""

import json
import shutil
import sqlite3
import tarfile

import duckdb
import pytest
from support.paths import STATES

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.journal import SCHEMA
from lm.data.ledger import Ledger
from lm.data.store import Store
from lm.data.verification import held_columns
from lm.machine.machine import Machine

DATA = STATES


@pytest.fixture
def before(tmp_path):
    """A state of the version before, with ten patients in the journal only."""
    with tarfile.open(DATA / "state_before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_opens_migrates_and_answers_the_same(before):
    expected = json.loads((before / "expected.json").read_text())
    study = load_study(before / "ward")
    for opened in ("first", "again"):
        with Machine(study, before / "home") as machine:
            assert machine.verify() == []
            known = machine.known()
            risks = known.dropna(subset="risk").set_index("record_id")["risk"].to_dict()
            assert risks == expected["risks"] and len(known) == expected["records"]
            labels = known["y_early"].notna().sum()
            assert labels == len(machine.table("outcomes")) >= expected["y"] > 200
            if opened == "first":
                log = machine.table("audit")
                entry = json.loads(log.loc[log["kind"] == "migration", "content"].item())
                assert entry["faults"] == [] and log["kind"].tolist().count("adopted") == 1
                row = known.iloc[-1]
                row = {name: row[name] for name in study.feature_names}
                new = machine.receive(row | {"record_id": "new", "arrived": "2020-03-20"})
                assert new["risk"] == known["risk"].iloc[-1]
                expected["risks"]["new"], expected["records"] = new["risk"], len(known) + 1


def test_what_was_edited_before_the_migration_is_still_reported(before):
    folder = before / "home" / "ward"
    with duckdb.connect(folder / "store.duckdb") as connection:
        connection.execute("UPDATE records SET age = age + 1 WHERE rowid = 3")
    for _ in range(2):
        with Store(load_study(before / "ward"), folder) as store:
            result = store.verify()
            assert any("row 4" in line and "edited" in line for line in result), result


@pytest.mark.parametrize("cell", ["x_age = x_age + 1", "known_at = known_at - INTERVAL 1 DAY"])
def test_an_edit_after_the_migration_is_reported(before, cell):
    folder = before / "home" / "ward"
    study = load_study(before / "ward")
    Store(study, folder).close()
    with duckdb.connect(folder / "store.duckdb") as connection:
        connection.execute(f"UPDATE records SET {cell} WHERE rowid = 3")
    with Store(study, folder) as store:
        assert any("records: row 4" in line and "edited" in line for line in store.verify())


def test_an_entry_that_adopts_edited_rows_hides_nothing(before, tmp_path):
    folder = before / "home" / "ward"
    study = load_study(before / "ward")
    Store(study, folder).close()
    with duckdb.connect(folder / "store.duckdb") as connection:
        connection.execute("UPDATE records SET x_age = x_age + 1 WHERE rowid = 3")
    with Store(study, folder) as store, store.database.atomic() as connection:
        held = held_columns(connection)
        store.engine.chain.enter(
            connection,
            {
                "kind": "migration",
                "content": json.dumps(
                    {"columns": {k: v for k, v in held.items() if k != "audit"}, "faults": []}
                ),
            },
        )
        store.engine.chain.adopt(connection, [name for name in held if name != "audit"])
    with Store(study, folder) as store:
        assert store.verify() != []


def test_other_features_are_refused_as_ever(before, tmp_path):
    shutil.copytree(before / "ward", before / "other" / "ward")
    path = before / "other" / "ward" / "study.toml"
    path.write_text(path.read_text().replace('name = "crp"', 'name = "lactate"'))
    with pytest.raises(LMError, match=r"new: lactate; changed or gone: crp"):
        Store(load_study(path.parent), before / "home" / "ward")


@pytest.mark.parametrize("schema", [1, 2])
def test_a_state_of_an_earlier_schema_is_brought_forward_once(tmp_path, schema):
    """Killed with patients in a journal; 1 is before the ledger, 2 before the packages.

    See data/make_state.py."""
    with tarfile.open(DATA / f"state_schema_{schema}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    expected = json.loads((tmp_path / "expected.json").read_text())
    study, folder = load_study(tmp_path / "ward"), tmp_path / "home" / "ward"
    counted = set()
    for _ in range(2):
        with Machine(study, tmp_path / "home") as machine:
            known = machine.known()
            risks = known.dropna(subset="risk").set_index("record_id")["risk"].to_dict()
            assert risks == expected["risks"] and len(known) == expected["records"]
            assert machine.verify() == [] and machine.registry.tag("lm.schema") == str(SCHEMA)
            steps = [(step["from"], step["to"]) for step in machine.store.audit.entries("schema")]
            assert steps[schema - SCHEMA :] == [(n, n + 1) for n in range(schema, SCHEMA)]
            counted.add(len(steps))
        assert (folder / "ledger").is_file() and len(counted) == 1
    cards = [path.read_text() for path in (folder / "registry").rglob("MLmodel")]
    assert cards and all("lm.model.predict.RiskModel" in card for card in cards)


@pytest.mark.parametrize("part", ["store", "ledger", "registry"])
def test_a_state_of_a_later_version_is_refused_in_a_sentence(before, part):
    study, folder = load_study(before / "ward"), before / "home" / "ward"
    with Machine(study, before / "home"):
        pass
    if part == "store":
        with duckdb.connect(folder / "store.duckdb") as connection:
            connection.execute("UPDATE meta SET schema = ?", [SCHEMA + 1])
    elif part == "ledger":
        ledger = Ledger(folder)
        ledger.begin(ledger.read() | {"schema": SCHEMA + 1})
        ledger.close()
    else:
        with sqlite3.connect(folder / "registry" / "mlflow.db") as base:
            update = "UPDATE experiment_tags SET value = ? WHERE key = 'lm.schema'"
            base.execute(update, [str(SCHEMA + 1)])
    with pytest.raises(LMError, match=f"{part} of study 'ward' has schema {SCHEMA + 1}"):
        Machine(study, before / "home")

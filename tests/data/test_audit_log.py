"""The log: every write leaves one entry, and verification finds whatever is done to the file."""

import json
import shutil
import threading
from dataclasses import replace
from datetime import datetime

import duckdb
import numpy as np
import pandas as pd
import pytest
from support.ward import DAY, NOW, START, STUDY, all_kinds, answer, fill, patient, reasons

import lm.data.engine as engine
import lm.data.hash_chain as hash_chain
import lm.data.verification as verification
from lm.core.errors import LMError
from lm.data.audit_report import audit_report, audit_table
from lm.data.hash_chain import ENTRY, entry_hash
from lm.data.ledger import ANCHOR, NotWhole, read_anchor
from lm.data.records import Duplicate
from lm.data.store import Store, examine


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with such a store, closed; tests work on copies."""
    folder = tmp_path_factory.mktemp("made") / "ward"
    with Store(STUDY, folder) as store:
        all_kinds(store)
        assert store.verify() == []
    return folder


@pytest.fixture
def folder(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    Store(STUDY, copy).close()  # A copy is verified once
    return copy


def tamper(folder, *statements):
    """Work on the file behind the store's back."""
    with duckdb.connect(folder / "store.duckdb") as connection:
        for statement in statements:
            connection.execute(statement)


def faults(folder):
    """All faults, whether the store opens or not."""
    try:
        with Store(STUDY, folder) as store:
            return store.verify()
    except NotWhole:
        return [fault for fault in examine(STUDY, folder) if " were stored" not in fault]


# What is written


def test_one_entry_per_transaction_in_one_chain(tmp_path):
    with Store(STUDY, tmp_path / "ward") as store:
        assert (
            store.audit.head() == (0, "")
            and store.queries.table("audit").empty
            and store.verify() == []
        )
        all_kinds(store)
        log, head, counts = store.queries.table("audit"), store.audit.head(), store.status.counts()
    assert log["seq"].tolist() == list(range(1, len(log) + 1)) and counts["audit"] == len(log)
    assert head == (len(log), log["hash"].iloc[-1])
    assert log["previous"].tolist() == ["", *log["hash"].iloc[:-1]]
    patients = log[log["kind"] == "records+predictions+explanations"]
    assert patients["rows"].tolist() == [3] * 6 + [18]
    rows = sum(n for name, n in counts.items() if name != "audit")
    assert log["rows"].sum() == rows and (log.loc[log["kind"] == "attempt", "rows"] == 0).all()
    assert set(log["kind"].str.split("+").explode()) == {*counts, "attempt"} - {"audit"}
    entries = list(zip(log["seq"], log["hash"], strict=True))
    quoted = read_anchor(tmp_path / "ward" / ANCHOR)  # One line for each commit
    assert quoted[-1] == entries[-1] and quoted == [one for one in entries if one in quoted]


def test_the_hash_is_over_everything_else_in_the_entry(made):
    with Store(STUDY, made) as store:
        entry = store.queries.table("audit", last=1).iloc[0].to_dict()
    entry |= {"at": entry["at"].to_pydatetime()}
    assert entry_hash(entry) == entry["hash"]
    other = {"seq": 1, "at": datetime(2020, 1, 1), "rows": 7}
    for name in ENTRY:
        assert entry_hash(entry | {name: other.get(name, "other")}) != entry["hash"], name


def test_what_fails_leaves_no_entry_and_the_chain_goes_on(tmp_path):
    with Store(STUDY, tmp_path / "ward") as store:
        fill(store, 2)
        head = store.audit.head()
        with pytest.raises(LMError, match="stored nothing of it"):
            store.records.append(patient(9), START, "", answer(), reasons() | {"base": "no number"})
        with pytest.raises(Duplicate):
            store.records.append(patient(1), START)
        assert store.audit.head() == head
        store.records.append(patient(9), START)
        assert store.audit.head()[0] == head[0] + 1 and store.verify() == []


def test_reading_writes_no_entry(folder):
    with Store(STUDY, folder) as store:
        head = store.audit.head()
        (
            store.queries.as_of(),
            store.status.counts(),
            store.queries.table("outcomes"),
            store.clock.data_time(),
        )
    with Store(STUDY, folder) as store:
        assert store.audit.head() == head and store.verify() == []


def test_threads_share_one_chain(tmp_path):
    def work(k):
        for i in range(8):
            store.records.append(patient(10 * k + i, START), START, "", answer(), reasons())
            store.audit.append("access", {"thread": k})

    with Store(STUDY, tmp_path / "ward") as store:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log = store.queries.table("audit")
        assert (log["kind"] == "access").sum() == 32 and log["rows"].sum() == 3 * 32
        assert store.audit.head()[0] == len(log) <= 64 and store.verify() == []


def test_notes(tmp_path):
    with Store(STUDY, tmp_path / "ward") as store:
        content = {"version": np.int64(2), "p": float("nan"), "when": START, "who": "\ud800"}
        assert (
            store.audit.append("approval", content, "Dr Ž") == 1
            and store.audit.append("settings", {}) == 2
        )
        for kind in ("", "records", "audit", "adopted"):
            with pytest.raises(LMError, match="the log needs a name that no table has"):
                store.audit.append(kind, {})
        log = store.queries.table("audit")
        assert store.verify() == []
    assert json.loads(log["content"][0])["version"] == 2 and log["actor"].tolist() == ["Dr Ž", ""]


def test_the_log_as_of_a_moment_of_the_wall_clock(folder):
    with Store(STUDY, folder) as store:
        log = store.queries.table("audit")
        assert store.queries.table("audit", as_of="2000-01-01").empty
        assert len(store.queries.table("audit", as_of=log["at"].iloc[4])) == 5
        assert len(store.queries.table("settings", as_of=NOW)) == 3
        assert store.queries.table("settings", as_of=NOW - DAY).empty


# What is found


EDITS = {
    "records": "x_age = x_age + 1e-9",
    "predictions": "risk = risk / 2",
    "explanations": "base = NULL",
    "outcomes": "y = 1 - y",
    "decisions": "reason = ' '",
    "rejects": "received_at = received_at + INTERVAL 1 MICROSECOND",
    "verdicts": "version = 1",
    "updates": "evidence = evidence || ' '",
    "sketches": "content = 'x'",
    "settings": "study = 'x'",
    "withdrawals": "actor = 'x'",
}


@pytest.mark.parametrize("table", EDITS)
def test_an_edited_cell(folder, table):
    tamper(folder, f"UPDATE {table} SET {EDITS[table]} WHERE rowid = 1")
    (result,) = faults(folder)
    assert result.startswith(f"{table}: row 2 is not what entry ") and "edited" in result


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("table", ["outcomes", "decisions", "settings"])
def test_a_deleted_row(folder, table, row):
    tamper(folder, f"DELETE FROM {table} WHERE seq = {row + 1}")
    (result,) = faults(folder)
    assert result.startswith(f"{table}: row {row + 1} of entry ") and "missing" in result


def test_an_inserted_row(folder):
    tamper(folder, "INSERT INTO decisions SELECT * REPLACE (99 AS seq) FROM decisions LIMIT 1")
    (result,) = faults(folder)
    assert result.startswith("decisions: row 4 is covered by no entry")


def test_rows_that_changed_places(folder):
    tamper(
        folder,
        "CREATE TABLE saved AS SELECT * FROM decisions ORDER BY seq",
        "DELETE FROM decisions",
        "INSERT INTO decisions SELECT * FROM saved ORDER BY seq % 3",
        "DROP TABLE saved",
    )
    result = faults(folder)
    assert len(result) == 2 and all("moved" in one for one in result)


def test_an_edit_that_goes_back_is_none(folder):
    tamper(folder, "UPDATE records SET x_age = x_age + 1", "UPDATE records SET x_age = x_age - 1")
    assert faults(folder) == []


AUDIT_EDITS = {
    **{
        "at": "at - INTERVAL 1 SECOND",
        "kind": "'approval'",
        "actor": "'intruder'",
        "rows": "rows+1",
    },
    **{"digest": "upper(digest)", "content": "replace(content, 'a', 'b')", "hash": "upper(hash)"},
}


@pytest.mark.parametrize("column", AUDIT_EDITS)
def test_an_edited_entry(folder, column):
    value = AUDIT_EDITS[column].replace("at -", '"at" -').replace("rows+", '"rows"+')
    tamper(folder, f'UPDATE audit SET "{column}" = {value} WHERE seq = 3')
    assert faults(folder)[0].startswith("audit: entry 3 was edited")


def rehashed(folder, seq, **over):
    """Change an entry and give it the hash of its new content."""
    with duckdb.connect(folder / "store.duckdb") as connection:
        row = connection.execute("SELECT * FROM audit WHERE seq = ?", [seq]).fetchone()
        entry = dict(zip((*ENTRY, "hash"), row, strict=True)) | over
        entry["hash"] = entry_hash(entry)
        connection.execute("DELETE FROM audit WHERE seq = ?", [seq])
        marks = ", ".join("?" * len(entry))
        connection.execute(f"INSERT INTO audit VALUES ({marks})", list(entry.values()))
        connection.execute("CREATE TABLE saved AS SELECT * FROM audit ORDER BY seq")
        connection.execute("DELETE FROM audit")
        connection.execute("INSERT INTO audit SELECT * FROM saved ORDER BY seq")
        connection.execute("DROP TABLE saved")


def test_an_entry_with_a_new_hash_breaks_the_chain_after_it(folder):
    rehashed(folder, 3, actor="intruder")
    result = faults(folder)
    assert result[0].startswith("audit: entry 4 does not continue entry 3")
    assert result[1] == f"audit: {ANCHOR} quotes entry 3 with another hash: the log was made anew"


def test_the_last_entry_with_a_new_hash_is_known_to_the_anchor(folder):
    with Store(STUDY, folder) as store:
        last = store.audit.head()[0]
    rehashed(folder, last, actor="intruder")
    result = faults(folder)
    assert f"audit: {ANCHOR} quotes entry {last} with another hash: the log was made anew" in result


def test_a_deleted_entry(folder):
    tamper(folder, "DELETE FROM audit WHERE seq = 3")
    result = faults(folder)
    assert result[0].startswith("audit: entry 4 follows entry 2: entries are missing")
    assert any("covered by no entry" in one for one in result)


def test_reordered_entries(folder):
    tamper(
        folder,
        "CREATE TABLE saved AS SELECT * FROM audit",
        "DELETE FROM audit",
        "INSERT INTO audit SELECT * FROM saved ORDER BY CASE seq WHEN 3 THEN 4.5 ELSE seq END",
        "DROP TABLE saved",
    )
    assert "out of order" in faults(folder)[0]


def test_a_tail_that_was_cut_off_with_its_rows_is_known_to_the_anchor(folder):
    with Store(STUDY, folder) as store:
        last = store.audit.head()[0]
        assert store.queries.table("audit", last=2)["kind"].tolist() == ["settings", "attempt"]
    tamper(
        folder, f"DELETE FROM audit WHERE seq > {last - 2}", "DELETE FROM settings WHERE seq = 3"
    )
    text = f"audit: {ANCHOR} quotes entry {last}, but the log ends with entry {last - 2}"
    assert text in faults(folder)
    with Store(STUDY, folder, {"by": "Ada", "reason": "disk lost"}) as store:
        for _ in range(3):
            store.audit.append("access", {})
        assert store.verify() == []  # The loss is in the log, with the name of who accepted it
        log = store.queries.table("audit")
    assert log.loc[log["kind"] == "loss", "actor"].tolist() == ["Ada"]


def test_a_log_begun_anew_is_known_to_the_anchor(folder):
    tamper(folder, "DROP TABLE audit", "UPDATE outcomes SET y = 0")
    assert any(f"{ANCHOR} quotes entry" in fault for fault in faults(folder))


@pytest.mark.slow
def test_a_row_with_the_same_first_digits_is_detected_by_the_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(hash_chain, "SIGN", 1)
    monkeypatch.setattr(verification, "SIGN", 1)
    with Store(STUDY, tmp_path / "ward") as store:
        fill(store, 3)
    results, wanted = set(), {"audit: entry 2 has rows that are not those it covers", "predictions"}
    while not wanted <= results:
        tamper(tmp_path / "ward", "UPDATE predictions SET risk = risk / 2 WHERE rowid = 1")
        for result in faults(tmp_path / "ward"):
            results.add("predictions" if result.startswith("predictions: row 2 is not") else result)


def test_the_row_of_a_batch_is_named_and_many_are_summed_up(tmp_path):
    rows = pd.DataFrame([patient(i, START) for i in range(3000)])
    with Store(STUDY, tmp_path / "ward") as store:
        store.records.append_many(rows, START)
    tamper(tmp_path / "ward", "UPDATE records SET x_age = 7 WHERE rowid = 1233")
    assert faults(tmp_path / "ward") == [
        "records: row 1234 is not what entry 1 covers: it was edited"
    ]
    tamper(tmp_path / "ward", "UPDATE records SET source = 'x'")
    result = faults(tmp_path / "ward")
    assert len(result) == verification.FAULTS_SHOWN + 1 and result[-1].startswith(
        "records: 2990 more rows"
    )


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_changed_is_detected(folder, seed):
    rng = np.random.default_rng(seed)
    table = rng.choice([*EDITS, "audit"])
    with duckdb.connect(folder / "store.duckdb") as connection:
        columns = connection.execute(f"DESCRIBE {table}").fetchall()
        held = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        row, (name, kind, *_) = rng.integers(held), columns[rng.integers(len(columns))]
        new = {"VARCHAR": "'?'", "TIMESTAMP": "TIMESTAMP '1999-01-01'"}.get(kind, "77")
        if rng.random() < 0.3:
            connection.execute(f"DELETE FROM {table} WHERE rowid = {row}")
        else:
            connection.execute(f'UPDATE {table} SET "{name}" = {new} WHERE rowid = {row}')
    assert faults(folder), (table, name, row)


# What is no fault


@pytest.mark.slow
def test_an_anchor_that_was_cut_or_removed_is_a_fault(folder):
    path = folder / ANCHOR
    lines = path.read_text().splitlines(keepends=True)
    for stored in ("".join(lines[:-2]), "".join(lines[:-1]) + lines[-1][:66], "", None):
        path.unlink()
        if stored is not None:
            path.write_text(stored)
        with pytest.raises(NotWhole, match=f"{ANCHOR} is missing, cut or older"):
            Store(STUDY, folder)
        assert any(ANCHOR in fault for fault in faults(folder))
        path.write_text("".join(lines))
    assert faults(folder) == []


def test_a_death_between_commit_and_anchor_is_no_fault(folder, monkeypatch):
    monkeypatch.setattr(engine, "CHECKPOINT_PAUSE", 1000)
    store = Store(STUDY, folder)
    store.records.append(patient(70), START + 70 * DAY)
    monkeypatch.setattr(
        hash_chain.HashChain, "_quote", lambda *_: (_ for _ in ()).throw(SystemExit)
    )
    with pytest.raises(SystemExit):
        store.audit.head()
    monkeypatch.undo()
    store.records.append(patient(71), START + 71 * DAY)
    assert store.verify() == [] and store.queries.has("p70")
    store.close()
    assert faults(folder) == []


def test_an_anchor_that_cannot_be_written_stops_no_write(folder):
    path = folder / ANCHOR
    with Store(STUDY, folder) as store:
        path.rename(folder / "aside")
        path.mkdir()
        store.records.append(patient(70), START + 70 * DAY)
        assert store.queries.has("p70")
        path.rmdir()
        (folder / "aside").rename(path)
        store.records.append(patient(71), START + 71 * DAY)
        assert store.verify() == []
    assert faults(folder) == []


def test_a_store_from_before_the_log(folder):
    (folder / ANCHOR).unlink()
    (folder / "ledger").unlink()
    tamper(folder, "DROP TABLE audit", "DROP TABLE settings", "DROP TABLE meta")
    with Store(STUDY, folder) as store:
        log = store.queries.table("audit")
        assert set(log["kind"]) == {"adopted", "schema"} and store.verify() == []
        assert log["rows"].sum() == sum(store.status.counts().values()) - len(log)
        store.records.append(patient(70), START + 70 * DAY)
    assert faults(folder) == []
    tamper(folder, "UPDATE records SET x_age = 7 WHERE record_id = 'p3'")
    assert faults(folder) == ["records: row 4 is not what entry 1 covers: it was edited"]


def test_features_in_another_order_are_the_same_rows(folder):
    with Store(replace(STUDY, features=STUDY.features[::-1]), folder) as store:
        assert store.verify() == []
        store.records.append(patient(70), START + 70 * DAY, "", answer(), reasons())
        assert store.verify() == []
    assert faults(folder) == []


# For people


def test_the_table_for_people(folder):
    with Store(STUDY, folder) as store:
        log, result = store.queries.table("audit"), store.verify()
    assert audit_table(log)["seq"].tolist() == log["seq"].tolist()
    assert audit_table(log, "predictions")["rows"].tolist() == [3] * 6 + [18]
    attempts = audit_table(log, "attempt", last=2)
    assert [json.loads(text)["for"] for text in attempts["content"]] == ["p1", "p2"]
    assert (attempts["actor"] == "machine").all()
    assert (audit_table(log, "outcomes")["content"] == "").all()
    assert audit_table(log, since=log["at"].iloc[-1])["seq"].tolist() == [len(log)]
    assert audit_table(log, since="2100-01-01").empty
    with pytest.raises(LMError, match="only: attempt, decisions"):
        audit_table(log, "gossip")
    message = audit_report(log, result, "ward")
    assert message.startswith(f"Intact. The log of ward has {len(log)} entries")
    assert log["hash"].iloc[-1] in message
    assert audit_report(log, ["a", "b"], "ward").startswith("NOT INTACT: 2 faults.")

"""The journal in front of the tables: what is acknowledged is stored once, in any event."""

import json
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import pandas as pd
import pytest
from support.journal_lines import line
from support.waiting import PATIENCE, eventually
from support.ward import START, STUDY, answer, patient, reasons, run

import lm.data.journal as module
from lm.data.journal import (
    SCHEMA,
    Journal,
    Mark,
    StoreFailed,
    framed,
    linked,
    read_left,
    segments,
    unframed,
)
from lm.data.ledger import Ledger
from lm.data.names import HASHED, Names, key_of
from lm.data.records import Duplicate
from lm.data.store import Store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "ward"


def held(folder):
    """The contents of all whole lines."""
    return [content for left in read_left(folder) for content in left.contents]


def names(store):
    return store.queries.table("records")["record_id"].tolist()


def written(folder, *parts):
    """Segments that go on where the journal of a closed store ended."""
    entry = Ledger(folder).read()
    mark = Mark(*entry["journal"])
    for number, lines in enumerate(parts, 1):
        head = {"schema": SCHEMA, "machine": entry["machine"]}
        head |= {"after": mark.seq, "digest": mark.digest}
        content = framed(json.dumps(head).encode())
        for one in lines:
            mark, added = linked(mark, unframed(one))
            content += added
        (folder / f"journal-{number:06}.jsonl").write_bytes(content)


# Lines


def test_a_line_that_is_cut_or_changed_is_not_whole():
    whole = framed("ä, and a number: 1".encode())
    assert whole == b"%08x " % zlib.crc32(whole[9:-1]) + whole[9:]
    for k in range(len(whole)):
        assert unframed(whole[:k]) is None
        other = whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :]
        assert unframed(other) is None


def test_what_waits_shares_one_synchronisation(tmp_path, monkeypatch):
    calls, go = [], threading.Event()

    def slow(fd):
        calls.append(fd)
        assert go.wait(PATIENCE)

    monkeypatch.setattr(module, "_synchronise", slow)
    journal = Journal(tmp_path)
    first = journal.append(b"first")
    eventually(lambda: calls)
    others = [journal.append(b"other %d" % i) for i in range(100)]
    assert len(set(map(id, others))) == 1 and not first.done.done()
    go.set()
    for batch in (first, *others):
        batch.wait()
    assert len(calls) == 2 and len(held(tmp_path)) == 101
    journal.close()


def test_no_patient_is_answered_before_the_disk_has_it(tmp_path, monkeypatch):
    order, real = [], os.fdatasync
    monkeypatch.setattr(module, "_synchronise", lambda fd: (real(fd), order.append("disk")))
    journal = Journal(tmp_path)
    for _ in range(5):
        journal.append(b"x").wait()
        order.append("answer")
    assert order == ["disk", "answer"] * 5
    journal.close()


@pytest.mark.parametrize("where", ["write", "synchronise", "half of it"])
def test_a_failed_write_is_reported_and_leaves_nothing(tmp_path, monkeypatch, where):
    journal, write = Journal(tmp_path), os.write
    journal.append(b"before").wait()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    def half(fd, data):
        if len(data) > 10:
            return write(fd, data[:10])
        return refuse()

    if where == "synchronise":
        monkeypatch.setattr(module, "_synchronise", refuse)
    else:
        monkeypatch.setattr(module.os, "write", refuse if where == "write" else half)
    with pytest.raises(StoreFailed, match="stored nothing of it: No space left"):
        journal.append(b"no room for this").wait()
    monkeypatch.undo()
    assert held(tmp_path) == [b"before"]
    journal.append(b"after").wait()
    assert held(tmp_path) == [b"before", b"after"] and len(segments(tmp_path)) == 2
    paths, _, mark = journal.cut()
    assert mark.seq == 2
    assert paths == segments(tmp_path)
    journal.close()


# After a crash


def test_what_is_left_is_taken_once_and_in_its_order(folder):
    with Store(STUDY, folder) as store:
        store.records.append(patient(1, START), START, "", answer(), reasons())
    lines = [line(k) for k in (3, 1, 2, 3)]  # p1 is in the tables, p3 comes twice
    lines[0] = line(3, risk=0.99)
    written(folder, lines[:2], lines[2:])
    for _ in range(2):
        with Store(STUDY, folder) as store:
            assert names(store) == ["p1", "p3", "p2"] and store.verify() == []
            stored = store.queries.table("predictions").set_index("record_id")["risk"]
            assert stored["p3"] == answer()["risk"]  # The last attempt is the one that was answered
        assert segments(folder) == []


def test_a_broken_line_is_stated_and_stored_aside(folder):
    with Store(STUDY, folder):
        pass
    damaged = line(1).replace(b"p1", b"p9", 1)
    (folder / "journal-000007.jsonl").write_bytes(line(0) + damaged + line(2) + line(3)[:-9])
    with Store(STUDY, folder) as store:
        assert names(store) == ["p0", "p2"] and store.verify() == []
        log = store.queries.table("audit")
        (result,) = log.loc[log["kind"] == "journal", "content"]
    assert json.loads(result)["broken"] == {"journal-000007.jsonl": 2}
    assert [path.name for path in folder.glob("*.broken")] == ["journal-000007.broken"]
    with Store(STUDY, folder) as store:
        assert names(store) == ["p0", "p2"]


def test_kill_minus_nine_while_nothing_is_moved(folder):
    code = """
import lm.data.engine, signal
lm.data.engine.CHECKPOINT_PAUSE = 1000
store = Store(STUDY, folder)
for i in range(50):
    store.records.append(patient(i), START, "", answer(), reasons())
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(code, folder).returncode == -9
    assert len(held(folder)) == 50
    with Store(STUDY, folder) as store:
        assert names(store) == [f"p{i}" for i in range(50)]
        assert store.status.counts()["explanations"] == 50 and store.verify() == []


# In front of the tables


def test_who_asks_sees_all_that_was_acknowledged(folder):
    with Store(STUDY, folder) as store:
        for i in range(5):
            store.records.append(patient(i, START), START, "", answer(), reasons())
            assert store.queries.patient(f"p{i}")["predictions"][0]["risk"] == answer()["risk"]
            assert len(store.queries.as_of(START)) == store.status.counts()["records"] == i + 1


def test_moved_without_being_asked(folder, monkeypatch):
    monkeypatch.setattr("lm.data.engine.CHECKPOINT_PAUSE", 0.01)
    with Store(STUDY, folder) as store:
        store.records.append(patient(0, START), START, "", answer(), reasons())
        eventually(lambda: not store.status.queued())
        assert not store.status.queued() and segments(folder) == []


def test_patients_one_by_one_and_in_batches_never_share_a_name(folder):
    frame = [patient(i, START) for i in range(60)]
    results = {"one": 0, "batch": 0}

    def one(row):
        try:
            store.records.append(row, START)
            results["one"] += 1
        except Duplicate:
            pass

    def batch(rows):
        for row in rows:
            try:
                store.records.append_many(pd.DataFrame([row]), START)
                results["batch"] += 1
            except Duplicate:
                pass

    with Store(STUDY, folder) as store, ThreadPoolExecutor(6) as pool:
        done = [pool.submit(batch, frame[k::2]) for k in range(2)]
        done += [pool.submit(one, row) for row in frame * 2]
        for future in done:
            future.result()
        stored = names(store)
        assert sorted(stored) == sorted({row["record_id"] for row in frame})
        assert results["one"] + results["batch"] == len(stored) and store.verify() == []


def test_offered_is_what_add_record_stores(folder):
    with Store(STUDY, folder) as store:
        inputs = (START, "ward", answer(), reasons())
        batch = store.records.append_nowait(patient(0, START), *inputs)
        batch.wait()
        assert store.records.append_nowait(patient(0, START), *inputs) is None
        assert store.records.append_nowait(patient(1, START), *inputs) is not None
        store.records.append(patient(2, START), *inputs)
        with pytest.raises(Duplicate):
            store.records.append(patient(0, START), *inputs)
        for table in ("records", "predictions", "explanations"):
            rows = store.queries.table(table).drop(
                columns=["record_id", "received"], errors="ignore"
            )
            rows = rows.drop(columns=STUDY.feature_names)
            assert (rows.nunique(dropna=False) == 1).all()


def test_too_many_that_wait_are_refused(folder, monkeypatch):
    monkeypatch.setattr("lm.data.intake.MOST_WAITING", 3)
    monkeypatch.setattr("lm.data.engine.CHECKPOINT_PAUSE", 1000)
    with Store(STUDY, folder) as store:
        for i in range(3):
            store.records.append(patient(i, START), START)
        with pytest.raises(StoreFailed, match="3 entries wait for the disk"):
            store.records.append(patient(3, START), START)
        assert len(store.queries.as_of(START)) == 3
        store.records.append(patient(3, START), START)


def test_an_attempt_that_the_disk_refused_may_come_again(folder, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    with Store(STUDY, folder) as store:
        store.records.append(patient(0, START), START)
        monkeypatch.setattr(module, "_synchronise", refuse)
        with pytest.raises(StoreFailed):
            store.records.append(patient(1, START), START)
        monkeypatch.undo()
        store.records.append(patient(1, START), START, "again")
        assert store.queries.table("records")["source"].tolist() == ["", "again"]


# Names


def test_names_are_never_wrong_about_a_new_one(folder):
    known = Names()
    assert "anything" in known  # Before the tables are read
    rng = np.random.default_rng(0)
    old, new, other = ([f"{kind}{n}" for n in rng.integers(1 << 40, size=500)] for kind in "abc")
    known.load(np.empty(0, np.uint64), np.array([key_of(name) for name in old], np.uint64))
    known.add(new)
    for _ in range(2):
        assert all(name in known for name in [*old, *new])
        assert not any(name in known for name in other)
        known.fold(most=10)
    assert not known._new and len(known._old) == 1000


def test_a_name_is_hashed_in_python_as_in_the_tables():
    odd = ["p1", "Zoë", "'; DROP TABLE records; --", "x" * 100, "患者", "p1"]
    query = f"SELECT {HASHED} FROM (SELECT unnest(?) AS record_id)"
    result = duckdb.execute(query, [odd]).fetchall()
    assert result == [(key_of(name),) for name in odd]

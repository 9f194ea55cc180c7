"""What is in the journal and not in the tables yet: readers see it, once, and no writer waits."""

import os
import random
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from support.long import much
from support.waiting import PATIENCE
from support.ward import DAY, START, STUDY, answer, patient, reasons, run

import lm.data.checkpoint
import lm.data.journal
from lm.core.errors import LMError
from lm.data.journal import StoreFailed
from lm.data.names import Names
from lm.data.records import Duplicate, UnknownRecord
from lm.data.store import Store

NOW = START + 40 * DAY


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "ward"


@pytest.fixture
def store(folder, monkeypatch):
    """A store that moves nothing by itself, with three patients in its tables."""
    monkeypatch.setattr("lm.data.engine.CHECKPOINT_PAUSE", 1000)
    with Store(STUDY, folder) as opened:
        for i in range(3):
            opened.records.append(patient(i, START), START, "", answer(), reasons())
        opened.audit.head()
        yield opened


class Held:
    """Another thread holds the writing connection, as a move of a million lines does."""

    def __init__(self, store):
        self.store, self.taken, self.free = store, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold)

    def hold(self):
        with self.store.database.lock:
            self.taken.set()
            self.free.wait(PATIENCE)

    def __enter__(self):
        self.thread.start()
        assert self.taken.wait(PATIENCE)

    def __exit__(self, *_):
        self.free.set()
        self.thread.join()


def at_once(*calls):
    """Results of calls that must not wait for the one who holds the connection."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(call) for call in calls]]


# No writer and no reader of one record waits


def test_what_is_reported_of_a_patient_waits_for_no_move(store):
    with Held(store):
        at_once(lambda: store.records.append(patient(7, START), START, "", answer(), reasons()))
        at_once(
            lambda: store.outcomes.append("p0", 1, NOW, NOW - 35 * DAY),
            lambda: store.outcomes.append("p7", 0, NOW),
            lambda: store.decisions.append("p1", "Dr A", "agree", "", NOW),
            lambda: store.rejections.append("record", "p9", "age", 1, "rule", "message", {}, NOW),
        )
        counts, clock, known, standing, has = at_once(
            store.status.counts,
            store.clock.data_time,
            lambda: store.queries.patient("p7"),
            lambda: store.queries.current("p0"),
            lambda: store.queries.has("p0", "outcomes"),
        )
        assert counts["records"] == 4 and counts["outcomes"] == 2 and counts["rejects"] == 1
        assert clock == NOW and has and standing["y"] == 1
        assert [row["y"] for row in known["outcomes"]] == [0] and known["records"][0]["age"] == 57
        (number,) = at_once(
            lambda: store.withdrawals.append("outcome", "p0", "Dr A", "wrong", NOW)["seq"]
        )
        assert number == 1 and store.queries.current("p0")["y"] is None
    assert store.verify() == [] and store.status.counts()["withdrawals"] == len(
        store.queries.table("withdrawals")
    )


def test_readers_of_tables_delay_no_client(store):
    with store.database.read() as connection:
        before = connection.execute("SELECT count(*) FROM records").fetchall()
        at_once(
            lambda: store.records.append(patient(8, START), START),
            lambda: store.audit.head(),
            lambda: store.audit.append("access", {}),
        )
        assert connection.execute("SELECT count(*) FROM records").fetchall() == before


def test_the_disk_has_it_before_anybody_is_answered(store, monkeypatch):
    order, real = [], lm.data.journal._synchronise
    monkeypatch.setattr(
        lm.data.journal, "_synchronise", lambda fd: (real(fd), order.append("disk"))
    )
    for do in (
        lambda: store.outcomes.append("p0", 0, NOW),
        lambda: store.decisions.append("p0", "Dr A", "agree", "", NOW),
        lambda: store.withdrawals.append("outcome", "p0", "Dr A", "wrong", NOW),
        lambda: store.rejections.append("record", "p9", "age", 1, "rule", "message", {}, NOW),
        lambda: store.events.append_update({"as_of": NOW, "action": "keep"}),
    ):
        do()
        order.append("answer")
    assert order == ["disk", "answer"] * 5


# Each once, wherever it is


def test_the_same_outcome_at_the_same_moment_is_one(store, monkeypatch):
    calls, go, real = [], threading.Event(), lm.data.journal._synchronise

    def slow(fd):
        calls.append(fd)
        assert go.wait(PATIENCE)
        real(fd)

    monkeypatch.setattr(lm.data.journal, "_synchronise", slow)
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(store.outcomes.append, "p0", 0, NOW) for _ in range(8)]
        result = [
            pool.submit(store.decisions.append, "p0", "Dr A", "agree", "", NOW) for _ in range(8)
        ]
        while not calls:
            pass
        go.set()
        assert len({future.result(PATIENCE) for future in result}) == 1
        for future in results:
            future.result(PATIENCE)
    assert len(store.queries.table("outcomes")) == len(store.queries.table("decisions")) == 1


def test_what_the_disk_refused_is_neither_reported_nor_counted(store, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    before = store.status.counts()
    monkeypatch.setattr(lm.data.journal, "_synchronise", refuse)
    for do in (
        lambda: store.outcomes.append("p0", 0, NOW),
        lambda: store.decisions.append("p0", "Dr A", "agree", "", NOW),
        lambda: store.withdrawals.append("record", "p0", "Dr A", "wrong", NOW),
        lambda: store.records.append(patient(3, START) | {"corrects": "p0"}, START),
        lambda: store.events.append_update({"as_of": NOW, "action": "keep"}),
    ):
        with pytest.raises(LMError, match="stored nothing of it: No space left"):
            do()
    monkeypatch.undo()
    assert (
        store.status.counts() == before
        and not store.status.has_corrections()
        and store.clock.data_time() == START
    )
    assert store.queries.current("p0") == {
        "counts_as": "p0",
        "y": None,
        "outcome": None,
        "withdrawn_by": None,
    }
    store.outcomes.append("p0", 0, NOW)
    assert store.queries.table("outcomes")["y"].tolist() == [0] and store.verify() == []


KINDS = ("record", "again", "outcome", "other", "decision", "withdraw", "move", "restart")


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2)), max_size=12))
def test_tail_and_tables_together_are_the_tables_alone(tmp_path_factory, steps):
    """Whatever is moved when: the answers are those of a store that moves after each step."""
    place = tmp_path_factory.mktemp("both")
    stores = [Store(STUDY, place / name) for name in ("lazy", "eager")]
    try:
        for kind, number in steps:
            results = []
            for which, one in enumerate(stores):
                results.append(step(one, kind, number))
                if which or kind == "move":
                    one.audit.head()
            assert results[0] == results[1]
            if kind == "restart":
                for one in stores:
                    one.close()
                stores = [Store(STUDY, one.folder) for one in stores]
            for name in ("p0", "p1 again", "p2"):
                assert seen(stores[0], name) == seen(stores[1], name)
            counts = [one.status.counts() | {"audit": 0} for one in stores]
            assert (
                counts[0] == counts[1]
                and stores[0].clock.data_time() == stores[1].clock.data_time()
            )
        known = [one.queries.as_of(NOW).astype(str).to_dict() for one in stores]
        assert known[0] == known[1] and [one.verify() for one in stores] == [[], []]
    finally:
        for one in stores:
            one.close()


def step(store, kind, number):
    """Do something to a store; what it says."""
    name, when = f"p{number}", NOW + number * DAY
    try:
        if kind == "record":
            store.records.append(patient(number, START), START, "", answer(), reasons())
        elif kind == "again":
            row = patient(number, START + DAY, record_id=f"{name} again", corrects=name)
            store.records.append(row, START + DAY, "", answer(), reasons())
        elif kind == "outcome":
            store.outcomes.append(name, 0, when)
        elif kind == "other":
            store.outcomes.append(f"{name} again", 1, when, START + 3 * DAY)
        elif kind == "decision":
            return store.decisions.append(name, "Dr A", "agree", "", when)
        elif kind == "withdraw":
            return str(
                store.withdrawals.append(
                    ("record", "outcome")[number % 2], name, "Dr A", "no", when
                )
            )
    except LMError as error:
        return str(error)
    return None


def seen(store, name):
    """What a store says of one record."""
    try:
        return (
            str(store.queries.patient(name)),
            store.queries.current(name),
            store.queries.has(name, "outcomes"),
        )
    except UnknownRecord as error:
        return str(error)


# After a crash


def test_kill_minus_nine_with_every_kind_in_the_journal(folder):
    code = """
import lm.data.engine, signal
lm.data.engine.CHECKPOINT_PAUSE = 1000
store = Store(STUDY, folder)
for i in range(5):
    store.records.append(patient(i, START), START, "", answer(), reasons())
store.records.append(patient(9, START + DAY, record_id="p4 again", corrects="p4"), START + DAY)
store.outcomes.append("p0", 1, START + 5 * DAY, START + 2 * DAY)
store.outcomes.append("p1", 0, START + 30 * DAY)
store.outcomes.append("p1", 1, START + 31 * DAY, START + 2 * DAY)
late = pd.DataFrame({"record_id": ["p2", "p3"], "y": 0, "known_at": START + 30 * DAY})
store.outcomes.append_many(late)
store.decisions.append("p0", "Dr A", "agree", "", START + DAY)
store.withdrawals.append("outcome", "p1", "Dr A", "wrong patient", START + 32 * DAY)
store.withdrawals.append("record", "p3", "Dr B", "a test", START + 32 * DAY)
store.rejections.append("record", "p8", "age", 1, "rule", "message", {}, START)
store.events.append_verdict({"as_of": START + 33 * DAY, "action": "nothing"})
store.events.append_update({"as_of": START + 33 * DAY, "action": "keep"})
assert store.status.queued() == 16
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(code, folder).returncode == -signal.SIGKILL
    for _ in range(2):
        with Store(STUDY, folder) as store:
            assert store.queries.table("outcomes")["y"].tolist() == [1, 0, 1, 0, 0]
            assert store.queries.table("outcomes")["seq"].tolist() == [1, 2, 3, 4, 5]
            assert store.queries.table("decisions")["record_id"].tolist() == ["p0"]
            assert store.queries.table("withdrawals")["entry"].fillna(0).tolist() == [3, 0]
            assert (
                store.queries.current("p1")["y"] == 0
                and store.queries.current("p3")["withdrawn_by"] == "Dr B"
            )
            assert store.queries.current("p4")["counts_as"] == "p4 again"
            assert len(store.queries.table("rejects")) == len(store.queries.table("updates")) == 1
            assert store.clock.data_time() == START + 33 * DAY and store.verify() == []
            log = store.queries.table("audit")
            signed = log.loc[log["kind"] != "journal", "actor"]  # The journal's note says when
            assert signed.tolist() == ["", "Dr A", "Dr B", ""]


def test_a_move_that_was_done_and_not_noticed_doubles_nothing(folder, monkeypatch):
    monkeypatch.setattr("lm.data.engine.CHECKPOINT_PAUSE", 1000)
    with Store(STUDY, folder) as store:
        store.records.append(patient(0, START), START)
        store.outcomes.append("p0", 0, NOW)
        (path,) = folder.glob("journal-*.jsonl")
        stored = path.read_bytes()
        store.audit.head()
    path.write_bytes(stored)  # A death between the commit and the deletion of the file
    with Store(STUDY, folder) as store:
        assert store.status.counts()["outcomes"] == store.status.counts()["records"] == 1
        assert len(store.queries.table("outcomes")) == 1 and store.verify() == []
        store.outcomes.append("p0", 1, NOW, START + 2 * DAY)
        assert store.queries.table("outcomes")["seq"].tolist() == [1, 2]
    assert not os.listdir(folder / "snapshots")


def test_readers_see_each_row_once_while_it_is_moved(folder, monkeypatch):
    monkeypatch.setattr("lm.data.engine.CHECKPOINT_PAUSE", 0.001)
    with Store(STUDY, folder) as store:
        store.records.append(patient(0, START), START, "", answer(), reasons())
        results, over = [], threading.Event()

        def read():
            while not over.is_set():
                least = len(results)
                rows = store.queries.patient("p0")
                numbers = [row["seq"] for row in rows["outcomes"]]
                assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= least
                assert len(rows["records"]) == len(rows["predictions"]) == 1

        with ThreadPoolExecutor(2) as pool:
            reading = [pool.submit(read) for _ in range(2)]
            for number in range(60):
                store.outcomes.append("p0", 0, NOW + number * pd.Timedelta(hours=1))
                results.append(number)
            over.set()
            for future in reading:
                future.result(PATIENCE)
        assert store.queries.table("outcomes")["seq"].tolist() == list(range(1, 61))


# Names, and the last rows


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A folder with a store of 300 patients, which keeps files of names."""
    folder = tmp_path_factory.mktemp("grown") / "ward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.data.memory_index.MANY_NAMES", 100)
        with Store(STUDY, folder) as store:
            rows = pd.DataFrame([patient(i, START) for i in range(300)])
            store.records.append_many(rows, rows["arrived"])
    return folder


def test_names_are_known_when_the_store_is_open_and_no_table_is_read_for_them(grown, monkeypatch):
    read = []
    load = Names.load
    monkeypatch.setattr(
        Names, "load", lambda *inputs: (read.append(len(inputs[2])), load(*inputs))[1]
    )
    with Store(STUDY, grown) as store:
        assert sum(read) == 0 and all(names.loaded for names in store.engine.index.names.values())
        assert all(f"p{i}" in store.engine.index.names["records"] for i in range(300))
        assert "p300" not in store.engine.index.names["records"]
        store.records.append(patient(300, START), START)
        with pytest.raises(Duplicate):
            store.records.append(patient(7, START), START)
    read.clear()
    with Store(STUDY, grown) as store:  # The file is of the moment before
        assert sum(read) == 1 and "p300" in store.engine.index.names["records"]


@pytest.mark.parametrize("how", ["absent", "cut", "changed", "of another store", "ahead"])
def test_names_that_are_out_of_date_are_read_again(grown, tmp_path, how, monkeypatch):
    monkeypatch.setattr("lm.data.memory_index.MANY_NAMES", 100)
    folder = shutil.copytree(grown, tmp_path / "ward")
    path = folder / "records.names.npy"
    stored = np.load(path)
    if how == "absent":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        place = {"changed": -1, "of another store": 2, "ahead": 0}[how]
        stored[place] += np.uint64(10_000)
        np.save(path, stored)
    with Store(STUDY, folder) as store:
        assert all(f"p{i}" in store.engine.index.names["records"] for i in range(300))
        with pytest.raises(Duplicate):
            store.records.append(patient(299, START), START)
    with Store(STUDY, folder) as store:  # And written anew
        assert (
            store.engine.index.names["records"].on_disk >= 300
            and store.engine.names.stored("records")[1] >= 300
        )


def hurt(whole, earlier, how, rng):
    """The file of names of seven patients after damage; None where it is gone."""
    flipped = bytearray(whole)
    flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    header = bytearray(whole)
    header[rng.randrange(128)] ^= 1 << rng.randrange(8)  # As numpy reads it
    rows = whole[:128] + (7).to_bytes(8, "little") + earlier[136:]  # It claims more than it has
    made = {"flipped": bytes(flipped), "header": bytes(header), "rows": rows, "empty": b""}
    made |= {"rubbish": rng.randbytes(len(whole)), "zeros": bytes(len(whole)), "earlier": earlier}
    made |= {"mixed": earlier[:160] + whole[160:], "longer": whole + whole[-8:]}
    return (made | {"cut": whole[: rng.randrange(len(whole))], "gone": None})[how]


HURT = ("flipped", "header", "rows", "empty", "rubbish", "zeros", "earlier", "mixed", "longer")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A folder with seven patients, and its file of names when there were four."""
    folder = tmp_path_factory.mktemp("seven") / "ward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.data.memory_index.MANY_NAMES", 3)
        for some in (range(4), range(4, 7)):
            earlier = (folder / "records.names.npy").read_bytes() if some[0] else b""
            with Store(STUDY, folder) as store:
                for i in some:
                    store.records.append(patient(i, START), START)
    return folder, earlier


@pytest.mark.slow
@settings(max_examples=much(40, 400), deadline=None)
@given(how=st.sampled_from([*HURT, "cut", "gone"]), running=st.booleans(), seed=st.integers(0, 999))
def test_no_damage_to_the_names_lets_a_patient_come_twice(seven, how, running, seed):
    (folder, earlier), path = seven, seven[0] / "records.names.npy"
    whole = path.read_bytes()
    made = hurt(whole, earlier, how, random.Random(seed))

    def put():
        path.unlink() if made is None else path.write_bytes(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.data.memory_index.MANY_NAMES", 3)
        if not running:
            put()
        with Store(STUDY, folder) as store:
            if running:  # In place, as a copy over it does
                put()
            for i in range(7):
                assert store.queries.has(f"p{i}")
                with pytest.raises(Duplicate):
                    store.records.append(patient(i, START), START)
            assert not store.queries.has("p7") and store.status.counts()["records"] == 7
    path.write_bytes(whole)


def test_many_names_without_a_file_are_stored_at_once_and_never_written_for_nothing(
    grown, tmp_path, monkeypatch
):
    monkeypatch.setattr("lm.data.memory_index.MANY_NAMES", 100)
    folder = shutil.copytree(grown, tmp_path / "ward")
    path = folder / "records.names.npy"
    path.unlink()
    with Store(STUDY, folder):
        first = path.stat()
        assert len(np.load(path)) >= 4 + 300
    assert path.stat().st_ino == first.st_ino  # Nothing has come


KEYS = st.lists(st.integers(0, 2**64 - 1), max_size=40)


@given(KEYS, KEYS)
def test_names_are_sorted_and_all_there(stored, fresh):
    names = Names()
    names.load(np.sort(np.array(stored, np.uint64)), np.array(fresh, np.uint64))
    names._new = set(fresh)
    assert set(names.sorted().tolist()) == {*stored, *fresh}
    assert (np.diff(names.sorted().astype(object)) >= 0).all()


@pytest.mark.parametrize("before", [False, True])
def test_an_index_finds_what_is_reported_of_a_record(grown, tmp_path, before):
    folder = shutil.copytree(grown, tmp_path / "ward")
    if before:  # A version without these indices
        with Store(STUDY, folder) as store, store.database.atomic() as connection:
            for table in ("outcomes", "decisions"):
                connection.execute(f"DROP INDEX {table}_by_record")
    with Store(STUDY, folder) as store:
        for i in range(300):
            store.outcomes.append(f"p{i}", 0, START + 20 * DAY)
            store.decisions.append(f"p{i}", "Ada", "agree", "", START + DAY)
        with store.engine.checkpoint.transaction() as connection:
            for table in ("records", "outcomes", "decisions"):
                query = (
                    f"EXPLAIN ANALYZE SELECT * FROM {table} WHERE record_id = 'p7' ORDER BY rowid"
                )
                assert "Index Scan" in connection.execute(query).fetchall()[0][1]
        assert [row["y"] for row in store.queries.patient("p7")["outcomes"]] == [0]


@pytest.mark.parametrize("last", [0, 1, 7, 299, 1000])
@pytest.mark.parametrize("as_of", [None, START, START - DAY])
def test_the_last_rows_are_those_of_the_whole_table(grown, tmp_path, last, as_of):
    with Store(STUDY, shutil.copytree(grown, tmp_path / "ward")) as store:
        store.records.append(patient(400, START + DAY), START + DAY)
        whole, some = (
            store.queries.table("records", as_of=as_of),
            store.queries.table("records", as_of, last),
        )
        assert_frame_equal(some, whole.tail(last).reset_index(drop=True))
        mine = ["p3", "p400", "p9"]
        result = store.queries.table("records", as_of, last, mine)["record_id"].tolist()
        held = store.queries.table("records", as_of, record_id=mine)["record_id"].tolist()
        assert result == held[len(held) - min(last, len(held)) :]


# Notes without a waiting caller


def test_an_update_and_what_led_to_it_are_one_line_of_the_journal(folder, monkeypatch):
    monkeypatch.setattr("lm.data.engine.CHECKPOINT_PAUSE", 1000)
    update = {"as_of": START, "action": "promote", "reason": "tested", "snapshot": ""}
    update |= {"from_version": None, "evidence": {"by": "Dr A", "settings_before": 1}}
    note = ("attempt", {"version": 2}, "Dr A")
    with Store(STUDY, folder) as store:
        store.records.append(patient(0, START), START)
        with Held(store):
            (first,) = at_once(lambda: store.events.append_update(update | {"to_version": 2}, note))
            swaps = store.status.swaps()
        second = store.events.append_update(update | {"to_version": None}, note)
        assert [swap["to_version"] for swap in swaps] == [2] and store.status.swaps() == swaps
        assert [step["seq"] for step in store.status.updates()] == [first, second] == [1, 2]
        (path,) = folder.glob("journal-*.jsonl")
        stored = path.read_bytes()
        assert stored.count(b"\n") == 4  # The first line, a patient, two updates with their notes
        assert store.queries.table("audit")["kind"].tolist()[-3:] == [
            "attempt",
            "attempt",
            "updates",
        ]
        assert [step["seq"] for step in store.status.updates()] == [1, 2]
    path.write_bytes(stored)  # A death between the commit and the deletion of the file
    with Store(STUDY, folder) as store:
        log = store.queries.table("audit")
        attempts = log[log["kind"] == "attempt"]
        assert attempts["actor"].tolist() == ["Dr A"] * 2 and store.verify() == []
        assert store.status.swaps() == swaps and len(store.queries.table("updates")) == 2


def test_the_tail_is_emptied_in_steps_between_which_others_are_taken(store, monkeypatch):
    monkeypatch.setattr("lm.data.checkpoint.RELEASED", 2)
    sizes, real = [], type(store.engine.index.tail).remove

    def remove(tail, entries):
        sizes.append(len(entries))
        real(tail, entries)

    for i in range(4, 9):
        store.records.append(patient(i, START), START, "", answer(), reasons())
    monkeypatch.setattr(type(store.engine.index.tail), "remove", remove)
    assert len(store.queries.table("records")) == 8 and sizes == [2, 2, 1]
    assert len(store.engine.index.tail) == 0 and store.verify() == []


def test_an_update_that_the_disk_refuses_is_no_swap(store, monkeypatch):
    update = {"as_of": START, "action": "promote", "reason": "tested", "snapshot": ""}
    update |= {"from_version": None, "to_version": 2, "evidence": {}}

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lm.data.journal._synchronise", full)
        with pytest.raises(StoreFailed):
            store.events.append_update(update, ("attempt", {"version": 2}, "Dr A"))
    assert store.status.swaps() == [] == store.status.updates()
    assert "attempt" not in store.queries.table("audit")["kind"].tolist()
    store.events.append_update(update)
    assert [swap["to_version"] for swap in store.status.swaps()] == [2]


def test_a_move_inserts_into_each_table_once_for_each_signer(store, monkeypatch):
    inserted, real = [], lm.data.checkpoint.insert_rows

    def insert(database, connection, table, rows):
        inserted.append(table)
        real(database, connection, table, rows)

    monkeypatch.setattr("lm.data.checkpoint.insert_rows", insert)
    for i in range(10):
        store.records.append(patient(100 + i, START), START, "", answer(), reasons())
        store.decisions.append(f"p{100 + i}", f"Dr {i % 3}", "agree", "", NOW)
        store.outcomes.append(f"p{100 + i}", 0, NOW)
    before = store.status.counts()["audit"]
    store.audit.head()
    assert sorted(inserted) == ["decisions", "explanations", "outcomes", "predictions", "records"]
    signed = store.queries.table("audit")["actor"].tolist()[before:]
    assert signed == ["", *(f"Dr {i % 3}" for i in range(10))] and store.verify() == []
    assert store.queries.table("decisions")["seq"].tolist() == list(range(1, 11))

"""Long work: the audit, whole tables, scorings. In steps, within memory; other requests go on."""

import asyncio
import configparser
import threading
import tracemalloc
from contextlib import suppress

import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from support.waiting import PATIENCE
from support.ward import DAY, START, STUDY, all_kinds, patient

import lm.data.as_of as as_of
import lm.data.hash_chain as hash_chain
import lm.data.verification as verification
import lm.serve.app
import lm.serve.middleware
from lm.core.errors import Busy
from lm.core.limits import Overdue, check_time, deadline, stop_when_overdue, without_deadline
from lm.core.reader import ARROW, PARQUET
from lm.core.settings import find_root
from lm.data.store import Store
from lm.jobs.jobs import Jobs
from lm.machine.machine import Machine
from lm.serve.app import create_app
from lm.serve.handlers import POOLS

NOW = START + 60 * DAY


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with Store(STUDY, tmp_path_factory.mktemp("store") / "ward") as store:
        all_kinds(store)
        yield store


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A machine without a model, with rows, and its application."""
    home = tmp_path_factory.mktemp("desk")
    with Machine(STUDY, home) as machine:
        all_kinds(machine.store)
        yield machine, create_app(machine, Jobs(home / "jobs"), None)


def ask(app, method, path, **how):
    async def talk():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **how)

    return asyncio.run(talk())


def held_at(monkeypatch, name):
    """Let the function of the log's reader stop at its first call until the event is set."""
    there, go_on, before = threading.Event(), threading.Event(), getattr(hash_chain, name)

    def waits(*inputs, **how):
        there.set()
        assert go_on.wait(PATIENCE)
        return before(*inputs, **how)

    monkeypatch.setattr(hash_chain, name, waits)
    return there, go_on


def test_patients_are_stored_while_the_log_is_verified(tmp_path, monkeypatch):
    with Store(STUDY, tmp_path / "ward") as store:
        all_kinds(store)
        there, go_on = held_at(monkeypatch, "give_way")
        results = []
        work = threading.Thread(target=lambda: results.extend(["done", *store.verify()]))
        work.start()
        assert there.wait(PATIENCE)
        assert store.database.lock.acquire(timeout=PATIENCE)  # Free in the middle of the work
        store.database.lock.release()
        store.records.append_many(*batch(100, 3))
        store.audit.append("attempt", {"meanwhile": 1})
        assert store.audit.head()[0] == store.status.counts()["audit"] and not results
        go_on.set()
        work.join(60)
        assert results == ["done"] and store.verify() == []


def batch(start, count):
    rows = pd.DataFrame([patient(i) | {"arrived": START} for i in range(start, start + count)])
    return rows, rows["arrived"]


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(step=st.integers(1, 30), window=st.integers(2, 30), place=st.integers(0, 10**6))
def test_steps_of_any_length_find_the_same(store, step, window, place):
    names = [name for name, rows in store.status.counts().items() if rows and name != "audit"]
    table = names[place % len(names)]
    row, before = place % store.status.counts()[table], (hash_chain.LOG_BATCH, verification.WINDOW)
    with suppress(ZeroDivisionError), store.engine.checkpoint.transaction() as connection:
        connection.execute(f"DELETE FROM {table} WHERE rowid = {row}")
        whole = verification.verify_tables(connection, store.folder)
        assert f"{table}: row {row + 1} of entry" in "".join(whole)
        hash_chain.LOG_BATCH, verification.WINDOW = step, window
        try:
            assert verification.verify_tables(connection, store.folder) == whole
        finally:
            hash_chain.LOG_BATCH, verification.WINDOW = before
        raise ZeroDivisionError  # Nothing of it is stored


@pytest.mark.slow
def test_verifying_holds_few_rows_in_memory(tmp_path):
    grown = []
    with Store(STUDY, tmp_path / "ward") as store:
        for start in (0, 3_000, 6_000):
            store.records.append_many(*batch(start, 3_000))
            tracemalloc.start()
            assert store.verify() == []
            grown.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert grown[2] < 1.3 * grown[0]


def test_a_second_audit_is_refused_while_one_is_at_work(desk):
    machine, app = desk
    with machine.verifying:
        with pytest.raises(Busy, match="already"):
            machine.verify()
        assert ask(app, "GET", "/v1/audit").status_code == 409
    assert ask(app, "GET", "/v1/audit").json() == {"faults": []}


@pytest.mark.parametrize("when", [None, NOW - 30 * DAY])
def test_pieces_are_the_table(store, when, monkeypatch):
    monkeypatch.setattr(as_of, "BATCH", 2)
    for name in store.status.counts():
        pieces = pa.Table.from_batches(store.queries.table_batches(name, when)).to_pandas()
        pd.testing.assert_frame_equal(pieces, store.queries.table(name, when), check_dtype=False)
    known = pa.Table.from_batches(store.queries.as_of_batches(when)).to_pandas()
    pd.testing.assert_frame_equal(known, store.queries.as_of(when), check_dtype=False)


def test_whole_tables_come_in_each_form_and_say_their_length(desk):
    machine, app = desk
    for name in ("predictions", "rollouts", "sketches"):
        want = machine.table(name)
        arrow = ask(app, "GET", f"/v1/tables/{name}")
        assert arrow.headers["content-type"] == ARROW
        assert int(arrow.headers["content-length"]) == len(arrow.content)
        table = pa.ipc.open_stream(arrow.content).read_pandas()
        pd.testing.assert_frame_equal(table, want, check_dtype=False)
        parquet = ask(app, "GET", f"/v1/tables/{name}?form=parquet")
        assert parquet.headers["content-type"] == PARQUET
        assert pq.read_table(pa.py_buffer(parquet.content)).num_rows == len(want)
        rows = ask(app, "GET", f"/v1/tables/{name}?form=json").json()
        assert [row["record_id"] for row in rows if "record_id" in row] == list(
            want.get("record_id", ())
        )
    assert ask(app, "GET", "/v1/tables/outcomes?as_of=1900-01-01&form=json").json() == []
    assert ask(app, "GET", "/v1/tables/outcomes?form=xml").status_code == 422


SLOW = "SELECT count(*) FROM range(100000000000) t(i) WHERE i % 7 = 3"


def test_a_query_is_interrupted_once_the_deadline_of_reading_has_passed(store):
    late = pytest.raises(Overdue, match="ask for less")
    with deadline(0.2, reads=True), late, store.database.read() as connection:
        connection.execute(SLOW)
    with store.database.read() as connection:  # The connection goes on
        assert connection.execute("SELECT 1 AS one").fetchall() == [(1,)]


@pytest.mark.slow
def test_what_stores_is_never_cut_off():
    cut = threading.Event()
    with deadline(0.0), stop_when_overdue(cut.set):
        assert not cut.wait(0.6)
    with deadline(0.0, reads=True):
        with without_deadline(), stop_when_overdue(cut.set):
            check_time()
            assert not cut.wait(0.6)
        with pytest.raises(Overdue):
            check_time()


LATE = [
    *(
        ("GET", path)
        for path in ("/v1/audit", "/v1/tables/predictions", "/v1/patients", "/v1/visits/p0")
    ),
    *(("POST", path) for path in ("/v1/snapshots", "/v1/monitoring/runs", "/v1/backups")),
]


@pytest.mark.parametrize(("method", "path"), LATE)
def test_long_routes_have_a_deadline_and_store_nothing_after_it(desk, monkeypatch, method, path):
    machine, app = desk
    before = machine.store.status.counts()
    monkeypatch.setattr(lm.serve.middleware, "deadline", lambda _, reads=False: deadline(0, reads))
    answer = ask(app, method, path, **({} if method == "GET" else {"json": {}}))
    assert answer.status_code == 503 and answer.json()["kind"] == "Overdue", answer.text
    assert machine.store.status.counts() == before


def test_long_work_has_threads_of_its_own(desk, monkeypatch):
    machine, app = desk
    there, go_on = threading.Semaphore(0), threading.Event()

    def waits(*_):
        there.release()
        assert go_on.wait(PATIENCE)
        return []

    monkeypatch.setattr(machine, "verify", waits)

    async def talk():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            long = [asyncio.create_task(client.get("/v1/audit")) for _ in range(60)]
            for _ in range(POOLS["long"]):
                await asyncio.to_thread(there.acquire)
            for path in (
                "/v1/status",
                "/health",
                "/health/live",
                "/health/ready",
                "/v1/presence?record_id=p0",
            ):
                assert (await client.get(path)).status_code == 200
            assert (await client.get("/v1/tables/records?last=2")).status_code == 200
            busy = there.acquire(blocking=False)
            go_on.set()
            assert {(await one).status_code for one in long} == {200} and not busy

    asyncio.run(talk())


def test_health_asks_nothing_that_can_wait(desk, monkeypatch):
    machine, app = desk
    monkeypatch.setattr(machine, "status", None)
    with machine.lock, machine.store.database.lock:
        assert ask(app, "GET", "/health/ready").json() == {"ready": True, "champion": None}


def test_the_description_is_made_once_for_each_champion(desk, monkeypatch):
    machine, app = desk
    first, made = ask(app, "GET", "/openapi.json"), []
    before = lm.serve.app.openapi_document
    monkeypatch.setattr(
        lm.serve.app, "openapi_document", lambda *inputs: made.append(1) or before(*inputs)
    )
    assert ask(app, "GET", "/openapi.json").content == first.content and not made
    state = machine.status() | {"champion": 7}
    monkeypatch.setattr(machine, "status", lambda: state)
    assert ask(app, "GET", "/openapi.json").json()["paths"] and made == [1]


def test_the_parts_of_uvicorn_that_are_used_are_pinned():
    config = configparser.ConfigParser()
    config.read(find_root() / "settings.ini", encoding="utf-8")
    lines = config["DEFAULT"]["serve_requirements"].split()
    (line,) = [line for line in lines if line.startswith("uvicorn")]
    assert "<" in line and uvicorn.__version__ in Requirement(line).specifier

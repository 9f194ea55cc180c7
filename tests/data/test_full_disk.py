"""A full disk stops writing, not reading; a wall clock that jumps is named."""

import errno

import duckdb
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from support.ward import START, STUDY, answer, patient, reasons

import lm.data.journal as journal
from lm.data.store import Store
from lm.data.watch import ClockWatch
from lm.jobs.jobs import Jobs
from lm.machine.machine import Machine
from lm.serve.app import create_app


@pytest.fixture
def full(monkeypatch):
    """A disk that takes nothing, and what gives it room."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        monkeypatch.setattr(journal, "_synchronise", refuse)
        monkeypatch.setattr("lm.data.checkpoint._reach", move)

    def move(*_):
        raise duckdb.IOException("No space left on device")

    return fill, monkeypatch.undo


def test_a_full_disk_stops_writing_but_not_reading_and_says_so(tmp_path, full):
    fill, room = full
    with Machine(STUDY, tmp_path) as machine:
        app = create_app(machine, Jobs(tmp_path / "jobs"), None)
        service = TestClient(app)
        new = patient(1, START)
        row = {"record_id": "p1", "arrived": str(START)} | {n: new[n] for n in STUDY.feature_names}
        row = {key: None if value != value else value for key, value in row.items()}
        assert service.post("/v1/records", json={"row": row}).status_code == 200
        assert "writing_stopped" not in service.get("/health").json()
        waits = machine.store.status.queued()
        fill()
        refused = service.post("/v1/records", json={"row": row | {"record_id": "p2"}})
        assert (
            refused.status_code in (503, 507) and "stored nothing of it" in refused.json()["error"]
        )
        health, status = service.get("/health").json(), service.get("/v1/status")
        assert health["live"] and "No space left" in health["writing_stopped"]
        assert status.status_code == 200 and status.json()["counts"]["records"] == 1
        assert waits == 0 or machine.store.status.queued() == waits  # It stays in the journal
        assert len(machine.table("records")) == 1 and len(machine.known()) == 1
        assert service.get("/v1/records/p1").status_code == 200
        assert service.get("/health/ready").status_code == 200
        room()
        assert (
            service.post("/v1/records", json={"row": row | {"record_id": "p2"}}).status_code == 200
        )
        assert "writing_stopped" not in service.get("/health").json()
        assert machine.verify() == [] and machine.status()["counts"]["records"] == 2


class Clock:
    """Two clocks that a test sets."""

    def __init__(self):
        self.wall, self.steady = 1e9, 0.0

    def watch(self):
        return ClockWatch(lambda: self.wall, lambda: self.steady)


@pytest.mark.parametrize("jump, word", [(7200, "forward by 2 hours"), (-7200, "back by 2 hours")])
def test_a_jump_is_named_in_status_and_log(tmp_path, jump, word):
    clock = Clock()
    with Machine(STUDY, tmp_path) as machine:
        machine.store.clock.watch = clock.watch()
        clock.wall, clock.steady = clock.wall + 5, clock.steady + 5
        assert "clock_moved" not in machine.status()
        clock.wall += jump
        assert word in machine.status()["clock_moved"] and word in machine.problems()["clock_moved"]
        (noted,) = machine.store.audit.entries("clock")
        assert noted["seconds"] == jump
        log = machine.table("audit")
        assert log["seq"].tolist() == list(range(1, len(log) + 1)) and machine.verify() == []


def test_a_clock_before_the_last_entry_is_named_at_start(tmp_path, monkeypatch):
    with Store(STUDY, tmp_path / "ward") as store:
        store.audit.append("attempt", {})
    import lm.data.clock as module

    real = module.wall_time
    monkeypatch.setattr(module, "wall_time", lambda: real() - pd.Timedelta(days=3))
    with Store(STUDY, tmp_path / "ward") as store:
        assert "3 days before the last entry" in store.clock.jump and store.verify() == []
    monkeypatch.undo()
    with Store(STUDY, tmp_path / "ward") as store:
        assert store.clock.jump == ""


def test_a_replayed_study_has_its_own_clock(tmp_path):
    clock = Clock()
    with Store(STUDY, tmp_path / "ward") as store:
        store.records.append(patient(1, START), START, "", answer(), reasons())
        assert store.clock.replayed()
        store.clock.watch = clock.watch()
        clock.wall += 86_400
        assert store.clock.check_jump() == "" and store.audit.entries("clock") == []

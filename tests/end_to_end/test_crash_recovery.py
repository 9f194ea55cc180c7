"""kill -9 before every step of an update, a promotion and a rollback that leaves a trace on disk.

A machine is made once. Each death happens in a forked process, on a copy of its folder, before the
n-th durable step: a file opened to be written, renamed or synchronised, a statement or a commit of
the store or of MLflow's database. Then the machine is opened again.
"""

import builtins
import importlib
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import traceback
from functools import wraps
from pathlib import Path

import pandas as pd
import pytest
from support.long import much
from support.paths import TESTS

from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.audit_log import AuditLog
from lm.data.journal import Journal
from lm.machine.machine import Machine
from lm.model.predict import predict

OLD = 2  # The champion before: version 1 was the first, 2 was promoted, 3 waits
NEW = {"update": 4, "promote": 3, "rollback": 1}
POINTS = {"update": much(11, 99), "promote": much(6, 99), "rollback": much(5, 99)}  # Deaths, about
DAY = pd.Timedelta(days=1)
HEAVY = (  # What MLflow imports late
    *("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
    *("mlflow.store.db.utils", "mlflow.models", "alembic.command", "skops.io", "filelock"),
    *("mlflow.tracking", "mlflow.tracking.client", "pyarrow.parquet", "pyarrow.dataset"),
)


def shifted(machine, by):
    """Register a copy of the first model whose log-odds are larger by `by`."""
    model = machine.registry.load(1).recalibrated(by)
    return machine.registry.register(model, {}, {}, {}, f"shifted by {by}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A machine of monica with three versions and one verdict, closed."""
    study, home = load_study("monica"), tmp_path_factory.mktemp("made") / "home"
    rows = read_rows(study)
    with Machine(study, home) as machine:
        past = rows[rows["known_at"] <= study.first_model].tail(300)
        machine.receive_many(past, source="history", on_arrival=True)
        machine.add_outcomes(past)
        machine.update(machine.monitor(study.first_model, fast=True))
        machine.promote(shifted(machine, 0.5), "by hand", machine.plan.approvers[0])
        shifted(machine, -0.5)
        as_of = machine.store.clock.data_time() + 300 * DAY  # Long after the plan's cool-down
        crash = {"as_of": as_of, "action": "recalibrate", "reason": "crash", "version": OLD}
        machine.record_verdict(crash)
        assert machine.status()["champion"] == OLD
    return home


@pytest.fixture(scope="module")
def forks():
    """A process that has imported everything, holds no connection, and forks for each death."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["env"] = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen([sys.executable, __file__], **pipes) as process:
        yield process
        process.stdin.close()


# In the process that dies


class Fuse:
    """Writes down each step, and kills its process before step number `at`."""

    def __init__(self, path, at):
        self.file, self.at, self.steps = os.open(path, os.O_WRONLY | os.O_CREAT), at, 0

    def __call__(self, label):
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.tell(label)

    def tell(self, label):
        os.write(self.file, f"{label}\n".encode())

    def before(self, owner, name):
        """Let a function of the system be a step."""
        function = getattr(owner, name)

        @wraps(function)
        def call(*inputs, **named):
            self(name)
            return function(*inputs, **named)

        setattr(owner, name, call)

    def before_writing(self):
        """Let the opening of a file that will be written be a step."""
        plain = builtins.open

        def call(file, mode="r", *inputs, **named):
            if set(mode) & set("wax+"):
                self("open")
            return plain(file, mode, *inputs, **named)

        builtins.open = io.open = call

    def before_sql(self):
        """Let each statement and commit of MLflow be a step, where it writes."""
        from sqlalchemy import Engine, event

        def statement(connection, cursor, text, *_):
            if not text.lstrip().upper().startswith(("SELECT", "PRAGMA")):
                self("mlflow: " + " ".join(text.split()[:3]))

        event.listen(Engine, "before_cursor_execute", statement)
        event.listen(Engine, "commit", lambda connection: self("mlflow: COMMIT"))

    def before_aliases(self):
        """Let each statement and commit be a step with which we write MLflow's tables ourselves."""
        fuse, plain = self, sqlite3.connect

        class Base(sqlite3.Connection):
            def execute(self, text, *inputs):
                if not text.lstrip().upper().startswith(("SELECT", "PRAGMA")):
                    fuse("alias: " + " ".join(text.split()[:3]))
                return super().execute(text, *inputs)

            def __exit__(self, *why):
                fuse("alias: COMMIT")
                return super().__exit__(*why)

        sqlite3.connect = lambda *inputs, **named: plain(*inputs, factory=Base, **named)


class Fused:
    """DuckDB's connection, with each statement that writes and its commit a step."""

    def __init__(self, connection, fuse):
        self._connection, self._fuse, self._writes = connection, fuse, False

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, query, *inputs):
        text = query if isinstance(query, str) else query.query
        if not text.lstrip().upper().startswith(("SELECT", "WITH")):
            self._writes = True
            self._fuse("store: " + " ".join(text.split()[:3]))
        return self._connection.execute(query, *inputs)

    def commit(self):
        if self._writes:
            self._fuse("store: COMMIT")
        self._writes = False
        return self._connection.commit()


def always(*inputs, **named):
    """A decision that always brings a model."""
    from lm.update.decide import Decision

    model = always.model
    return Decision(always.as_of, "recalibrate", "crash test", model, {"recipe": {"rung": "test"}})


def act(machine, action):
    """What is to be interrupted."""
    import lm.update.run as module
    from lm.monitor.run import stored_verdict

    if action == "update":
        verdict = stored_verdict(machine)
        always.model, always.as_of = machine.registry.load(1).recalibrated(0.2), verdict["as_of"]
        module.decide_on = always
        return machine.update(verdict)
    if action == "rollback":
        return machine.rollback()
    return machine.promote(3, "crash", machine.plan.approvers[0])


def die_before(home, action, at):
    """Run the action, and die before step `at`; 0 lives."""
    with Machine("monica", home) as machine:
        fuse = Fuse(home / "trace", at)
        append = AuditLog.append

        def noted(self, kind, *inputs, **named):
            number = append(self, kind, *inputs, **named)
            fuse.tell(f"noted {kind}")
            return number

        AuditLog.append = noted
        machine.store.database.connection = Fused(machine.store.database.connection, fuse)
        fuse.before_writing()
        fuse.before_sql()
        fuse.before_aliases()
        fuse.before(Journal, "_write")  # A line of the journal
        for name in ("replace", "rename", "fsync", "mkdir"):
            fuse.before(os, name)
        act(machine, action)


def serve():
    """Fork for each line "action at home" that comes, and answer how the child ended."""
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        action, at, home = line.rstrip("\n").split(" ", 2)
        child = os.fork()
        if not child:
            try:
                die_before(Path(home), action, int(at))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(os.waitpid(child, 0)[1], flush=True)


# In the observing process


def interrupted(made, forks, place, action, at):
    """A copy of the machine's folder in which the action died before step `at`, and its steps."""
    home = shutil.copytree(made, place / f"{action}-{at}")
    print(action, at, home, file=forks.stdin, flush=True)
    assert int(forks.stdout.readline()) == (signal.SIGKILL if at else 0)
    return home, (home / "trace").read_text().splitlines()


def versions(machine):
    """Numbers of all versions that the registry shows."""
    return [n for (n,) in machine.registry.tables.rows("SELECT version FROM model_versions")]


def survived(home, action, steps, before):
    """What must hold however far the action came; the version that serves."""
    with Machine("monica", home) as machine:
        serving, updates = machine.status()["champion"], machine.table("updates")
        log = machine.table("audit")
        new = len(updates) > before["updates"]
        assert serving == (NEW[action] if new else OLD) == updates["to_version"].dropna().iloc[-1]
        assert machine.registry.alias("champion") == serving
        assert machine.store.verify() == []
        assert machine.registry.load(max(versions(machine))) is not None  # Whole or not there
        patient = before["patient"] | {"record_id": f"after {action}"}
        answer = machine.receive(patient, now=patient["arrived"])
        model = machine.registry.load(serving)
        assert answer["version"] == serving
        assert answer["risk"] == predict(model, patient)["risk"].item()
        attempts = (log["kind"] == "attempt").sum() - before["attempts"]
        assert attempts == 1 if "noted attempt" in steps else attempts in (0, 1)
        if new or len(versions(machine)) > before["versions"]:
            assert attempts == 1, "something was done and no attempt is recorded"
    return serving


def spread(steps, most):
    """Numbers of the steps to die before: each of store and journal, the others evenly."""
    steps = list(enumerate((step for step in steps if not step.startswith("noted")), 1))
    own = [number for number, step in steps if step.startswith(("store", "_write"))]
    other = [number for number, _ in steps if number not in own]
    every = len(other) // max(1, most - len(own))
    return sorted({*own, *other[every - 1 :: every]})


@pytest.mark.slow
@pytest.mark.parametrize("action", POINTS)
def test_kill_minus_nine_before_any_step(forks, made, tmp_path, action):
    with Machine("monica", made) as machine:
        row = read_rows(machine.study).iloc[-1]
        before = {
            "updates": len(machine.table("updates")),
            "versions": len(versions(machine)),
            "attempts": (machine.table("audit")["kind"] == "attempt").sum(),
            "patient": row[["record_id", "arrived", *machine.study.feature_names]].to_dict(),
        }
    home, steps = interrupted(made, forks, tmp_path, action, 0)
    assert survived(home, action, steps, before) == NEW[action]
    served = set()
    for at in spread(steps, POINTS[action]):
        home, result = interrupted(made, forks, tmp_path, action, at)
        assert len([step for step in result if not step.startswith("noted")]) == at - 1
        served.add(survived(home, action, result, before))
        shutil.rmtree(home)
    assert served == {OLD, NEW[action]}


if __name__ == "__main__":
    serve()

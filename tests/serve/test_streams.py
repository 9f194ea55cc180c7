"""The queue before the machine, on a Redis of its own: every request is answered once in effect."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pandas as pd
import pytest
import redis
from support.waiting import PATIENCE, eventually

from lm.core.errors import LMError
from lm.core.serialization import json_values
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import RejectedRecord
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.serve.app import background
from lm.serve.client import Client
from lm.serve.streams import ask, open_redis, queue_counts, resend_dead_letters, stream_names
from lm.serve.worker import MachineUnavailable, Worker, run_worker

MONICA = load_study("monica")
COLUMNS = ["record_id", "arrived", *MONICA.feature_names]
NAMES = stream_names("monica")
NEW = read_rows(MONICA).query("arrived >= @MONICA.first_model")[COLUMNS].head(60)
ROWS = [json_values(row) for row in NEW.to_dict("records")]
FAST = {"idle": 0.2, "patience": 5.0}


class Server:
    """A private redis-server on a socket in a folder of its own, which records its output."""

    def __init__(self, folder):
        self.folder, self.socket = Path(folder), Path(folder) / "redis.sock"
        self.url = f"unix://{self.socket}"

    def start(self):
        text = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        text += ["--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(text, stdout=subprocess.DEVNULL)
        return eventually(self.opened)

    def opened(self):
        try:
            return open_redis(self.url)
        except LMError:
            return None

    def kill(self, sign=signal.SIGKILL):
        self.process.send_signal(sign)
        self.process.wait(PATIENCE)

    def forget(self):
        shutil.rmtree(self.folder / "appendonlydir")


@pytest.fixture(scope="module")
def server():
    if shutil.which("redis-server") is None and not os.environ.get("CI"):
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with tempfile.TemporaryDirectory(prefix="lm-") as folder:  # Names of sockets are limited
        server = Server(folder)
        server.start()
        yield server
        server.kill()


@pytest.fixture
def db(server):
    """A connection to an empty Redis that answers."""
    connection = open_redis(server.url)
    connection.flushall()
    return connection


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A machine of monica with a first model, closed."""
    folder, rows = tmp_path_factory.mktemp("made") / "home", read_rows(MONICA)
    model = fit(MONICA, rows[rows["arrived"] < MONICA.first_model])
    first = {"as_of": "1987-01-01", "action": "first", "reason": "first", "from_version": None}
    with Machine(MONICA, folder) as machine:
        version = machine.registry.register(model, {}, {}, {}, "the first model")
        machine.adopt(first | {"to_version": version})
    return folder


@pytest.fixture
def machine(made, home):
    shutil.copytree(made, home)
    with Machine(MONICA, home) as machine:
        yield machine


class Working:
    """A worker in a thread."""

    def __init__(self, machine, url, **how):
        self.worker = Worker(machine, url, **FAST | how)
        self.thread = threading.Thread(target=self.run)
        self.error = None

    def run(self):
        try:
            self.worker.run()
        except LMError as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self.worker

    def __exit__(self, *_):
        self.worker.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


def send(db, *rows):
    return [db.xadd(NAMES.requests, {"record": json.dumps(row)}) for row in rows]


def answers(db):
    """Every answer, in order: text fields."""
    return [{k.decode(): v.decode() for k, v in f.items()} for _, f in db.xrange(NAMES.answers)]


def settled(db, n):
    """Wait until n answers are there and nothing is left in the queue."""
    eventually(lambda: db.xlen(NAMES.answers) >= n and not db.xlen(NAMES.requests))
    return db.xlen(NAMES.answers) == n and db.xlen(NAMES.requests) == 0


def stored(machine):
    counts = machine.status()["counts"]
    return counts["records"], counts["predictions"], counts["rejects"]


def test_a_request_gets_the_prediction_that_the_machine_stores(db, server, machine):
    with Working(machine, server.url):
        response = ask(server.url, "monica", NEW.iloc[0].to_dict())
        again = ask(server.url, "monica", ROWS[0])
        with pytest.raises(RejectedRecord) as error:
            ask(server.url, "monica", ROWS[1] | {"age": 340})
    remaining = machine.explain(ROWS[0]["record_id"])
    assert (
        {k: response[k] for k in remaining} == remaining
        and 0 < response["risk"] < 1
        and response["version"] == 1
    )
    assert again["repeated"] and again["risk"] == response["risk"]
    assert (error.value.field, error.value.value, error.value.rule[:5]) == ("age", 340, "18 to")
    assert stored(machine) == (1, 1, 1)
    assert queue_counts(db, "monica") == {"waiting": 0, "taken": 0, "answers": 3, "dead": 0}
    assert machine.table("records")["source"].iloc[-1] == "lm:monica:requests"


def test_the_machine_may_be_a_service(db, server, machine):
    with background(machine) as url, Client(url) as client, Working(client, server.url):
        assert 0 < ask(server.url, "monica", ROWS[0])["risk"] < 1
        with pytest.raises(RejectedRecord, match="age"):
            ask(server.url, "monica", ROWS[1] | {"age": "old"})
    assert stored(machine) == (1, 1, 1)


VICTIM = """
import os, signal, sys
from pathlib import Path
from lm.serve.worker import RequestQueue, Worker
from lm.machine.machine import Machine
RequestQueue.finish = lambda self, *fields: os.kill(os.getpid(), signal.SIGKILL)
Worker(Machine("monica", Path(sys.argv[1])), sys.argv[2], name="victim").run()
"""


@pytest.mark.slow
def test_killed_between_processing_and_acknowledgement_it_is_answered_once(db, server, made, home):
    shutil.copytree(made, home)
    send(db, *ROWS[:3])
    died = subprocess.run([sys.executable, "-c", VICTIM, str(home), server.url], check=False)
    assert died.returncode == -signal.SIGKILL
    assert answers(db) == [] and queue_counts(db, "monica")["taken"] == 1
    with Machine(MONICA, home) as machine:
        assert stored(machine) == (1, 1, 0)  # It had been processed
        risk = machine.explain(ROWS[0]["record_id"])["risk"]
        with Working(machine, server.url):
            assert settled(db, 3)
        assert stored(machine) == (3, 3, 0)
    results = {a["record_id"]: json.loads(a["answer"]) for a in answers(db)}
    assert sorted(results) == sorted(row["record_id"] for row in ROWS[:3])
    assert (
        results[ROWS[0]["record_id"]]["repeated"] and results[ROWS[0]["record_id"]]["risk"] == risk
    )


class Meeting:
    """The machine, at which the first request of each consumer waits for the other's."""

    def __init__(self, machine, barrier):
        self.machine, self.barrier, self.met = machine, barrier, False
        self.status = machine.status

    def receive(self, row, now=None, source=""):
        if not self.met:
            self.barrier.wait(PATIENCE)
        self.met = True
        return self.machine.receive(row, now, source)


def test_two_consumers_share_the_requests(db, server, machine):
    sent, barrier = send(db, *ROWS[:40]), threading.Barrier(2)
    first, second = (Working(Meeting(machine, barrier), server.url, idle=1) for _ in range(2))
    with first as one, second as two:
        assert settled(db, 40)
    assert one.counts["answered"] + two.counts["answered"] == 40
    assert one.counts["answered"] and two.counts["answered"] and one.name != two.name
    assert sorted(a["request"].encode() for a in answers(db)) == sorted(sent)
    assert stored(machine) == (40, 40, 0)
    assert db.xinfo_consumers(NAMES.requests, "lm") == []  # Both have taken leave


def test_a_slow_consumer_and_the_one_that_takes_over_write_one_answer(db, server, machine):
    send(db, ROWS[0])
    slow, other = Worker(machine, server.url), Worker(machine, server.url, idle=0)
    message = slow.queue.take(0.1)
    answer = slow.answer(message)
    assert other.step(0.1) and not slow.finish(message, answer)
    assert len(answers(db)) == 1 and stored(machine) == (1, 1, 0)
    assert (other.counts["answered"], slow.counts["late"]) == (1, 1)


class Fragile:
    """The machine, with a fault that the patient `poison` brings out."""

    def __init__(self, machine):
        self.machine, self.status, self.tried = machine, machine.status, 0

    def receive(self, row, now=None, source=""):
        if isinstance(row, dict) and row["record_id"] == "poison" and "undeliverable" not in row:
            self.tried += 1
            raise ZeroDivisionError("patient poison divides by zero")
        return self.machine.receive(row, now, source)


def test_poison_is_abandoned_stored_and_can_be_sent_again(db, server, machine, caplog):
    poison = ROWS[0] | {"record_id": "poison"}
    (number, *_) = send(db, poison, *ROWS[1:6])
    fragile = Fragile(machine)
    with Working(fragile, server.url, deliveries=3) as worker:
        assert settled(db, 6)
    assert fragile.tried == 3 and worker.counts["answered"] == 5 and worker.counts["dead"] == 1
    assert "poison" not in caplog.text and "ZeroDivisionError" in caplog.text
    (letter,) = (fields for _, fields in db.xrange(NAMES.dead))
    assert json.loads(letter[b"record"]) == poison and letter[b"request"] == number
    assert letter[b"reason"] == b"given up after 3 deliveries: ZeroDivisionError"
    (result,) = (a for a in answers(db) if "error" in a)
    assert result["record_id"] == "poison" and "given up after 3" in result["error"]
    stored = machine.table("rejects").iloc[0]
    assert stored["record_id"] == "poison" and "ZeroDivisionError" in stored["received"]
    assert resend_dead_letters(server.url, "monica") == 1  # The fault is mended
    with Working(machine, server.url):
        assert settled(db, 7)
    assert machine.has("poison") and queue_counts(db, "monica")["dead"] == 0


def test_a_request_that_kills_its_consumers_does_not_take_its_neighbours_along(db, server, machine):
    send(db, *ROWS[:3])
    for _ in range(3):  # Each takes the first request and dies
        dead = Worker(machine, server.url, idle=0)
        assert json.loads(dead.queue.take(0.1).fields[b"record"]) == ROWS[0]
    with Working(machine, server.url, deliveries=3) as worker:
        assert settled(db, 3)
    assert (worker.counts["dead"], worker.counts["answered"]) == (1, 2)
    (result,) = (a for a in answers(db) if "error" in a)
    assert (
        result["record_id"] == ROWS[0]["record_id"] and "each time the consumer" in result["error"]
    )
    assert stored(machine) == (2, 2, 1)


def test_redis_is_killed_while_listening(db, server, machine):
    with Working(machine, server.url):
        ask(server.url, "monica", ROWS[0])
        server.kill()
        with pytest.raises(LMError, match=r"does not answer at unix://.*start redis-server"):
            ask(server.url, "monica", ROWS[1])
        again = server.start()
        sent = send(again, *ROWS[1:20])
        assert settled(again, 20)
    assert sorted(a["request"].encode() for a in answers(again)[1:]) == sorted(sent)
    assert stored(machine) == (20, 20, 0)


@pytest.mark.slow
def test_redis_is_killed_between_request_and_answer(db, server, machine):
    send(db, *ROWS[:2])
    first = Worker(machine, server.url, name="me")
    message = first.queue.take(0.1)
    answer = first.answer(message)
    server.kill()
    with pytest.raises(redis.ConnectionError):
        first.finish(message, answer)
    again = server.start()
    with Working(machine, server.url, name="me", idle=60):  # Its own, so at once
        assert settled(again, 2)
    assert stored(machine) == (2, 2, 0)


def test_a_redis_that_has_forgotten_everything_is_joined_anew(db, server, machine):
    with Working(machine, server.url):
        ask(server.url, "monica", ROWS[0])
        server.kill()
        server.forget()
        server.start()
        assert ask(server.url, "monica", ROWS[1])["risk"] > 0
    assert stored(machine) == (2, 2, 0)


class Away:
    """A machine that does not answer at first."""

    def __init__(self, machine, times):
        self.machine, self.times = machine, times

    def status(self):
        return self.machine.status() if self.times <= 0 else self.fail()

    def fail(self):
        raise LMError("the service does not answer")

    def receive(self, row, now=None, source=""):
        self.times -= 1
        return self.fail() if self.times > 0 else self.machine.receive(row, now, source)


@pytest.mark.slow
def test_a_machine_that_is_away_is_waited_for_and_costs_no_delivery(db, server, machine):
    send(db, *ROWS[:2])
    with Working(Away(machine, 3), server.url, deliveries=1, names=NAMES, idle=30) as worker:
        assert settled(db, 2)
    assert worker.counts["answered"] == 2
    send(db, ROWS[2])
    gone = Worker(Away(machine, 10**6), server.url, names=NAMES, patience=0.1)
    with pytest.raises(MachineUnavailable, match="requests stay in the queue"):
        gone.run()
    assert queue_counts(db, "monica")["taken"] == 1 and stored(machine) == (2, 2, 0)


BODIES = [b"", b"{", b"[1]", b"{}", b"null", b"7", b"NaN", b'"text"', b"\xff\xfe", b"[" * 50_000]
BODIES += [b'{"record_id": []}', b'{"record_id": "a", "arrived": 1e999}', b" " * 1_100_000]
BODIES += [b'{"record_id": "\\ud800"}', b'{"record_id": "a", "undeliverable": 1}']


@pytest.mark.parametrize("served", [False, True], ids=["machine", "service"])
def test_malformed_requests_get_a_sentence_and_store_nothing_but_rejects(
    db, server, machine, served
):
    for body in BODIES:
        db.xadd(NAMES.requests, {"record": body})
    db.xadd(NAMES.requests, {"other": "field", "record_id": "m1"})
    n = len(BODIES) + 1
    with background(machine) as url, Client(url) as client:
        working = Working(client if served else machine, server.url, deliveries=2)
        with working as worker:
            assert settled(db, n)
    assert all("breaks the rule" in a["error"] or "given up" in a["error"] for a in answers(db))
    assert worker.counts["rejected"] + worker.counts["dead"] == n
    assert stored(machine) == (0, 0, n)


def test_answers_and_dead_letters_are_bounded(db, server, machine):
    class Quick:
        def status(self):
            return {"study": "monica"}

        def receive(self, row, now=None, source=""):
            return {"record_id": "q"}

    send(db, *[{"n": n} for n in range(300)])
    with Working(Quick(), server.url, keep=100) as worker:
        eventually(lambda: worker.counts["answered"] >= 300)
    assert worker.counts["answered"] == 300 and 100 <= db.xlen(NAMES.answers) <= 200
    assert db.xlen(NAMES.requests) == 0


def test_a_full_queue_and_silence_are_stated(db, server):
    send(db, *ROWS[:3])
    with pytest.raises(LMError, match="holds 3 requests"):
        ask(server.url, "monica", ROWS[3], limit=3)
    with pytest.raises(LMError, match=r"no answer after 0\.1 s: it stays in the queue"):
        ask(server.url, "monica", ROWS[3], timeout=0.1)
    assert queue_counts(server.url, "monica")["waiting"] == 4


def test_many_who_ask_at_once_each_get_their_own(db, server, machine):
    results = {}

    def one(row):
        results[row["record_id"]] = ask(server.url, "monica", row)

    with Working(machine, server.url), Working(machine, server.url):
        threads = [threading.Thread(target=one, args=(row,)) for row in ROWS[:16]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert {k: v["record_id"] for k, v in results.items()} == {k: k for k in results} and len(
        results
    ) == 16


def test_no_redis_is_one_sentence_without_the_password(machine):
    with pytest.raises(LMError) as error:
        run_worker(machine, "redis://lm:secret@127.0.0.1:1/0")
    assert "secret" not in str(error.value) and "start redis-server" in str(error.value)
    with pytest.raises(LMError, match="must be redis://"):
        run_worker(machine, "127.0.0.1:6379")


def test_a_password_that_is_wrong_or_a_key_of_another_kind_is_one_sentence(db, server, machine):
    db.config_set("requirepass", "right")
    try:
        with pytest.raises(LMError, match="Redis"):
            run_worker(machine, server.url)
    finally:
        db.config_set("requirepass", "")
    db.set(NAMES.requests, "text")
    with pytest.raises(LMError, match=r"WRONGTYPE|wrong kind"):
        run_worker(machine, server.url)


def test_the_times_of_pandas_arrive(db, server, machine):
    row = NEW.iloc[0].to_dict() | {"arrived": pd.Timestamp("1990-05-31 12:30")}
    with Working(machine, server.url):
        assert ask(server.url, "monica", row)["arrived"] == "1990-05-31T12:30:00"

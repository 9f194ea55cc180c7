"""The benchmark of reliability in small: what must hold, and that its judge can say no."""

import json
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas as pd
import peers
import pytest
from support.here import run_here
from support.long import LONG

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import typed_features
from lm.data.journal import StoreFailed
from lm.machine.machine import Machine

pytestmark = pytest.mark.slow  # The fixtures of the module are

NOTEBOOK = peers.SCRIPTS.parent / "reliability.ipynb"
STUDY = load_study("monica")
CLEAR = {"503 LM-306"}  # How a store that cannot write may say so
SMALL = {
    **{"kills": 2, "actions": "approve rollout", "longest": 0.5},
    **{"minutes": 0.05, "clients": 4, "readers": 2, "monitor_every": 3.0, "jobs": ""},
    **{"rates": "0 40", "disks": "limit"},
    **{"bodies": LONG, "siege": 1.0 if LONG else 0.0, "sockets": 200},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of the tables and record of a short run."""
    folder = tmp_path_factory.mktemp("reliability")
    return folder, run_here(NOTEBOOK, SMALL | {"output": str(folder)})


def test_nothing_acknowledged_is_lost_by_kills_and_nothing_doubled(small):
    folder, result = small
    kills = pd.read_csv(folder / "kills.csv")
    assert kills["action"].tolist() == SMALL["actions"].split() and result["kills"] == 2
    assert set(result["counts"].values()) == {0} and set(result["at_end"].values()) == {0}
    assert kills["acknowledged"].sum() > 0 and (kills["start_s"] > 0).all()
    assert result["inconsistent"] == 0


def test_everybody_at_once_is_answered(small):
    folder, result = small
    crowd = pd.read_csv(folder / "crowd.csv").set_index("path")
    assert crowd["sent"].unique().tolist() == ["as answered", "paced"]
    asked = {
        "/v1/records",
        "/v1/outcomes",
        "/v1/decisions",
        "/v1/monitoring/runs",
        "/v1/patients",
        "/v1/models",
    }
    # An update follows a monitoring run; so short a run has no time for it
    assert asked <= set(crowd.index) and result["bad_answers"] == 0
    assert crowd["refused"].sum() == 0, result["crowd"]
    counted = ("lost", "doubled", "rejected", "other", "half", "stray", "mixed", "faults", "locks")
    for row in result["crowd"]:
        assert {name: row[name] for name in counted} == dict.fromkeys(counted, 0)
    assert result["p99"] >= crowd.loc["/v1/records", "p50"].max() > 0


def test_nothing_is_lost_by_damage_and_a_backup_is_whole(small):
    folder, result = small
    damage, backups = (pd.read_csv(folder / f"{name}.csv") for name in ("damage", "backups"))
    assert result["lost_by_damage"] == damage["lost"].sum() == 0
    gone = damage[damage["damage"] == "deleted"].set_index("part")
    assert (gone["start"].drop("snapshot") == "refused").all()
    assert "is missing" in gone.loc["snapshot", "verify"]
    results = damage[damage["part"].isin(["journal", "wal", "key", "tokens"])]
    assert results["start"].isin(["refused", "there was none"]).all()  # Whatever the damage
    assert result["backups_whole"] and backups["rows"].tolist()[0] >= 300


@pytest.mark.parametrize("disk", SMALL["disks"].split())
def test_a_disk_that_refuses_is_stated_clearly_and_gets_over(small, disk):
    _, result = small
    if disk != "limit" and result["cannot"]:
        pytest.skip(f"this computer allows no mount namespace: {result['cannot']}")
    row = next(row for row in result["disks"] if row["disk"] == disk)
    assert row["refused"] >= 20 and set(row["as"].split(", ")) <= CLEAR and row["one_sentence"]
    assert row["unread"] == 0 and row["consistent"] and row["dead"] == ""
    assert row["taken_again"] == row["asked_again"] >= 20 and row["afterwards"] == 200
    counted = ("lost", "doubled", "rejected", "other", "half", "stray", "mixed", "faults")
    assert {name: row[name] for name in counted} == dict.fromkeys(counted, 0)


@pytest.mark.skipif(not LONG, reason="half a minute")
def test_bodies_take_no_room_and_connections_delay_no_client(small):
    folder, result = small
    swallowed, held = (pd.read_csv(folder / f"{name}.csv") for name in ("bodies", "connections"))
    assert len(swallowed) == len(result["bodies"]) > 15
    assert swallowed["status"].between(400, 499).all() and (swallowed["growth_mb"] <= 64).all()
    assert len(held) == len(result["connections"]) > 6 and held["failed"].eq(0).all()
    assert held["health_ms"].notna().all() and (held["records"] > 0).all()


def test_the_text_tells_all_three(small):
    text = (small[0] / "reliability.txt").read_text(encoding="utf-8")
    results = ("kill -9 on one store", "at the end", "Everybody at once, 0.05 minutes")
    for message in (*results, "The disk refuses"):
        assert message in text


def test_what_came_out_is_what_the_notebook_says():
    folder = peers.ROOT / "reports" / "reliability"
    text = json.loads(NOTEBOOK.read_text())["cells"][-1]["source"]
    text = " ".join("".join(text).split())
    names = ("kills", "crowd", "damage", "bodies", "connections", "disks")
    kills, crowd, damage, bodies, lines, disks = (
        pd.read_csv(folder / f"{name}.csv") for name in names
    )
    faults = ["lost", "doubled", "rejected", "other", "half", "stray", "mixed", "faults"]
    assert kills[faults].eq(0).all(axis=None) and kills["consistent"].all()
    jobs = crowd["path"].str.startswith("job ")
    assert crowd.loc[~jobs, ["refused", "5xx or none"]].eq(0).all(axis=None)
    assert (crowd.loc[jobs, "requests"].sum(), crowd.loc[jobs, "refused"].sum()) == (4, 1)
    crowd = crowd.set_index(["path", "sent"]).sort_index()
    answered = [
        f"{one.requests:.0f} patients were answered within {one.p99:.0f} ms (99 %)"
        for one in crowd.loc["/v1/records"].itertuples()
    ]
    routes = ("outcomes", "decisions", "status")
    outcomes, decisions, status = (crowd.loc[f"/v1/{route}", "paced"] for route in routes)
    free = crowd.loc["/v1/outcomes", "as answered"]
    sums = kills[["acknowledged", "unanswered", "were_stored"]].sum()
    assert damage["lost"].eq(0).all() and disks[["lost", "doubled"]].fillna(0).eq(0).all(axis=None)
    opens = damage[damage["start"] == "opens"]
    hostile = lines[lines["attack"] != "none"]
    assert lines["failed"].eq(0).all() and len(answered) == 2
    assert max(outcomes.p50, decisions.p50, status.p50) <= 20 < 100 < outcomes.p99
    for message in (
        f"{len(kills)} kills",
        f"Of {sums['acknowledged']} acknowledged requests",
        f"of {sums['unanswered']} requests without an answer {sums['were_stored']} had been stored",
        f"{kills['start_s'].median():.1f} s (median; {kills['start_s'].max():.1f} at most)",
        f"holds in {100 * (kills['start_s'] < 5).mean():.1f} % of the starts",
        *answered,
        f"outcomes after {outcomes.p50:.0f} ms (median; 99 % within {outcomes.p99:.0f})",
        f"decisions after {decisions.p50:.0f} ms ({decisions.p99:.0f})",
        f"the status after {status.p50:.0f} ms",
        f"outcomes after {free.p50:.0f} ms (median; 99 % within {free.p99:.0f}): then",
        f"{len(damage)} damages",
        f"{(damage['start'] == 'refused').sum()} starts are refused",
        f"{len(opens)} open, {opens['verify'].fillna('').ne('').sum()} of them with a finding",
        f"by more than {bodies['growth_mb'].max():.0f} MB",
        f"p99 was {hostile['p99'].min():.0f} to {hostile['p99'].max():.0f} ms",
    ):
        assert message in text, message


# The judge


def cells(*wanted):
    """The notebook's cells in which these functions are defined, run on their own."""
    code = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"]]
    names = {"np": np, "pd": pd, "Counter": Counter, "STUDY": STUDY}
    for cell in code:
        if any(f"\ndef {name}(" in f"\n{cell}" for name in wanted):
            exec(cell, names)
    return names


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A home with three patients, an outcome and a decision, and what the sender wrote down."""
    home = tmp_path_factory.mktemp("lived") / "home"
    rows = read_rows(STUDY)
    asked = typed_features(STUDY, rows[rows[STUDY.feature_names].notna().all(axis=1)].tail(3))
    judge, lines = cells("key_of", "rows_of"), []
    with Machine(STUDY, home) as machine:
        past = rows[rows["arrived"] <= STUDY.first_model]
        machine.receive_many(past, source="history", on_arrival=True)
        machine.add_outcomes(rows[rows["known_at"] <= STUDY.first_model])
        machine.update(machine.monitor(STUDY.first_model, fast=True))
        risks = machine.registry.load(1).predict_proba(asked)[:, 1]
        for i, row in enumerate(asked.to_dict("records")):
            row = {"record_id": f"mine-{i}", "arrived": "1993-01-01T00:00:00"} | row
            response = machine.receive(row)
            line = {"path": "/v1/records", "body": {"row": row}, "status": 200}
            lines.append(line | {"response": response})
        outcome_row = {"record_id": "mine-0", "y": 1, "known_at": "2026-01-02T00:00:00"}
        machine.add_outcome(**outcome_row)
        act = {"record_id": "mine-0", "clinician": "ann", "action": "agree", "reason": "1"}
        machine.add_decision(**act, now="2026-01-03T00:00:00")
    stored = {"status": 200, "response": None}
    lines += [
        {"path": "/v1/outcomes", "body": outcome_row} | stored,
        {"path": "/v1/decisions", "body": act | {"now": "2026-01-03"}} | stored,
    ]
    where = {tuple(row): i for i, row in enumerate(asked.itertuples(index=False))}
    judge |= {"ROW_OF": where, "TRUTH": {(1, i): risk for i, risk in enumerate(risks)}}
    return SimpleNamespace(home=home, lines=lines, judge=judge)


def seen(lived, tamper="", lines=None):
    """What the judge finds, other than nothing, after an SQL statement on a copy of the tables."""
    judge, names = lived.judge, lived.judge["NAMES"]
    with duckdb.connect(str(lived.home / "monica" / "store.duckdb"), read_only=True) as base:
        stored = {name: base.execute(f"SELECT * FROM {name} ORDER BY rowid").df() for name in names}
    with duckdb.connect() as base:
        for name in names:
            base.register("given", stored[name])
            base.execute(f"CREATE TABLE {name} AS SELECT * FROM given")
        for statement in filter(None, tamper.split(";")):
            base.execute(statement)
        stored = {name: base.execute(f"SELECT * FROM {name}").df() for name in names}
    result = judge["compared"](stored, lived.lines if lines is None else lines, "mine-")
    return {name: count for name, count in result.items() if count}


def test_the_judge_finds_nothing_where_nothing_is_wrong(lived):
    assert seen(lived) == {}


ONE = "WHERE record_id = 'mine-1'"
TAMPERED = {
    ";".join(f"DELETE FROM {t} {ONE}" for t in ("records", "predictions", "explanations")): {
        "lost": 1
    },
    f"DELETE FROM predictions {ONE}": {"half": 1},
    f"DELETE FROM explanations {ONE}": {"half": 1},
    "DELETE FROM outcomes WHERE record_id = 'mine-0'": {"lost": 1},
    "DELETE FROM decisions": {"lost": 1},
    "INSERT INTO decisions SELECT * FROM decisions": {"doubled": 1},
    "INSERT INTO outcomes SELECT * FROM outcomes WHERE record_id = 'mine-0'": {"doubled": 1},
    f"UPDATE predictions SET risk = risk + 1e-6 {ONE}": {"other": 1},
    "UPDATE decisions SET action = 'override'": {"lost": 1, "stray": 1},
    "INSERT INTO outcomes SELECT * REPLACE ('mine-2' AS record_id) FROM outcomes "
    "WHERE record_id = 'mine-0'": {"stray": 1},
}


@pytest.mark.parametrize("tamper", TAMPERED)
def test_the_judge_finds_each_kind_of_damage(lived, tamper):
    assert seen(lived, tamper) == TAMPERED[tamper]


def test_the_judge_finds_an_answer_of_another_version(lived):
    first = lived.lines[0] | {"response": lived.lines[0]["response"] | {"risk": 0.5}}
    assert seen(lived, lines=[first, *lived.lines[1:]]) == {"other": 1, "mixed": 1}


def test_the_judge_finds_what_is_there_though_it_was_refused(lived):
    refused = lived.lines[1] | {"status": 503, "response": {"error": "no room"}}
    assert seen(lived, lines=[lived.lines[0], refused, *lived.lines[2:]]) == {"rejected": 1}


def test_what_was_not_answered_may_be_there_or_not_but_whole(lived):
    lines = [lived.lines[0], lived.lines[1] | {"status": 0, "response": None}, *lived.lines[2:]]
    whole, gone = f"DELETE FROM predictions {ONE}", next(iter(TAMPERED))
    assert seen(lived, lines=lines) == {} == seen(lived, gone, lines)
    assert seen(lived, whole, lines) == {"half": 1}


BEFORE = {"champion": 2, "alias": 2, "waiting": 1, "trial": {"kind": "champion"}}
BEFORE |= dict.fromkeys(("updates", "rollouts", "attempt", "approval"), 3)
SWAPPED = BEFORE | {"champion": 1, "alias": 1, "updates": 4, "attempt": 4, "approval": 4}
WRONG = {
    "no record of why version 1 serves": ("promote", SWAPPED | {"attempt": 3}, 0),
    "no update says so": ("rollback", SWAPPED | {"updates": 3}, 0),
    "it was answered and did not happen": ("promote", BEFORE, 200),
    "the registry says something else": ("promote", SWAPPED | {"alias": 2}, 0),
    "approved twice": ("approve", SWAPPED | {"updates": 5}, 200),
    "neither old nor new": ("promote", SWAPPED | {"champion": 3, "alias": 3}, 0),
    "rejected without a row": ("reject", BEFORE | {"waiting": 0, "approval": 4}, 0),
    "a rollout without an order": ("rollout", BEFORE | {"trial": {"kind": "ab"}}, 0),
}


@pytest.mark.parametrize("why", WRONG)
def test_the_judge_of_swaps_finds(why):
    action, after, code = WRONG[why]
    consistent = cells("state_of", "took_place")["consistent"]
    assert not consistent(action, BEFORE, after, 1, code)["consistent"]


def test_the_judge_of_swaps_accepts_old_and_new():
    consistent = cells("state_of", "took_place")["consistent"]
    for action in ("promote", "rollback", "approve"):
        after = SWAPPED | {"waiting": 0}
        assert consistent(action, BEFORE, after, 1, 200)["consistent"]
        assert consistent(action, BEFORE, BEFORE | {"attempt": 4}, 1, 0)["consistent"]
    trial = BEFORE | {"trial": {"kind": "ab"}, "rollouts": 4}
    assert consistent("rollout", BEFORE, trial, 1, 200) == {
        **{"new": True, "consistent": True, "action_status": 200},
    }


def test_the_judge_of_refusals_wants_one_sentence():
    refusals = cells("refusals")["refusals"]

    def of(status, **response):
        return refusals([{"status": 200, "response": {}}, {"status": status, "response": response}])

    assert of(503, code="LM-306", error="no room") == {
        **{"refused": 1, "as": "503 LM-306", "one_sentence": True},
    }
    assert not of(500, error="Traceback (most recent call last)")["one_sentence"]
    assert not of(422, code="LM-100", error="one\ntwo")["one_sentence"]
    assert of(0)["as"] == "0 None" and not of(0)["one_sentence"]


# What the store and the machine owe, in process


@pytest.fixture
def served(lived, home):
    """The machine of `lived`, in a copy of its home, and the body of a new patient."""
    shutil.copytree(lived.home, home)
    with Machine(STUDY, home) as machine:
        yield machine, lambda name: lived.lines[0]["body"]["row"] | {"record_id": name}


@contextmanager
def no_file_beyond(size):
    """Every write of this process beyond so many bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_without_room_does_not_end_the_service(served):
    machine, row = served
    machine.store.database.connection.execute("SET checkpoint_threshold = '50KB'")
    failed = 0
    with no_file_beyond(2**20):
        results = []
        for i in range(40):
            results.append(attempt(machine, row(f"full-{i}")))
            try:
                with machine.store.database.lock:
                    machine.store.engine.checkpoint.move()  # As the mover does, once a second
            except StoreFailed:
                failed += 1
    assert failed, "no checkpoint has failed"
    assert machine.explain("mine-0")["y"] == 1
    assert attempt(machine, row("after")) and machine.verify() == []
    stored = set(machine.table("records")["record_id"])
    assert [i for i, fine in enumerate(results) if fine != (f"full-{i}" in stored)] == []


def test_what_was_acknowledged_outlives_moves_that_the_disk_refused(served):
    """DuckDB answers `max(seq)` from statistics that keep rows which were rolled back."""
    machine, row = served
    machine.receive(row("last"))
    machine.add_outcome("last", 1, machine.now())
    with no_file_beyond(0):
        for _ in range(3):
            with pytest.raises(StoreFailed), machine.store.database.lock:
                machine.store.engine.checkpoint.move()
            assert machine.explain("last")["y"] == 1
            assert len(machine.table("outcomes").query("record_id == 'last'")) == 1
    assert len(machine.table("outcomes").query("record_id == 'last'")) == 1
    assert machine.verify() == []


def attempt(machine, row):
    """Whether a patient was taken; a refusal is one sentence."""
    try:
        return machine.receive(row)["record_id"] == row["record_id"]
    except LMError as error:
        assert "\n" not in str(error)
        return False


def test_a_registry_that_cannot_be_written_does_not_leave_half_a_promotion(served, monkeypatch):
    machine, row = served
    by, model = machine.plan.approvers[0], machine.registry.load(1).recalibrated(0.5)
    machine.registry.register(model, {}, {}, {}, "shifted")
    trial = {"kind": "ab", "challenger": 2, "share": 0.5}
    machine.set_rollout(trial, "trial", by)

    def refuse(*_):
        raise LMError("registry: no room")

    monkeypatch.setattr(type(machine.registry), "set_alias", refuse)
    try:
        done = machine.promote(2, "tested", by)["to_version"] == 2
    except LMError:
        done = False
    assert machine.status()["champion"] == (2 if done else 1)
    kind = machine.rollout()["policy"]["kind"]
    assert kind == ("champion" if done else "ab")  # No rollout of a model against itself
    assert machine.receive(row("after"))["version"] in ((2,) if done else (1, 2))


def test_a_swap_and_a_restart_after_half_of_it_do_not_wait_for_mlflow(served):
    machine, _ = served
    model = machine.registry.load(1).recalibrated(0.5)
    second = machine.registry.register(model, {}, {}, {}, "shifted")
    machine.promote(second, "tested", machine.plan.approvers[0])
    machine.registry.set_alias("champion", 1)  # As after a kill between the two
    home = machine.store.folder.parent
    machine.close()
    code = (
        "import sys; from pathlib import Path; from lm.machine.machine import Machine\n"
        "with Machine('monica', Path(sys.argv[1])) as machine:\n"
        "    print(machine.registry.alias('champion'), machine.rollback()['to_version'])\n"
        "    print(machine.registry.alias('champion'), 'mlflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "1", "1", "False"], done.stderr


# The clients


class Fickle(BaseHTTPRequestHandler):
    """Answers, refuses every fifth, and hangs up on every seventh request after it was read."""

    protocol_version, seen, lock = "HTTP/1.1", [], threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append((self.path, body, self.headers["Authorization"]))
            number = len(self.seen)
        if number % 7 == 0:
            self.close_connection = True
            return
        result = b'{"error": "no"}' if number % 5 == 0 else b'{"risk": 0.5}'
        self.send_response(422 if number % 5 == 0 else 200)
        self.send_header("Content-Length", str(len(result)))
        self.end_headers()
        self.wfile.write(result)

    def log_message(self, *_):
        pass


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """The clients' script as a module, and a plan for them with a server that is fickle."""
    monkeypatch.syspath_prepend(str(peers.SCRIPTS))
    spec = spec_from_file_location("mix", peers.SCRIPTS / "mix.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    Fickle.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fickle)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "bodies").write_text('{"age": 60}\n{"age": 70}')
    who = [{"machine": f"m{i}", "clinician": f"c{i}", "name": f"ann{i}"} for i in range(2)]
    plan = {"port": server.server_port, "name": "mix", "log": str(tmp_path / "log"), "seed": 0}
    plan |= {"bodies": str(tmp_path / "bodies"), "clients": who, "readers": [], "every": 1}
    yield module, plan
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("seconds", [1.5, None])
def test_clients_write_down_what_they_were_answered(mix, seconds):
    import asyncio

    module, plan = mix
    asyncio.run(module.run(plan | {"seconds": seconds}))
    with open(plan["log"]) as file:
        lines = [json.loads(line) for line in file]
    sent = Counter(json.dumps([path, body]) for path, body, _ in Fickle.seen)
    written = Counter(json.dumps([line["path"], line["body"]]) for line in lines)
    assert sent == written and max(written.values()) == 1
    lost = [line for line in lines if line["status"] == 0]
    assert len(lost) == len(Fickle.seen) // 7 >= 1
    assert seconds or len(lost) <= 2  # Each leaves with the first connection that breaks
    tokens = {path: {who[7] for p, _, who in Fickle.seen if p == path} for path, *_ in Fickle.seen}
    assert tokens["/v1/records"] == {"m"} and tokens.get("/v1/decisions", {"c"}) == {"c"}
    records = [line for line in lines if line["path"] == "/v1/records"]
    results = [line["response"] for line in records if line["status"] == 200]
    assert results and all(one == {"risk": 0.5} for one in results)

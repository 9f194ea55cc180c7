"""The service and its client: the same machine, the same errors, and no one else gets in."""

import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import httpx
import numpy as np
import pandas as pd
import pytest
from support.waiting import PATIENCE, UNPROXIED, eventually

from lm.core.errors import Busy, LMError, NotFound
from lm.core.limits import bounds
from lm.core.protocol import LearningMachine, unfulfilled
from lm.core.reader import PARQUET
from lm.core.serialization import from_arrow, json_values
from lm.core.settings import find_root, settings
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import RejectedRecord
from lm.data.connection import StoreLocked
from lm.data.records import UnknownRecord
from lm.data.source import outcomes
from lm.jobs.jobs import Jobs
from lm.machine.machine import Machine
from lm.model.predict import predict
from lm.serve.app import background, create_app
from lm.serve.auth import Tokens
from lm.serve.client import Client, connect, find_service
from lm.serve.routes import ANYBODY, OPERATIONS, PERMISSIONS, ROLES, unlisted, unused

MONICA = load_study("monica")
WHOLE = read_rows(MONICA)
ROWS = WHOLE[["record_id", "arrived", *MONICA.feature_names]].head(40)


@pytest.fixture
def both(home):
    """The machine and a client of it."""
    with Machine("monica", home) as machine, background(machine) as url, Client(url) as client:
        yield machine, client


def bearer(client):
    """The headers of the client."""
    return {"authorization": client._connection.http.headers["authorization"]}


IN_PROCESS = {
    *("study", "plan", "standing"),  # Settings, which other processes read from tables
    *("check", "accept", "settle", "store_rejection", "batches"),  # The service's own steps
    *("prepare", "carry_out", "append_update", "requested", "moment"),  # Of an update
    *("warm", "problems"),  # For the process that serves
}  # Of the machine's methods; all others have a route


def test_the_client_has_every_method_of_the_machine():
    assert unfulfilled(Client, LearningMachine) == unfulfilled(Machine, LearningMachine) == []
    public = {name for name in dir(Machine) if not name.startswith("_")}
    assert public - set(dir(Client)) == IN_PROCESS
    calls = {operation.calls for operation in OPERATIONS.values()} - {""}
    assert calls <= public & set(dir(Client))


def test_one_patient_through_the_client_is_the_same_patient_in_the_machine(both):
    machine, client = both
    row = ROWS.iloc[0].to_dict()
    answer = client.receive(row, now=row["arrived"], source="test")
    assert answer["record_id"] == row["record_id"] and answer["repeated"] is False
    assert client.receive(row)["repeated"] is True
    assert client.has(row["record_id"]) and not client.has("absent")
    assert not client.has_outcome(row["record_id"])
    until = row["arrived"] + pd.Timedelta(days=3)
    client.add_outcome(row["record_id"], 1, until)
    assert client.has_outcome(row["record_id"])
    assert client.explain(row["record_id"])["y"] == machine.explain(row["record_id"])["y"] == 1
    client.add_outcome(row["record_id"], None, row["arrived"] + pd.Timedelta(days=9), None, until)
    assert (
        client.explain(row["record_id"])["lost"] and client.explain(row["record_id"])["y"] is None
    )
    client.add_decision(row["record_id"], "Dr. Who", "agree")
    assert client.status()["counts"] == machine.status()["counts"]
    assert client.status()["service"] is True


def test_no_request_waits_for_the_stores_lock_or_the_registrys(both):
    machine, client = both
    first, second = ROWS["record_id"].head(2)
    client.receive_many(ROWS.head(2), on_arrival=True)
    machine.registry.client()  # Makes MLflow's file
    until, read = ROWS["arrived"].max() + pd.Timedelta(days=3), threading.Event()
    before = client.status()

    def table():
        client.table("outcomes")
        read.set()

    base = sqlite3.connect(machine.registry.file, isolation_level=None)
    with closing(base), machine.store.database.lock:
        base.execute("BEGIN EXCLUSIVE")
        client.add_outcome(first, 1, until)
        reader = threading.Thread(target=table)  # Wants what is in the journal, and waits
        reader.start()
        client.add_outcome(second, 0, until)
        client.add_decision(first, "Dr. Who", "agree")
        now = client.status()
        assert now["counts"]["outcomes"] == before["counts"]["outcomes"] + 2
        assert client.explain(first)["y"] == 1 and client.explain(first)["decisions"]
        assert not read.is_set()
        base.rollback()
    reader.join()
    assert read.is_set() and len(client.models()) == 0


def test_tables_arrive_as_they_are(both):
    machine, client = both
    sent = client.receive_many(ROWS, source="file")
    assert (sent["error"] == "").all() and len(sent) == len(ROWS)
    for name in ("records", "outcomes", "rejects"):
        pd.testing.assert_frame_equal(client.table(name), machine.table(name))
    pd.testing.assert_frame_equal(client.known(), machine.known())
    pd.testing.assert_frame_equal(client.table("records", last=3), machine.table("records", last=3))
    half = ROWS["arrived"].iloc[20]
    pd.testing.assert_frame_equal(client.known(half), machine.known(half))


def test_every_table_comes_as_parquet_too(both):
    machine, client = both
    client.receive_many(ROWS, source="file", on_arrival=True)
    client.receive({**ROWS.iloc[0].to_dict(), "record_id": "new"})
    paths = [
        "/v1/patients",
        "/v1/models",
        "/v1/approvals",
        *(f"/v1/tables/{t}" for t in ("records", "outcomes")),
    ]
    for path in [*paths, "/v1/tables/audit", "/v1/tables/rejects?last=3"]:
        form = "&form=parquet" if "?" in path else "?form=parquet"
        answer = client._connection.request("GET", path + form)
        assert answer.headers["content-type"] == PARQUET and answer.content[:4] == b"PAR1"
        arrow = from_arrow(client._connection.request("GET", path).content)
        pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(answer.content)), arrow)
    pd.testing.assert_frame_equal(client.known(), machine.known())
    with pytest.raises(LMError, match="form = 'csv' is unknown: choose arrow, parquet or json"):
        client._connection.request("GET", "/v1/patients?form=csv")


def test_losses_and_the_source_of_refusals_arrive(both):
    machine, client = both
    client.receive_many(ROWS.head(3), source="file", on_arrival=True)
    table = ROWS.head(3).assign(
        y=[np.nan, np.nan, 0.0],
        known_at=ROWS["arrived"] + pd.Timedelta(days=30),
        event=pd.NaT,
        followed_until=ROWS["arrived"].head(3) + pd.to_timedelta([5, 50, 50], unit="D"),
    )
    answer = client.add_outcomes(table, source="registry")
    assert answer["accepted"] == 2 and "followed_until" in answer["refused"][0]
    rows = [json_values(row) for row in table.to_dict("records")]
    assert client.add_outcomes(rows)["accepted"] == 2
    with pytest.raises(LMError, match="0 or 1"):
        client.add_outcome(table["record_id"][0], None, table["known_at"][0], source="phone")
    assert machine.table("rejects")["source"].tolist() == ["registry", "", "phone"]
    assert client.known()["lost"].tolist() == [True, False, False]
    pd.testing.assert_frame_equal(client.known(), machine.known())


def test_a_batch_with_mixed_types_keeps_its_good_rows(both):
    _, client = both
    rows = ROWS.head(3).astype(object)
    number = MONICA.numbers[0]
    rows.loc[rows.index[1], number] = "old"
    answer = client.receive_many(rows)
    assert (answer["error"] != "").sum() == 1
    assert client.status()["counts"]["records"] == 2
    assert client.status()["counts"]["rejects"] == 1


def test_errors_are_the_machines_own(both):
    machine, client = both
    row = {**ROWS.iloc[0].to_dict(), MONICA.numbers[0]: np.inf}
    results = []
    for side in both:
        with pytest.raises(RejectedRecord) as error:
            side.receive(row)
        results.append((error.value.record_id, error.value.field, error.value.rule))
    assert results[0] == results[1]
    with pytest.raises(LMError, match="absent"):
        client.explain("absent")
    with pytest.raises(UnknownRecord):
        client.add_outcome("absent", 1, "1990-01-01")
    with pytest.raises(NotFound, match="choose one of"):
        client.table("sqlite_master")
    with pytest.raises(LMError, match="as_of = 'soon' must be a date"):
        client.known("soon")
    with pytest.raises(LMError, match="earlier version"):
        client.rollback()
    with pytest.raises(NotFound):
        client.job("no-such-job")
    with pytest.raises(LMError, match="'no_such_notebook'"):
        client.run("no_such_notebook")
    assert machine.status()["counts"]["rejects"] == 3


BODIES = [b"", b"{", b"[1]", b'{"row": {}}', b'{"row": 7}', b'{"row": {"record_id": []}}']
BODIES += [b"[" * 50_000, b"\xff\xfe", b'{"row": {"record_id": "\\ud800"}}', b'{"row": {}, "x": 1}']
BODIES += [b'{"row": {"record_id": "a", "arrived": 1e999}}', b"null", b'{"row": NaN}']


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    "path", ["/v1/records", "/v1/records/batch", "/v1/outcomes", "/v1/promotions", "/v1/jobs"]
)
def test_malformed_bodies_get_a_sentence_and_store_nothing_but_rejects(both, path, body):
    machine, client = both
    headers = {"content-type": "application/json"} | bearer(client)
    answer = httpx.post(client.url + path, content=body, headers=headers, **UNPROXIED)
    assert 400 <= answer.status_code < 500, answer.text
    assert isinstance(answer.json()["error"], str)
    assert machine.status()["counts"]["records"] == 0


def test_strangers_and_long_bodies_are_turned_away(both):
    _, client = both

    def ask(method="GET", path="/v1/status", headers=(), **how):
        results = {**bearer(client), **dict(headers)}
        return httpx.request(method, client.url + path, headers=results, **UNPROXIED, **how)

    assert ask().status_code == 200
    assert ask(headers={"host": "evil.example"}).status_code == 403
    assert ask(headers={"origin": "http://evil.example"}).status_code == 403
    assert ask("POST", "/v1/records", content=b" " * (bounds().body + 1)).status_code == 413
    chunks = (b" " * 2**20 for _ in range(bounds().body // 2**20 + 2))
    assert ask("POST", "/v1/records/batch", content=chunks).status_code == 413
    for path in (
        "/v1/records",
        "/v1/outcomes",
        "/v1/decisions",
        "/v1/audit/notes",
        "/v1/jobs",
        "/nowhere",
    ):
        long = b'{"row": "' + b"x" * bounds().small + b'"}'
        assert ask("POST", path, content=long).status_code == 413
        assert ask(
            "POST", path, content=iter([long[: bounds().small], long[bounds().small :]])
        ).status_code in (
            413,
            404,
        )
    just = ask("POST", "/v1/records", content=b" " * bounds().small)
    assert just.status_code == 422 and "LM-107" in just.text
    assert ask("POST", "/v1/records/batch", content=b" " * (bounds().small + 1)).status_code == 422
    assert ask(path="/docs").status_code == 404
    assert "access-control-allow-origin" not in ask().headers


def test_a_job_is_cancelled_through_the_client_and_known_to_the_next_service(home):
    with Machine("monica", home) as machine:
        with background(machine) as url, Client(url) as client:
            job = client.run("monitor", {"study": "monica"})["job"]
            assert client.job(job)["state"] == "running"
            how = client.cancel(job)
            assert how["state"] == "cancelled" and how["job"] == job
            with pytest.raises(NotFound, match="job 'monitor-1' is unknown"):
                client.cancel("monitor-1")
        with background(machine) as url, Client(url) as client:
            assert client.job(job) == how


def test_connect_finds_the_service_and_is_not_fooled_by_a_stale_file(home):
    folder = settings().study_home("monica")
    with Machine("monica", home) as machine:
        with pytest.raises(StoreLocked):
            connect("monica", patience=0.3)
        with background(machine):
            text = (folder / "service.json").read_text()
            with connect("monica") as result:
                assert isinstance(result, Client) and result.status()["study"] == "monica"
            stale = {**json.loads(text), "pid": 1}
            (folder / "service.json").write_text(json.dumps(stale))
            assert find_service(folder) is None
        assert not (folder / "service.json").exists()
    (folder / "service.json").write_text(text)
    with connect("monica") as result:
        assert isinstance(result, Machine)
        assert not (folder / "service.json").exists()


def test_a_taken_port_is_one_sentence(both):
    machine, client = both
    port = int(client.url.rsplit(":", 1)[1])
    with pytest.raises(LMError, match=f"port {port}"), background(machine, port=port):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_lm_serve_says_where_it_is_and_closes_cleanly(home, sign):
    text = [sys.executable, "-m", "lm.cli.cli", "serve", "monica", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(text, cwd=find_root(), **pipes)
    first = process.stdout.readline()
    assert first.startswith("monica is served at http://127.0.0.1:")
    with connect("monica") as client:
        assert isinstance(client, Client)
        client.receive(ROWS.iloc[0].to_dict())
    second = subprocess.run(text, capture_output=True, text=True, cwd=find_root())
    assert second.returncode == 2 and second.stderr.startswith(
        "lm: store of study 'monica' is open"
    )
    process.send_signal(sign)
    assert "leaked" not in process.communicate(timeout=PATIENCE)[1] and process.returncode == 0
    with Machine("monica", home) as machine:
        assert machine.status()["counts"]["records"] == 1


@pytest.mark.slow
def test_a_killed_service_leaves_nothing_that_stops_the_next(home):
    text = [sys.executable, "-m", "lm.cli.cli", "serve", "monica", "--port", "0"]
    process = subprocess.Popen(text, cwd=find_root(), stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with connect("monica") as client:
        client.receive(ROWS.iloc[0].to_dict())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with connect("monica") as machine:
        assert isinstance(machine, Machine) and machine.has(ROWS["record_id"].iloc[0])


def test_the_client_is_light():
    code = "import sys, lm.serve.client; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["sklearn", "mlflow", "duckdb", "pandas", "papermill", "fastapi", "scipy"]
    ran = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


def test_busy_survives_the_way_to_the_client():
    from lm.serve.client import error_from

    error = error_from({"error": "4 jobs are running already", "kind": "Busy"})
    assert type(error) is Busy and str(error) == "4 jobs are running already"


# Who may


@pytest.fixture
def middleware(home):
    """A service, and a function that asks it with a token of a role."""
    with Machine("monica", home) as machine, background(machine) as url:
        tokens = Tokens(machine.store.folder)
        stored = {role: tokens.create(f"the {role}", role) for role in ROLES}

        def ask(role, method="GET", path="/v1/status", **how):
            shown = {"authorization": f"Bearer {stored[role]}"} if role else {}
            return httpx.request(method, url + path, headers=shown, **UNPROXIED, **how)

        yield machine, tokens, ask


def test_every_route_has_a_line_and_every_line_a_route(home):
    with Machine("monica", home) as machine:
        app = create_app(machine, Jobs(home / "jobs"), tokens=Tokens(home))
        assert unlisted(app) == [] and unused(app) == []


@pytest.mark.slow
def test_every_role_passes_where_the_table_says_and_nowhere_else(middleware):
    _, _, ask = middleware
    for (method, path), who in PERMISSIONS.items():
        if method != "GET":
            continue
        for role in (None, *ROLES):
            status = ask(role, method, re.sub(r"{[^}]*}", "1", path)).status_code
            may = ANYBODY in who or role in who
            assert (status not in (401, 403)) == may, (role, path, status)


def test_refused_access_is_in_the_audit_log_and_a_revoked_token_ends_at_once(middleware):
    machine, tokens, ask = middleware
    assert (
        ask("viewer").status_code == 200 and ask("viewer", path="/v1/patients").status_code == 403
    )
    tokens.revoke("the viewer")
    assert ask("viewer").status_code == 401 and ask(None).status_code == 401

    def denied():
        log = machine.table("audit")
        entries = [json.loads(text) for text in log.loc[log["kind"] == "access", "content"]]
        return any(entry.get("who") == "the viewer" for entry in entries)

    eventually(denied)
    assert machine.verify() == [] and "lm_" not in machine.table("audit").to_csv()


def test_no_user_signs_for_another(middleware):
    machine, _, ask = middleware
    row = ROWS.iloc[0][["record_id", "arrived", *machine.study.feature_names]].to_dict()
    machine.receive(row, now=row["arrived"])
    results = {"record_id": row["record_id"], "clinician": "Dr. Other", "action": "agree"}
    refused = ask("clinician", "POST", "/v1/decisions", json=results)
    assert refused.status_code == 403 and "cannot sign as 'Dr. Other'" in refused.json()["error"]
    assert machine.table("decisions").empty
    assert (
        ask("clinician", "POST", "/v1/decisions", json=results | {"clinician": ""}).status_code
        == 200
    )
    assert machine.table("decisions")["clinician"].tolist() == ["the clinician"]
    assert ask("admin", "POST", "/v1/decisions", json=results).status_code == 403


def test_first_start_prints_an_admin_s_token_once(home):
    with Machine("monica", home) as machine, background(machine):
        announced = machine.store.folder / "service.json"
        assert announced.stat().st_mode & 0o077 == 0
        tokens = Tokens(machine.store.folder)
        first = tokens.first()
        assert tokens.person(first).role == "admin" and tokens.first() is None
        assert first not in announced.read_text()


# Predicting without keeping


def test_a_question_is_answered_and_leaves_no_trace(both):
    machine, client = both
    with pytest.raises(LMError, match="no model yet"):
        client.score([{"age": 60}])
    past = WHOLE[WHOLE["arrived"] <= MONICA.first_model]
    client.receive_many(past, on_arrival=True)
    machine.add_outcomes(outcomes(MONICA, past))
    machine.update(machine.monitor(MONICA.first_model, fast=True))
    assert machine.status()["champion"] == 1
    before = machine.status()["counts"]
    rows = ROWS[machine.study.feature_names].head(7)
    asked = client.score(rows)
    pd.testing.assert_frame_equal(asked, machine.score(rows), check_dtype=False)
    model = machine.registry.load(1)
    np.testing.assert_allclose(asked["risk"], predict(model, rows)["risk"], rtol=1e-12)
    why = client.score(rows, explain=True)
    odds = np.log(asked["risk"] / (1 - asked["risk"]))
    shares = pd.DataFrame(why["contributions"].tolist()).sum(axis=1)
    assert (odds - shares).std() < 1e-9 and why["sentence"].str.len().min() > 20
    with pytest.raises(RejectedRecord, match="age"):
        client.score([rows.iloc[0].to_dict() | {"age": 900}])
    assert machine.status()["counts"] == before

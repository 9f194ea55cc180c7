"""Numbers, log lines and codes of errors: complete, bounded, and without patients or tokens."""

import asyncio
import importlib
import io
import json
import logging
import pkgutil
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pandas as pd
import pytest
from fastapi import FastAPI, HTTPException, Request, Response
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import lm
from lm.core.errors import LMError
from lm.core.settings import find_root
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.jobs.jobs import Jobs
from lm.machine.machine import Machine
from lm.serve import inference_protocols as protocols
from lm.serve.app import create_app
from lm.serve.auth import LOGGED_REFUSALS, REFUSALS, AuthMiddleware, RateLimits, Tokens
from lm.serve.error_codes import CODES, code_table, explained, kind_of
from lm.serve.metrics import (
    _CLASSES,
    MOST_VERSIONS,
    OTHER,
    ServiceMetrics,
    Templates,
    rule_class,
)
from lm.serve.request_log import (
    REQUEST_ID,
    JsonLines,
    RequestLog,
    answered,
    json_logs,
    request_id,
)
from lm.serve.routes import PERMISSIONS

STUDY = load_study("monica")
ROWS = read_rows(STUDY)[["record_id", "arrived", *STUDY.feature_names]].head(30)

# Codes of errors

PUBLISHED = {  # What stands here has left the house: a code is never changed or used again
    **{
        "LMError": "LM-100",
        "RejectedRecord": "LM-101",
        "UnknownRecord": "LM-102",
        "Duplicate": "LM-103",
    },
    **{"NotFound": "LM-104", "Busy": "LM-105", "WrongType": "LM-106", "Malformed": "LM-107"},
    **{"Unreadable": "LM-108", "WrongMethod": "LM-109", "TooLong": "LM-110"},
    **{"NoToken": "LM-201", "BadToken": "LM-202", "Expired": "LM-203", "Revoked": "LM-204"},
    **{"Forbidden": "LM-205", "TooMany": "LM-206", "WrongHost": "LM-207", "TooSlow": "LM-208"},
    **{"LongHead": "LM-209"},
    **{"NotReady": "LM-301", "StoreLocked": "LM-302", "TokensDamaged": "LM-303"},
    **{"Unavailable": "LM-304", "MachineUnavailable": "LM-305", "Bug": "LM-500"},
}


def kinds(made=LMError):
    """Every class of mistakes in the package."""
    yield made
    for inner in made.__subclasses__():
        yield from kinds(inner)


def test_every_kind_of_mistake_in_the_package_has_a_code_of_its_own():
    for module in pkgutil.walk_packages(lm.__path__, "lm."):
        if not module.name.startswith("lm.assets"):  # Voila's settings are no module of ours
            importlib.import_module(module.name)
    own = {made.__name__ for made in kinds() if made.__module__.startswith("lm.")}
    assert {"RejectedRecord", "Busy", "StoreLocked", "NotReady"} <= own
    assert own <= set(CODES), f"without a code: {', '.join(sorted(own - set(CODES)))}"
    assert set(REFUSALS) <= set(CODES)


def test_published_codes_stay():
    assert {kind: CODES[kind].code for kind in PUBLISHED} == PUBLISHED
    assert code_table()["code"].is_unique and len(code_table()) == len(CODES)
    assert all(re.fullmatch(r"LM-[1-5]\d\d", code.code) for code in CODES.values())
    assert all(len(code.advice) > 10 and code.advice[0].islower() for code in CODES.values())


def test_a_status_is_the_same_wherever_it_is_written():
    assert {kind: CODES[kind].status for kind in REFUSALS} == {k: v[0] for k, v in REFUSALS.items()}
    results = {made.__name__: status for made, status in protocols.ERROR_STATUSES.items()}
    assert {kind: CODES[kind].status for kind in results} == results


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 415, 422, 429, 500, 503])
def test_an_error_of_which_only_the_status_is_known_has_its_code(status):
    assert CODES[kind_of(status)].status == status
    assert explained(status, "x")["kind"] == kind_of(status)


def test_a_body_keeps_the_fields_of_its_error():
    class Late(LMError):
        """A kind that the table does not know."""

    assert kind_of(Late) == kind_of(Late("x")) == kind_of("Late") == "LMError"
    body = explained(Late("x"), "too late", field="age", value=None)
    assert body == {
        **{"error": "too late", "kind": "Late", "field": "age", "value": None},
        **{"code": "LM-100", "advice": CODES["LMError"].advice},
    }


# Names of requests, templates, lines


@given(st.lists(st.tuples(st.sampled_from([b"x-request-id", b"host"]), st.binary(max_size=80))))
def test_a_request_always_has_a_name_that_is_safe_in_headers_and_logs(headers):
    name = request_id(headers)
    assert REQUEST_ID.fullmatch(name) and name.isascii() and len(name) <= 64


@given(st.sampled_from(["GET", "POST", "HEAD", "DELETE", "X"]), st.text(max_size=60))
def test_a_path_is_a_template_of_the_table_or_other(method, path):
    known = {path for _, path in PERMISSIONS}
    assert TEMPLATES.of(method, f"/{path}") in known | {OTHER}
    assert TEMPLATES.of(method, f"/v1/records/{path}") in known | {OTHER}


TEMPLATES = Templates()


def test_every_route_of_the_service_has_its_template(machine):
    paths = create_app(machine, Jobs(machine.store.folder / "jobs")).openapi()["paths"]
    asked = [(m.upper(), path) for path, methods in paths.items() for m in methods]
    assert len(asked) > 25
    for method, path in asked:
        result = TEMPLATES.of(method, re.sub(r"\{.*?\}", "x", path))
        assert result.replace(":path", "") == path, (method, path)


@given(st.text(), st.dictionaries(st.text(max_size=5), st.floats() | st.text() | st.binary()))
def test_a_line_is_one_line_of_json_whatever_is_in_it(message, facts):
    record = logging.LogRecord("lm", logging.INFO, "", 0, message, None, None)
    record.facts = {f"x{key}": value for key, value in facts.items()}
    line = JsonLines().format(record)
    assert line.isascii() and "\n" not in line and "\r" not in line
    assert json.loads(line)["level"] == "info"


def test_json_logs_leave_logging_as_it_was_even_after_an_error():
    before = logging.root.handlers[:], logging.root.level, logging.getLogger("lm").level
    with pytest.raises(KeyError), json_logs(io.StringIO()):
        raise KeyError
    assert before == (logging.root.handlers, logging.root.level, logging.getLogger("lm").level)


# A real machine


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with Machine(STUDY, tmp_path_factory.mktemp("home")) as machine:
        machine.receive_many(ROWS, source="history", on_arrival=True)
        yield machine


def samples(instruments):
    """What a collector reads, by name and labels."""
    body, kind = instruments.text()
    assert kind.startswith("text/plain; version=")
    result = text_string_to_metric_families(body.decode())
    return {(s.name, *s.labels.values()): s.value for family in result for s in family.samples}


def refuse(call, *args, **how):
    with pytest.raises(LMError):
        call(*args, **how)


def test_the_numbers_are_those_of_the_machine(machine):
    instruments, age = ServiceMetrics(machine), STUDY.numbers[0]
    row = ROWS.iloc[0].to_dict()
    before = samples(instruments)
    assert before["lm_store_rows", "records"] == len(ROWS) and before[("lm_up",)] == 1
    assert pd.isna(before[("lm_champion_version",)])
    wrong = [{age: 10**9}, {age: None}, {"record_id": ""}, {"sex": "?"}, {"arrived": "soon"}]
    for one in wrong:
        refuse(machine.receive, {**row, "record_id": "new"} | one)
    gone = {key: value for key, value in row.items() if key != age}
    refuse(machine.receive, gone)
    refuse(machine.receive, row | {age: 60 + (row[age] == 60)})
    name = row["record_id"]
    refuse(machine.add_outcome, "absent", 1, "1990-01-01")
    refuse(machine.add_outcome, name, 7, "1990-01-01")
    refuse(machine.add_outcome, name, 1, "1950-01-01")
    refuse(machine.add_decision, name, "", "agree")
    refuse(machine.add_decision, name, "Dr. Who", "maybe")
    machine.record_verdict({"as_of": "1990-01-01", "action": "retrain", "reason": "x"})
    after = samples(instruments)
    results = {key[1:]: n for key, n in after.items() if key[0] == "lm_rejects_total"}
    rejects = machine.table("rejects")
    assert sum(results.values()) == len(rejects)
    assert not [key for key in results if OTHER in key], rejects[["rule", "message"]]
    assert {rule for _, rule in results} <= {name for name, _ in _CLASSES}
    assert results["outcome", "unknown record"] == results["outcome", "label"] == 1
    assert results["record", "identity"] == 2 and results["record", "level"] == 1
    assert results["outcome", "date"] == results["record", "date"] == 1
    assert after["lm_verdicts_total", "retrain"] == after["lm_verdict", "retrain"] == 1
    assert after["lm_store_rows", "rejects"] == len(rejects)
    clock = pd.Timestamp(machine.status()["clock"])
    assert after[("lm_clock_seconds",)] == (clock - pd.Timestamp(0)).total_seconds()
    assert after[("lm_store_bytes",)] > 1000 and after[("lm_disk_free_bytes",)] > 0
    if sys.platform == "linux":
        assert after[("process_resident_memory_bytes",)] > 10e6
    anew = samples(ServiceMetrics(machine))
    assert not [key for key in anew if key[0] == "lm_rejects_total"]
    assert anew["lm_verdict", "retrain"] == 1 and anew["lm_verdicts_total", "retrain"] == 0


def test_a_machine_that_is_closed_or_slow_to_wake_is_a_number(tmp_path, caplog):
    class Silent:
        """Answers once."""

        asked = 0

        def status(self):
            self.asked += 1
            if self.asked > 1:
                raise LMError("the store is closed")
            return {"champion": 1, "counts": {}, "clock": None}

    def broken():
        raise OSError

    instruments = ServiceMetrics(Silent(), jobs=broken, queue=lambda: 7)
    result = samples(instruments)
    assert result[("lm_up",)] == 0 and result[("lm_write_queue",)] == 7
    assert ("lm_champion_version",) not in result and not [k for k in result if k[0] == "lm_jobs"]


def test_no_patient_stands_in_the_numbers_and_labels_are_few(machine):
    instruments = ServiceMetrics(machine)
    for n in range(2000):
        instruments.requests.predicted(n, f"canary of {n} at 5 %: hash 0.{n}")
        instruments.requests.predicted(1, f"m{n}")
    for name in ROWS["record_id"]:
        refuse(machine.receive, ROWS.iloc[0].to_dict() | {"record_id": name, "sex": name})
    text = instruments.text()[0].decode()
    assert not [name for name in ROWS["record_id"] if f'"{name}"' in text]
    assert (
        len([line for line in text.splitlines() if "lm_predictions_total{" in line])
        <= MOST_VERSIONS + 3
    )
    assert len(text.splitlines()) < 1000


def test_the_table_in_the_notebook_names_every_metric_and_no_other(machine):
    notebook = find_root() / "nbs" / "library" / "80_serve/03_metrics.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    (table,) = (text for c in cells if "## What is counted" in (text := "".join(c["source"])))
    named = set(re.findall(r"`(lm_\w+)`", "\n".join(re.findall(r"^\|.*\|", table, re.M))))
    instruments = ServiceMetrics(machine, jobs=dict, queue=lambda: 0)
    result = text_string_to_metric_families(instruments.text()[0].decode())
    own = {f.name + "_total" * (f.type == "counter") for f in result if f.name.startswith("lm_")}
    assert {name for name in own if not name.endswith("_created")} == named


def test_rules_without_a_sentence_are_other():
    assert rule_class(None, None) == rule_class("", "") == rule_class(float("nan")) == OTHER


# Behind the middleware


def ward(tmp_path, instruments, **how):
    """A service behind the middleware, traced, and the token of a clinician."""
    app, tokens = FastAPI(), Tokens(tmp_path)

    @app.get("/v1/records/{record_id:path}")
    def explain(record_id: str, request: Request) -> Response:
        if record_id == "broken":
            raise ValueError("the patient is Anna Miller")
        if record_id == "absent":
            raise HTTPException(404, "no such patient")
        answered(2, "champion", 3)
        return Response("{}")

    app.add_middleware(AuthMiddleware, tokens=tokens, limits=RateLimits(strangers=5.0))
    app.add_middleware(RequestLog, metrics=instruments, **how)
    return app, tokens.create("anna", "clinician")


def ask(app, *requests):
    """Status and headers of several requests, all at once."""

    async def all_of_them():
        wire = httpx.ASGITransport(app, client=("10.0.0.9", 1))
        async with httpx.AsyncClient(transport=wire, base_url="http://ward") as web:
            asked = (web.request(method, path, headers=h) for method, path, h in requests)
            return await asyncio.gather(*asked)

    return asyncio.run(all_of_them())


class No_one:
    """A machine without anything."""

    def status(self):
        return {"champion": None, "clock": None, "counts": {}}


def test_requests_are_counted_named_and_logged_without_patients_or_tokens(tmp_path):
    instruments, stream = ServiceMetrics(No_one()), io.StringIO()
    app, token = ward(tmp_path, instruments)
    anna, stranger = (
        {"authorization": f"Bearer {token}"},
        {"authorization": "Bearer lm_" + 40 * "x"},
    )
    with json_logs(stream):
        answers = ask(
            app,
            ("GET", "/v1/records/m1234", anna | {"x-request-id": "first"}),
            ("GET", "/v1/records/broken", anna),
            ("GET", "/v1/records/absent", anna),
            ("HEAD", "/v1/records/m1234", anna),
            ("GET", "/v1/records/m1234", stranger | {"x-request-id": token}),
            ("GET", "/v1/records/m1234", {}),
            ("POST", "/v1/promotions", anna),
            ("GET", f"/m1234?token={token}", anna),
            ("DELETE", "/v1/records/m1234", anna),
        )
    assert [a.status_code for a in answers] == [200, 500, 404, 200, 401, 401, 403, 404, 405]
    names = [a.headers["x-request-id"] for a in answers]
    assert names[0] == "first" and len(set(names)) == len(names) and token not in names
    lines = {line["id"]: line for line in map(json.loads, stream.getvalue().splitlines())}
    assert [lines[name]["status"] for name in names] == [a.status_code for a in answers]
    assert not re.search("m1234|Miller|absent|lm_", stream.getvalue())
    first, bug = lines["first"], lines[names[1]]
    assert first["person"] == "anna" and first["version"] == 2 and first["patients"] == 3
    assert bug["error"] == "ValueError" and bug["where"][-1].endswith("explain")
    assert answers[1].json()["request_id"] == names[1] and "Miller" not in answers[1].text
    assert "person" not in lines[names[4]] and lines[names[4]]["code"].startswith("LM-2")
    result = samples(instruments)
    counted = {key: n for key, n in result.items() if key[0] == "lm_request_seconds_count"}
    assert sum(counted.values()) == len(answers) and result[("lm_requests_in_flight",)] == 0
    assert result["lm_predictions_total", "2", "champion"] == 6
    assert result["lm_errors_total", "LM-500", "Bug"] == 1
    assert sum(n for key, n in result.items() if key[0] == "lm_refused_access_total") == 3


def test_a_flood_of_invented_paths_and_methods_is_one_label(tmp_path):
    instruments = ServiceMetrics(No_one())
    app, _ = ward(tmp_path, instruments)
    ask(app, *(("BREW", f"/x{n}/y", {}) for n in range(200)))
    results = [key for key in samples(instruments) if key[0] == "lm_request_seconds_count"]
    assert results == [("lm_request_seconds_count", OTHER, OTHER, "4xx")]
    assert set(LOGGED_REFUSALS) <= {
        key[1] for key in samples(instruments) if key[0].startswith("lm_refused")
    }


def test_slow_answers_are_flagged(tmp_path):
    instruments, stream, ticks = (
        ServiceMetrics(No_one()),
        io.StringIO(),
        iter([0.0, 0.2, 1.0, 1.05]),
    )
    app, token = ward(tmp_path, instruments, slow=0.1, clock=lambda: next(ticks))
    with json_logs(stream):
        for _ in range(2):
            ask(app, ("GET", "/v1/records/x", {"authorization": f"Bearer {token}"}))
    slow, fast = map(json.loads, stream.getvalue().splitlines())
    assert slow["slow"] is True and slow["level"] == "warning" and slow["ms"] == 200
    assert "slow" not in fast and fast["level"] == "info"
    assert samples(instruments)["lm_slow_requests_total", "/v1/records/{record_id:path}"] == 1


SCOPE = {"type": "http", "method": "GET", "path": "/health", "headers": []}


def run(app, scope=SCOPE):
    """What an application sends."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.disconnect"}

    try:
        asyncio.run(RequestLog(app, COUNT)({**scope}, receive, send))
    except (ValueError, asyncio.CancelledError) as error:
        sent.append(type(error))
    return sent


COUNT = ServiceMetrics(No_one())
START = {"type": "http.response.start", "status": 200}


async def half(scope, receive, send):
    await send(START)
    await send({"type": "http.response.body", "body": b"half", "more_body": True})
    raise ValueError("of Anna Miller")


async def late(scope, receive, send):
    await send(START)
    await send({"type": "http.response.body", "body": b"whole"})
    raise ValueError("after the answer")


async def left(scope, receive, send):
    raise asyncio.CancelledError


def test_answers_that_break_off_are_counted_too():
    assert run(half)[-1] is ValueError and run(late)[-1]["body"] == b"whole"
    assert run(left) == [asyncio.CancelledError]
    result = samples(COUNT)
    assert result[("lm_requests_in_flight",)] == 0
    assert result["lm_request_seconds_count", "GET", "/health", "2xx"] == 2
    assert result["lm_request_seconds_count", "GET", "/health", "4xx"] == 1
    assert not [key for key in result if key[0] == "lm_errors_total"]


def test_what_is_no_request_passes_untouched():
    async def echo(scope, receive, send):
        await send({"type": scope["type"]})

    assert run(echo, {"type": "lifespan"}) == [{"type": "lifespan"}]


def test_many_threads_lose_no_count(machine):
    instruments = ServiceMetrics(machine)

    def work(n):
        instruments.requests.seen("/v1/records", "POST", 200, 0.001)
        instruments.requests.predicted(1, "champion")
        return instruments.text() if n % 100 == 0 else None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(2000)))
    result = samples(instruments)
    assert result["lm_request_seconds_count", "POST", "/v1/records", "2xx"] == 2000
    assert result["lm_predictions_total", "1", "champion"] == 2000


def test_two_services_in_one_process_do_not_share_their_numbers():
    one, two = ServiceMetrics(No_one()), ServiceMetrics(No_one())
    one.requests.seen("/health", "GET", 200, 0.1)
    assert not [key for key in samples(two) if key[0] == "lm_request_seconds_count"]

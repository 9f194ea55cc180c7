"""Whatever comes from outside: a sentence, never a server error, nothing stored but in rejects.

`LM_FUZZ=10000` sends so many bodies; a few hundred by default."""

import io
import json
import os
import random
import string
import threading
from collections import Counter
from decimal import Decimal
from urllib.parse import quote, urlencode, urlsplit

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as how
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks as conforms
from support.waiting import UNPROXIED, eventually

from lm.core.errors import LMError
from lm.core.limits import bounds
from lm.core.reader import ARROW
from lm.core.serialization import from_arrow, json_values
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.jobs.jobs import Jobs
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.serve.app import create_app
from lm.serve.routes import OPERATIONS

MANY = int(os.environ.get("LM_FUZZ", "300"))
SEED = int(os.environ.get("LM_FUZZ_SEED", "1"))
STUDY = load_study("monica")
ROWS = read_rows(STUDY)
NEXT = ROWS[ROWS["arrived"] > STUDY.first_model].reset_index(drop=True)
HELD = 20  # Patients that are stored before


def table_of(content):
    """A table in whichever form it was asked for."""
    if content[:4] == b"PAR1":
        return pd.read_parquet(io.BytesIO(content))
    rows = json.loads(content) if content[:1] == b"[" else None
    return (
        pd.DataFrame(rows, columns=["record_id", "error"])
        if rows is not None
        else from_arrow(content)
    )


class Desk:
    """A service with patients and a model, and what it has acknowledged since."""

    def __init__(self, folder):
        self.folder, self.machine = folder, Machine("monica", folder)
        model = fit(STUDY, ROWS[ROWS["arrived"] < STUDY.first_model])
        self.machine.registry.register(model, {}, {}, {}, "the first model")
        self.machine.registry.register(model.recalibrated(0.5), {}, {}, {}, "a second one")
        first = {"as_of": "1987-01-01", "action": "first", "reason": "first model"}
        self.machine.adopt(first | {"from_version": None, "to_version": 1})
        self.machine.receive_many(NEXT.head(HELD), source="history", on_arrival=True)
        self.app = create_app(self.machine, Jobs(folder / "jobs", limit=0), None)
        self.before, self.done, self.faults = self.counts(), Counter(), []
        self.heard = {"outcomes": set(), "decisions": set()}
        self.ids = set(self.machine.table("records")["record_id"])

    def counts(self):
        return self.machine.status()["counts"]

    def send(self, method, path, **inputs):
        """One request."""
        return self.judge(method, path, self.web.request(method, path, **inputs), inputs)

    def judge(self, method, path, answer, inputs):
        """The answer; what is wrong with it is recorded."""
        text = answer.text if answer.status_code >= 400 else ""
        fault = answer.status_code >= 500
        fault |= "Traceback" in text or str(self.folder) in text
        if text and not fault:
            payload = answer.json()
            fault = not isinstance(payload.get("error", payload.get("message")), str)
        if fault:
            self.faults.append((method, path, answer.status_code, text[:300], str(inputs)[:500]))
        self.note(method, path.split("?")[0], answer)
        return answer

    def note(self, method, path, answer):
        """Remember what was acknowledged."""
        if method != "POST" or answer.status_code >= 300:
            return
        if path == "/v1/records":
            self.ids.add(answer.json()["record_id"])
        elif path == "/v1/records/batch":
            rows = table_of(answer.content)
            self.ids |= set(rows.loc[rows["error"] == "", "record_id"])
        elif path in ("/v1/outcomes", "/v1/outcomes/batch"):
            self.done["outcomes"] += answer.json()["accepted"]
            self.heard["outcomes"] |= {answer.json().get("record_id")} - {None}
        elif path == "/v1/decisions":
            self.done["decisions"] += 1
            self.heard["decisions"].add(answer.json()["record_id"])
        elif path in (
            "/v1/promotions",
            "/v1/rollbacks",
            "/v1/results/updates",
            "/v1/approvals",
            "/v1/rejections",
            "/v1/updates",
        ):
            self.done["updates"] += "seq" in answer.json()

    def check(self):
        """Nothing is stored that was not acknowledged, and the log is whole."""
        faults, self.faults = self.faults, []
        assert not faults, f"{len(faults)}: " + "\n".join(map(str, faults[:10]))
        now, stored = self.counts(), self.machine.table("records")["record_id"]
        assert set(stored) == self.ids and len(stored) == len(self.ids)
        assert now["predictions"] == now["explanations"] == now["records"]
        assert now["updates"] == self.before["updates"] + self.done["updates"]
        for name, heard in self.heard.items():  # A repeated request is stored once
            remaining = self.machine.table(name)
            assert len(remaining) == now[name] <= self.before[name] + self.done[name], name
            assert heard <= set(remaining["record_id"]), name
            for _, result in remaining.drop(columns=["seq", "decided_at"], errors="ignore").groupby(
                "record_id"
            ):
                assert not (result.fillna("") == result.fillna("").shift()).all(axis=1).any(), name
        assert self.machine.verify() == []


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The service on a port of this computer."""
    desk = Desk(tmp_path_factory.mktemp("fuzz"))
    server = uvicorn.Server(uvicorn.Config(desk.app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    place = "http://127.0.0.1:" + str(server.servers[0].sockets[0].getsockname()[1])
    with httpx.Client(base_url=place, **UNPROXIED) as desk.web:
        yield desk
    server.should_exit = True
    thread.join(5)
    desk.machine.close()


# What a body can be

DEEP = [10, 200, 3_000, 60_000]
TEXTS = ["", " ", "x" * 20_000, "\x00", "\ud800", "é\u202e\U0001f9ea", "NaN", "nan", "NaT", "inf"]
TEXTS += ["'; DROP TABLE records; --", '" OR ""="', "1; SELECT * FROM audit", "$record_id", "?"]
TEXTS += ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "{{7*7}}", "${jndi:x}"]
TEXTS += [
    "../../../etc/passwd",
    "6_4",
    "\u0666\u0664",
    "+64",
    "%00",
    "%s%n",
    "\r\nX-Evil: 1",
    "lm.core.settings",
    "__class__",
]
TEXTS += ["0000-00-00", "9999-12-31", "2024-02-30", "1990-01-01T25:61", "-5", "1e400", "0x10"]
TEXTS += ["1677-01-01", "1990-01-01T00:00:00+99:99", "1990-01-01 00:00 Europe/Nowhere", "first"]
NUMBERS = [0, -1, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 2**31, 2**63]
NUMBERS += [2**64, -(2**63) - 1, 10**30, 10**400, 0.1 + 0.2, True, False, None]
THINGS = [[], {}, [[]], [None], {"": None}, {"$ne": None}, [1, "a", None, {}], {"record_id": "x"}]


def hostile(rng):
    """A value that hardly any field expects."""
    pool = rng.choice([TEXTS, NUMBERS, THINGS])
    if rng.random() < 0.05:
        value = rng.choice(NUMBERS)
        for _ in range(rng.choice([5, 50, 150])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(pool)


def places(value, path=()):
    """Every place in a body."""
    yield path
    inside = enumerate(value) if isinstance(value, list) else ()
    for key, inner in value.items() if isinstance(value, dict) else inside:
        yield from places(inner, (*path, key))


def changed(rng, body):
    """The body with one place changed, left out, doubled or renamed."""
    body = json.loads(json.dumps(body))
    path = rng.choice(list(places(body))[1:] or [()])
    if not path or rng.random() < 0.03:
        return hostile(rng)
    above = body
    for key in path[:-1]:
        above = above[key]
    verb = rng.choice(["value", "value", "value", "gone", "more", "renamed"])
    if verb == "value":
        above[path[-1]] = hostile(rng)
    elif verb == "gone":
        del above[path[-1]]
    elif isinstance(above, dict):
        name = str(hostile(rng))[:200]
        above[name] = above.pop(path[-1]) if verb == "renamed" else hostile(rng)
    else:
        above.append(hostile(rng))
    return body


def spoiled(rng, raw):
    """The bytes cut off, mixed up, in another encoding, or nested beyond all measure."""
    verb = rng.choice(["cut", "flip", "utf-16", "utf-32", "bom", "tail", "deep", "long", "none"])
    if verb == "cut":
        return raw[: rng.randrange(len(raw) + 1)]
    if verb == "flip":
        mixed = bytearray(raw)
        for _ in range(rng.choice([1, 3, 20])):
            mixed[rng.randrange(len(mixed))] = rng.randrange(256)
        return bytes(mixed)
    if verb in ("utf-16", "utf-32"):
        return raw.decode("utf-8", "replace").encode(verb)
    if verb == "deep":
        depth, (left, right) = rng.choice(DEEP), rng.choice([("[", "]"), ('{"row":', "}")])
        return (left * depth + rng.choice(["", "1" + right * depth])).encode()
    if verb == "long":
        return raw.replace(b"1", b"1" * 5_000, 1)
    return {"bom": b"\xef\xbb\xbf" + raw, "tail": raw + raw}.get(verb, b"")


# Bodies that are right, to be spoiled


def patient(rng):
    """A patient who is stored already, or a new one."""
    row = NEXT[["record_id", "arrived", *STUDY.feature_names]].iloc[rng.randrange(2 * HELD)]
    return json_values(row.to_dict())


def outcome(rng):
    day = str(NEXT["arrived"].iloc[-1] + pd.Timedelta(days=30))
    return {"record_id": patient(rng)["record_id"], "y": rng.choice([0, 1]), "known_at": day}


def tensors(rng):
    row = {name: patient(rng)[name] for name in STUDY.feature_names}
    kinds = {f.name: "FP64" if f.kind == "number" else "BYTES" for f in STUDY.features}
    return {
        "id": "1",
        "inputs": [
            {"name": name, "shape": [1], "datatype": kinds[name], "data": [value]}
            for name, value in row.items()
        ],
        "outputs": [{"name": "risk", "parameters": {"binary_data": False}}],
    }


def table(rng):
    row = patient(rng)
    split = {"columns": list(row), "data": [list(row.values())]}
    forms = {"dataframe_split": split, "dataframe_records": [row], "instances": [row]}
    forms["inputs"] = {name: [value] for name, value in row.items()}
    form = rng.choice(list(forms))
    return {form: forms[form], "params": {"details": rng.random() < 0.5}}


DAY = "1993-01-01"
UPDATE = {"as_of": DAY, "action": "keep", "reason": "none", "from_version": 1, "to_version": None}
VERDICT = {"as_of": DAY, "action": "nothing", "reason": "none", "version": 1, "evidence": {}}
SKETCH = {"as_of": DAY, "version": 1, "kind": "blocks", "budget": 0.25, "patients": 25}
BODIES = {
    "/v1/records": lambda rng: {"row": patient(rng), "now": DAY, "source": "fuzz"},
    "/v1/records/batch": lambda rng: [patient(rng) for _ in range(rng.choice([1, 2, 5]))],
    "/v1/outcomes": outcome,
    "/v1/outcomes/batch": lambda rng: [outcome(rng) for _ in range(rng.choice([1, 3]))],
    "/v1/decisions": lambda rng: {
        **{"record_id": patient(rng)["record_id"], "clinician": "Dr. Who"},
        **{"action": rng.choice(["agree", "override"]), "reason": "seen", "now": "1999-01-01"},
    },
    "/v1/results/verdicts": lambda rng: {"verdict": VERDICT},
    "/v1/results/sketches": lambda rng: {"sketch": SKETCH | {"content": "{}"}},
    "/v1/results/updates": lambda rng: {"update": UPDATE},
    "/v1/updates": lambda rng: {"verdict": 1, "seed": 1, "families": ["x"]},
    "/v1/grants": lambda rng: {"notebook": "retrain", "parameters": {}, "by": "fuzz"},
    "/v1/monitoring/runs": lambda rng: {
        "as_of": "soon",
        "window_days": 90,
        "budget": 0.25,
        "fast": True,
    },
    "/v1/audit/notes": lambda rng: {"content": {"what": "try"}, "actor": "fuzz"},
    "/v1/snapshots": lambda rng: {"as_of": DAY},
    "/v1/promotions": lambda rng: {"version": 1, "reason": "try", "by": "quality manager"},
    "/v1/rollbacks": lambda rng: {"to": 1, "reason": "try", "as_of": None},
    "/v1/rollout": lambda rng: {
        **{"policy": {"kind": "canary", "challenger": 2, "share": 0.25}, "reason": "try"},
        **{"by": "quality manager"},
    },
    "/v1/predictions": lambda rng: {"rows": [patient(rng)], "version": 2, "explain": True},
    "/v1/approvals": lambda rng: {"name": "quality manager", "reason": "try", "number": 1},
    "/v1/rejections": lambda rng: {"name": "quality manager", "reason": "try", "number": 1},
    "/v1/jobs": lambda rng: {"notebook": "monitor", "parameters": {"study": "monica"}},
    "/invocations": table,
    "/v2/models/monica/infer": tensors,
    "/v2/models/monica/versions/1/infer": tensors,
}
OFTEN = ("/v1/records", "/v1/records/batch", "/v1/outcomes", "/v1/outcomes/batch", "/v1/decisions")
SLOW = {"/v1/updates": 0.2, "/v1/monitoring/runs": 0.2, "/v1/promotions": 0.3, "/v1/snapshots": 0.3}
WEIGHTS = [4 if path in OFTEN else SLOW.get(path, 1) for path in BODIES]
QUERIES = (
    "/v1/presence",
    "/v1/patients",
    "/v1/tables/records",
    "/v1/tables/outcomes",
    "/v1/models/1/risks",
    "/v1/models",
)
FIELDS = ("as_of", "last", "record_id", "form", "what", "version", "unknown")


COLUMNS = {  # What a column of one row can be in Arrow
    "list": pa.array([[1, 2]]),
    "no list": pa.array([[]], pa.list_(pa.int8())),
    "struct": pa.array([{"a": 1}]),
    "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
    "binary": pa.array([b"\xff\x00"]),
    "null": pa.nulls(1),
    "decimal": pa.array([Decimal("1e30")]),
    "duration": pa.array([1], pa.duration("ns")),
    "time": pa.array([2**62], pa.timestamp("s")),
    "zone": pa.array([1], pa.timestamp("us", "Asia/Tokyo")),
    "date": pa.array([2**30], pa.date32()),
    "words": pa.array(["a"]).dictionary_encode(),
    "large": pa.array([2**64 - 1], pa.uint64()),
    "half": pa.array([np.float16("nan")]),
    "runs": pa.RunEndEncodedArray.from_arrays([1], ["a"]),
    "bool": pa.array([True]),
}


def as_arrow(rng, row):
    """One row as an Arrow stream, with columns of strange types, twice, or none at all."""
    columns = {name: pa.array([value], from_pandas=True) for name, value in row.items()}
    for name in rng.sample(list(columns), min(len(columns), rng.choice([0, 1, 1, 2]))):
        columns[name] = rng.choice(list(COLUMNS.values()))
    names, arrays = list(columns), list(columns.values())
    if rng.random() < 0.1:
        names[0] = rng.choice([names[-1], ""])
    table = pa.Table.from_arrays(arrays, names)
    table = table.slice(0, 0) if rng.random() < 0.05 else table
    packed = pa.ipc.IpcWriteOptions(compression=rng.choice([None, None, "zstd", "lz4"]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=packed) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def post(desk, rng):
    """One spoiled body for one route."""
    path = rng.choices(list(BODIES), WEIGHTS)[0]
    body, kind = changed(rng, BODIES[path](rng)), "application/json"
    if path.endswith("batch") and rng.random() < 0.3:
        raw, kind = as_arrow(rng, BODIES[path](rng)[0]), ARROW
    elif path == "/invocations" and rng.random() < 0.2:
        raw, kind = pd.DataFrame([patient(rng)]).to_csv(index=False).encode(), "text/csv"
    else:
        raw = json.dumps(body).encode()
    raw = spoiled(rng, raw) if rng.random() < 0.35 and raw else raw
    kind = rng.choice([kind] * 8 + ["", "text/plain", "application/x-www-form-urlencoded", ARROW])
    ask = "?form=json" if path == "/v1/records/batch" else ""
    if path.endswith("batch") and rng.random() < 0.1:
        ask = ask or "?source=x"
        text = str(rng.choice(TEXTS))[:200].encode("utf-8", "replace").decode()
        ask += "&" + urlencode({rng.choice(["now", "source", "on_arrival"]): text})
    desk.send("POST", path + ask, content=raw, headers={"content-type": kind})


def get(desk, rng):
    """One strange question."""
    name = rng.choice(FIELDS)
    value = str(rng.choice(TEXTS + NUMBERS))[:500].encode("utf-8", "replace").decode()
    strange = quote("".join(rng.choices(string.printable, k=5)))
    path = rng.choice([*QUERIES, f"/v1/records/{strange}", f"/v1/tables/{strange}"])
    desk.send("GET", path, params={name: value})


@pytest.mark.slow
def test_spoiled_bodies_get_a_sentence_and_leave_nothing_behind(desk):
    rng = random.Random(SEED)
    for _ in range(MANY):
        (get if rng.random() < 0.1 else post)(desk, rng)
    desk.check()


MEGA = 10 * 2**20
NAMES = MEGA // 12 if MANY >= 10_000 else 50_000
LONG = {
    "one word": b'{"row": {"record_id": "long", "age": "' + b"9" * MEGA + b'"}}',
    "one number": b'{"row": {"record_id": "long", "age": ' + b"9" * MEGA + b"}}",
    "one name": b'{"row": {"' + b"n" * MEGA + b'": 1}}',
    "many names": b'{"row": {' + b",".join(b'"%d":1' % i for i in range(NAMES)) + b"}}",
    "brackets": b"[" * MEGA,
    "rows": b"[" + b'{"record_id":"r"},' * (MEGA // 18) + b"{}]",
    "spaces": b" " * MEGA,
    "zeros": bytes(MEGA),
}


@pytest.mark.parametrize("what", LONG)
def test_ten_megabytes_are_answered_with_a_sentence(desk, what):
    for path in ("/v1/records", "/v1/outcomes", "/invocations", "/v2/models/monica/infer"):
        kind = {"content-type": "application/json"}
        assert desk.send("POST", path, content=LONG[what], headers=kind).status_code < 500
    desk.check()


@pytest.mark.parametrize("path", ["/v1/records/batch?form=json", "/v1/outcomes/batch"])
def test_a_thousand_bad_rows_are_stored_in_one_transaction(desk, path):
    rows = [{"record_id": f"absent {n}", "y": 1, "known_at": "1990-01-01"} for n in range(1000)]
    before, entries = desk.counts()["rejects"], len(desk.machine.table("audit"))
    assert desk.send("POST", path, json=rows).status_code == 200
    assert desk.counts()["rejects"] == before + 1000
    assert len(desk.machine.table("audit")) == entries + 1
    desk.check()


def test_a_small_body_cannot_become_a_large_table():
    table = pa.table({"record_id": pa.nulls(5 * 10**7)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body = sink.getvalue().to_pybytes()
    assert len(body) < 1000
    with pytest.raises(LMError, match="rows"):
        from_arrow(body)


def test_a_reject_keeps_the_beginning_of_what_came(desk):
    row = patient(random.Random(0)) | {"record_id": "long", STUDY.numbers[0]: "9" * 90_000}
    answer = desk.send("POST", "/v1/records", json={"row": row})
    assert answer.status_code == 422 and len(answer.content) < 5000
    assert answer.json()["field"] == STUDY.numbers[0]
    stored = desk.machine.table("rejects", last=1).iloc[0]
    assert stored["received"].startswith("{") and len(stored["received"]) < 50_000
    assert json.loads(stored["received"])


@pytest.mark.parametrize("kind", ["champion", "shadow"])
def test_a_name_that_is_no_text_is_refused_whatever_serves(desk, kind):
    policy = {"kind": kind} | ({"challenger": 2} if kind == "shadow" else {})
    desk.machine.set_rollout(policy, "try", "quality manager")
    row = patient(random.Random(0)) | {"record_id": "half \ud800", "\ud800": "\ud800"}
    how = {"headers": {"content-type": "application/json"}}
    one = desk.send("POST", "/v1/records", content=json.dumps({"row": row}), **how)
    assert one.status_code == 422 and one.json()["field"] == "record_id"
    many = desk.send("POST", "/v1/records/batch?form=json", content=json.dumps([row]), **how)
    assert many.status_code == 200 and "record_id" in many.json()[0]["error"]
    desk.check()


def test_more_than_the_limit_is_cut_short(desk):
    parts = (b" " * 2**20 for _ in range(bounds().body // 2**20 + 2))
    assert desk.send("POST", "/v1/records/batch", content=parts).status_code == 413
    desk.check()


# From the document that the service gives of itself


def operations(desk):
    """What the document names."""
    schema = schemathesis.openapi.from_dict(desk.app.openapi())
    return [result.ok() for result in schema.get_all_operations()]


CONFORMS = (
    schemathesis.checks.not_a_server_error,
    conforms.status_code_conformance,
    conforms.content_type_conformance,
    conforms.response_schema_conformance,
)


@pytest.mark.slow
def test_every_answer_to_requests_of_the_openapi_document_is_described_in_it(desk):
    named = operations(desk)
    assert len(named) == len(OPERATIONS)
    each, result = max(2, MANY // 8 // len(named)), Counter()
    phases = (Phase.explicit, Phase.generate)
    free = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    modes = schemathesis.GenerationMode

    for operation in named:
        asked = st.one_of(*(operation.as_strategy(generation_mode=m) for m in modes))

        @how(max_examples=each, derandomize=True, phases=phases, **free)
        @given(case=asked)
        def ask(case):
            answer = case.call(base_url=str(desk.web.base_url))
            case.validate_response(answer, checks=CONFORMS)
            path = urlsplit(answer.request.url).path
            desk.judge(case.method, path, answer, {"body": case.body})
            result[answer.status_code // 100] += 1

        ask()
    assert result[2] and result[4] and not result[5]
    desk.check()


def test_after_all_that_the_service_works_and_its_store_opens_again(desk):
    row = json_values(NEXT[["record_id", "arrived", *STUDY.feature_names]].iloc[-1].to_dict())
    answer = desk.send("POST", "/v1/records", json={"row": row})
    assert answer.status_code == 200 and 0 < answer.json()["risk"] < 1
    assert desk.send("POST", "/v1/monitoring/runs", json={}).status_code == 200
    assert desk.send("GET", "/v1/audit").json() == {"faults": []}
    desk.check()
    held = desk.machine.table("records")
    desk.machine.close()
    with Machine("monica", desk.folder) as again:
        pd.testing.assert_frame_equal(again.table("records"), held)
        assert again.verify() == [] and again.status()["champion"] == 1

"""Small bodies that become large: an answer, at most 64 MB more memory, and /health meanwhile."""

import functools
import io
import json
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.long import LONG as CAMPAIGN
from support.long import much
from support.waiting import PATIENCE, UNPROXIED

from lm.core.errors import LMError
from lm.core.limits import Bounds, Overdue, check_time, deadline, quoted, timely
from lm.core.reader import ARROW, PARQUET, arrow_table, parquet_table, parse_csv, parse_json
from lm.core.serialization import from_arrow, to_arrow
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import check_rows
from lm.serve.client import Client
from lm.serve.inference_protocols import pack
from lm.serve.local import local_token

STUDY = load_study("monica")
ROWS = read_rows(STUDY)
SERVE = """
import json, sys
from pathlib import Path
from lm.serve.app import background
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.core.study import load_study; from lm.core.study_rows import read_rows

study, home = load_study("monica"), Path(sys.argv[1])
rows = read_rows(study)
with Machine("monica", home) as machine:
    model = fit(study, rows[rows["arrived"] < study.first_model])
    machine.registry.register(model, {}, {}, {}, "the first model")
    first = {"as_of": "1987-01-01", "action": "first", "reason": "first model"}
    machine.adopt(first | {"from_version": None, "to_version": 1})
    machine.warm()
    with background(machine) as url:
        print((home / "monica" / "service.json").read_text(), flush=True)
        sys.stdin.read()
"""
MOST = 64 * 10**6  # Bytes that a process may grow by
LONG = Bounds().body  # Bytes of the longest body


class Service:
    """A service in a process of its own, whose memory is looked at from outside."""

    def __init__(self, folder):
        command = [sys.executable, "-c", SERVE, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)
        payload = json.loads(self.process.stdout.readline())
        head = {"authorization": f"Bearer {local_token(payload['socket'])}"}
        self.web = httpx.Client(base_url=payload["url"], headers=head, **UNPROXIED)
        self.place = Path("/proc", str(self.process.pid))

    def memory(self, name):
        match = re.search(rf"{name}:\s+(\d+) kB", (self.place / "status").read_text())
        return int(match[1]) * 1024

    def send(self, path, kind, body, **head):
        """The answer, and by how many bytes the process grew at most; /health answers meanwhile."""
        (self.place / "clear_refs").write_text("5")  # The peak begins anew
        before, answers = self.memory("VmRSS"), []

        def post():
            answers.append(
                self.web.post(path, content=body, headers={"content-type": kind, **head})
            )

        thread = threading.Thread(target=post)
        thread.start()
        while thread.is_alive():
            assert self.web.get("/health/live", timeout=PATIENCE).status_code == 200
            thread.join(0.2)
        (answer,) = answers
        return answer, self.memory("VmHWM") - before


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("limits"))
    rows = ROWS[ROWS["arrived"] > STUDY.first_model].head(1000)
    rows = rows[["record_id", "arrived", *STUDY.feature_names]]
    content = to_arrow(rows)
    assert service.send("/v1/records/batch?on_arrival=true", ARROW, content)[0].status_code == 200
    yield service
    service.web.close()
    service.process.stdin.close()
    service.process.wait(PATIENCE)


# Bodies


def stream(table, size=None, **how):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**how)) as writer:
        writer.write_table(table, size)
    return sink.getvalue()


def parquet(table, **how):
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"compression": "zstd", "store_schema": False} | how)
    return sink.getvalue()


def shared(size, rows):
    """One text that stands in every row."""
    first = pa.array(np.zeros(rows, np.int32))
    return pa.table({"w": pa.DictionaryArray.from_arrays(first, pa.array(["x" * size]))})


def deltas():
    """A dictionary that grows with each batch."""
    sink, kind = io.BytesIO(), pa.dictionary(pa.int32(), pa.string())
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.ipc.new_stream(sink, pa.schema({"w": kind}), options=options) as writer:
        for n in range(1, 300):
            text = pa.array([f"{i:09}" for i in range(n * 10)])
            first = pa.array([0], pa.int32())
            column = pa.DictionaryArray.from_arrays(first, text)
            writer.write_batch(pa.record_batch({"w": column}))
    return sink.getvalue()


def views(size, rows, dictionary=False):
    """One text that stands in every row, as views of one buffer."""
    text = b"x" * size
    view = struct.pack("<i4sii", size, text[:4], 0, 0) * rows
    buffers = [None, pa.py_buffer(view), pa.py_buffer(text)]
    array = pa.Array.from_buffers(pa.string_view(), rows, buffers)
    if dictionary:
        array = pa.DictionaryArray.from_arrays(pa.array(range(rows), pa.int32()), array)
    return pa.table({"w": array})


def lies(body, claimed, size):
    """A compressed Arrow body whose buffers claim another size than they have."""
    assert struct.pack("<q", claimed) in body
    return body.replace(struct.pack("<q", claimed), struct.pack("<q", size))


def filled(head, part, tail=b"", size=LONG):
    """A body of `size` bytes."""
    return head + part * ((size - len(head) - len(tail)) // len(part)) + tail


ZEROS = pa.table({f"c{i}": np.zeros(100_000) for i in range(4)})
NULLS = pa.table({"n": pa.nulls(100_000_000)})
WIDE = pa.table({f"c{i}": [0.0] for i in range(9000)})
TALL = pa.table({"w": [f"{'x' * 9000}{n}" for n in range(9000)]})
LISTS = pa.table({"w": pa.array([[0.0] * 10**6])})
MAPS = pa.map_(pa.string(), pa.float64())
EMOJI = "\U0001f600".encode()
ARROWS = {
    "zeros": lambda: stream(ZEROS, compression="zstd"),
    "zeros, lz4": lambda: stream(ZEROS, compression="lz4"),
    "nulls": lambda: stream(NULLS),
    "no columns": lambda: stream(pa.table({"n": pa.nulls(10**9)}).select([])),
    "columns": lambda: stream(WIDE),
    "a shared text": lambda: stream(shared(90_000, 9000)),
    "a long shared text": lambda: stream(shared(3 * 10**6, 9000)),
    "batches": lambda: stream(pa.table({f"c{i}": np.zeros(2000) for i in range(30)}), 1)[:LONG],
    "deltas": lambda: deltas(),
    "lists": lambda: stream(LISTS, compression="zstd"),
    "texts": lambda: stream(TALL, compression="zstd"),
    "run ends": lambda: stream(pa.table({"w": pa.RunEndEncodedArray.from_arrays([10**9], [0.0])})),
    "views": lambda: stream(views(90_000, 9000)),
    "words that are views": lambda: stream(views(90_000, 9000, dictionary=True)),
    "large texts": lambda: stream(
        TALL.cast(pa.schema({"w": pa.large_string()})), compression="lz4"
    ),
    "wide bytes": lambda: stream(
        pa.table({"w": pa.array([bytes(10**6)] * 900, pa.binary(10**6))}), 1
    )[:LONG],
    "maps": lambda: stream(
        pa.table({"w": pa.array([[("a", 0.0)] * 10**6], MAPS)}), compression="zstd"
    ),
    "records": lambda: stream(
        pa.table({"w": pa.array([{"a": [{"b": 0.0}] * 10**6}])}), compression="zstd"
    ),
    "a size that lies": lambda: lies(
        stream(ZEROS.slice(0, 9000), compression="zstd"), 72_000, 2**40
    ),
    "a size below 0": lambda: lies(
        stream(ZEROS.slice(0, 9000), compression="lz4"), 72_000, -(2**62)
    ),
    "words anew": lambda: b"".join(
        [stream(shared(90_000, 2), compression="zstd")[:-8]] * 200 + [b"\xff" * 4 + bytes(4)]
    ),
    "a head": lambda: stream(ZEROS.slice(0, 1).replace_schema_metadata({"m": "x" * 3 * 10**6})),
}
PARQUETS = {
    "zeros": lambda: parquet(ZEROS),
    "nulls": lambda: parquet(NULLS),
    "columns": lambda: parquet(WIDE),
    "a shared text": lambda: parquet(shared(90_000, 9000)),
    "a long shared text": lambda: parquet(shared(10**8, 9000)),
    "texts": lambda: parquet(TALL, use_dictionary=False),
    "additions": lambda: parquet(
        TALL, use_dictionary=False, column_encoding={"w": "DELTA_BYTE_ARRAY"}
    ),
    "fixed": lambda: parquet(pa.table({"w": pa.array([b"x" * 10**6] * 900, pa.binary(10**6))})),
    "lists": lambda: parquet(LISTS),
    "flags": lambda: parquet(pa.table({"w": np.zeros(10**7, bool)}), use_dictionary=False),
    "repeated numbers": lambda: parquet(pa.table({"w": np.zeros(10**7, np.int64)})),
    "steps": lambda: parquet(
        pa.table({"w": np.arange(9 * 10**6)}),
        use_dictionary=False,
        column_encoding={"w": "DELTA_BINARY_PACKED"},
    ),
    "texts, brotli": lambda: parquet(TALL, use_dictionary=False, compression="brotli"),
    "texts, gzip": lambda: parquet(TALL, use_dictionary=False, compression="gzip"),
    "texts, snappy": lambda: parquet(
        TALL.slice(0, 900), use_dictionary=False, compression="snappy"
    ),
    "a foot": lambda: parquet(ZEROS.slice(0, 1).replace_schema_metadata({"m": "x" * 3 * 10**6})),
    "a name": lambda: parquet(pa.table({"x" * 10**6: [0.0]})),
    "groups": lambda: parquet(ZEROS.slice(0, 20_000), row_group_size=10)[-LONG:],
    "small pages": lambda: parquet(ZEROS.slice(0, 9000), data_page_size=1, write_batch_size=1),
}
CSVS = {
    "columns": filled(b"", b","),
    "names": filled(b"", b"a,"),
    "rows": filled(b"a,b\n", b"1,\n"),
    "cells": filled(b",".join(b"c%d" % i for i in range(900)) + b"\n", b"," * 899 + b"\n"),
    "an open quote": filled(b'a,b\n1,"', b"x\n"),
    "quoted lines": filled(b'a,b\n1,"', b'\n""'),
    "fields over lines": filled(b'a,b\n"\n"', b',"\n"'),
    "a long value": filled(b"a,b\n1,", b"x"),
    "wide letters": filled(b"a,b\n" + EMOJI, b",x\n"),
    "NUL": filled(b"a,b\n", b"\0"),
    "UTF-16": "a,b\n1,2\n".encode("utf-16") * 10**5,
    "BOMs": filled(b"\xef\xbb\xbfa,b\n", b"\xef\xbb\xbf,1\n"),
    "quotes": filled(b"a,b\n", b'"""",""\n'),
    "carriage returns": filled(b"a,b\r", b"1,2\r"),
}
JSONS = {
    "empty rows": filled(b"[{}", b",{}", b"]"),
    "empty lists": filled(b"[[]", b",[]", b"]"),
    "numbers": filled(b"[0", b",0", b"]"),
    "one-letter fields": filled(b"[", b'{"a":0},', b"{}]"),
    "deep": filled(b"", b"["),
    "deep rows": filled(b"[", b'{"a":{"a":{"a":{}}}},', b"{}]"),
    "one field twice": filled(b"[{", b'"a":0,', b'"a":0}]'),
    "many fields": b"[{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}]",
    "a long text": filled(b'["', b"x", b'"]'),
    "escapes": filled(b'["', b"\\u0000", b'"]'),
    "an open text": filled(b'["', b'\\"'),
    "quotes": filled(b"", b'"'),
    "texts": filled(b'["', b'","'),
    "wide letters": filled(b'["' + EMOJI + b'"', b',"abcdefg"', b"]"),
    "surrogates": filled(b'["', b'\\ud800","', b'"]'),
    "digits": filled(b"[", b"9", b"]"),
    "numbers of many digits": filled(b"[0", b"," + b"9" * 4000, b"]"),
    "fractions": filled(b"[0.", b"0", b"1]"),
    "exponents": filled(b"[1e", b"9", b"]"),
    "infinite": filled(b"[0", b",1e400", b"]"),
    "NaN": filled(b"[0", b",NaN", b"]"),
    "spaces": filled(b"", b" "),
    "lines": filled(b"", b'{"a":0}\n'),
    "many fields of one name": b"[" + filled(b"{", b'"\\u0061":0,', b'"a":0}]', LONG - 1),
    "deep and closed": b"[" * 10**6 + b"]" * 10**6,
    "UTF-16": filled("[0".encode("utf-16"), ",0".encode("utf-16-le"), "]".encode("utf-16-le")),
}


def tensors(kind, size, raw, many=1):
    """A request of one binary tensor, `many` times."""
    one = {"name": "age", "datatype": kind, "shape": [size]}
    one["parameters"] = {"binary_data_size": len(raw) // many}
    head = json.dumps({"inputs": [one] * many}).encode()
    return head + raw, {"inference-header-content-length": str(len(head))}


BINARIES = {
    "flags": tensors("BOOL", LONG - 1000, bytes(LONG - 1000)),
    "flags that are fewer": tensors("BOOL", 10, bytes(LONG - 1000)),
    "empty words": tensors("BYTES", 10**6, bytes(4 * 10**6)),
    "a word of all": tensors("BYTES", 1, pack(["x" * (LONG - 1000)], "BYTES")),
    "a word longer than all": tensors("BYTES", 1, struct.pack("<I", 2**32 - 1) + b"x"),
    "a negative shape": tensors("INT8", -1, bytes(10)),
    "a shape of more digits": tensors("INT8", 10**400, bytes(10)),
    "many inputs": tensors("INT8", 1, bytes(20_000), 20_000),
}
INFER = "/v2/models/monica/infer"
BODIES = {
    **{f"Arrow, {k}": ("/v1/records/batch", ARROW, v, {}) for k, v in ARROWS.items()},
    **{f"Parquet, {k}": ("/v1/outcomes/batch", PARQUET, v, {}) for k, v in PARQUETS.items()},
    **{f"CSV, {k}": ("/v1/records/batch", "text/csv", v, {}) for k, v in CSVS.items()},
    **{f"JSON, {k}": ("/v1/records/batch", "application/json", v, {}) for k, v in JSONS.items()},
    **{f"tensors, {k}": (INFER, "application/octet-stream", *v) for k, v in BINARIES.items()},
}
for key in ("empty rows", "numbers", "deep rows", "many fields", "wide letters", "infinite"):
    whole = JSONS[key][: LONG - 40]
    rows = whole[: whole.rindex(b",")] + b"]"
    asked = b'{"rows":' + rows + b"}", b'{"inputs":' + rows + b"}"
    BODIES[f"predict, {key}"] = ("/v1/predictions", "application/json", asked[0], {})
    BODIES[f"invocations, {key}"] = ("/invocations", "application/json", asked[1], {})
    BODIES[f"infer, {key}"] = (INFER, "application/json", asked[1], {})
SPLIT = b'{"dataframe_split":{"columns":["age"],"data":' + JSONS["empty lists"][: LONG - 100]
BODIES["invocations, split"] = (
    "/invocations",
    "application/json",
    SPLIT[: SPLIT.rindex(b",")] + b"]}}",
    {},
)
for coding in ("gzip", "deflate", "br", "zstd", "gzip, identity", "GZIP", "chunked"):
    head = {"content-encoding": coding}
    BODIES[f"coded, {coding}"] = ("/v1/records/batch", "text/csv", b"\x1f\x8b" * 10**5, head)
BODIES["invocations, CSV rows"] = ("/invocations", "text/csv", CSVS["rows"], {})
BODIES["a record of brackets"] = ("/v1/records", "application/json", b"[" * 10**6, {})
BODIES["a multipart body"] = (
    "/v1/records",
    "multipart/form-data; boundary=x",
    b"--x\r\n" * 10**5,
    {},
)


QUICK = (  # One of each kind; `make campaigns` sends all
    *("Arrow, zeros", "Arrow, a long shared text", "Arrow, views", "Parquet, a shared text"),
    *("Parquet, groups", "CSV, an open quote", "JSON, empty rows", "JSON, deep and closed"),
    *("tensors, a word of all", "invocations, split", "infer, infinite", "coded, gzip"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES if CAMPAIGN else QUICK)
def test_a_body_that_would_become_large_is_refused_in_little_memory(service, name):
    path, kind, body, head = BODIES[name]
    body = body() if callable(body) else body
    assert len(body) <= LONG, len(body)
    answer, grown = service.send(path, kind, body, **head)
    assert grown <= MOST, f"{grown / 1e6:.0f} MB: {answer.text[:200]}"
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert len(answer.content) < 3000


@pytest.mark.parametrize(
    "kind", [ARROW, PARQUET, "text/csv", "application/json"] if CAMPAIGN else ["text/csv"]
)
@pytest.mark.parametrize("how", ["stated", "in pieces"])
def test_32_mebibytes_are_refused_in_little_memory(service, kind, how):
    part = {"text/csv": b"1,2\n", "application/json": b"[],"}.get(kind, bytes(4))
    body = filled(b"", part, size=2**25)
    pieces = (body[at : at + 2**16] for at in range(0, len(body), 2**16))
    answer, grown = service.send("/v1/records/batch", kind, body if how == "stated" else pieces)
    assert answer.status_code == 413 and grown <= MOST
    assert answer.json()["code"] == "LM-110"


def many(rows):
    """So many new patients."""
    source = ROWS[ROWS["arrived"] > STUDY.first_model]
    frame = source.sample(rows, replace=True, random_state=1).reset_index(drop=True)
    frame["record_id"] = [f"many-{i}" for i in range(rows)]
    return frame[["record_id", "arrived", *STUDY.feature_names]]


@pytest.mark.slow
def test_as_many_rows_as_a_request_may_bring_are_answered_in_little_memory(service):
    frame = many(Bounds().rows)
    asked = json.loads(frame[STUDY.feature_names].to_json(orient="records"))
    bodies = {
        "/v1/records/batch?on_arrival=true": (ARROW, to_arrow(frame)),
        "/v1/predictions": (
            "application/json",
            json.dumps({"rows": asked, "explain": True}).encode(),
        ),
        "/invocations": ("text/csv", frame[STUDY.feature_names].to_csv(index=False).encode()),
    }
    for path, (kind, body) in bodies.items() if CAMPAIGN else list(bodies.items())[:1]:
        answer, grown = service.send(path, kind, body)
        assert answer.status_code == 200, answer.text[:300]
        assert grown <= MOST, f"{path}: {grown / 1e6:.0f} MB"
        if kind == ARROW:
            assert (from_arrow(answer.content)["error"] == "").all()


# What is refused without a service


DAMAGED = ("zeros", "zeros, lz4", "nulls", "columns", "a shared text", "views", "small pages")


@functools.cache
def bomb(bombs, name):
    return {"Arrow": ARROWS, "Parquet": PARQUETS}[bombs][name]()


@pytest.mark.slow
@settings(max_examples=much(60, 2000), deadline=None)
@given(
    st.binary(max_size=400),
    st.integers(0, 2**16),
    st.sampled_from([*ARROWS, *PARQUETS] if CAMPAIGN else DAMAGED),
)
def test_damaged_bombs_are_one_sentence_and_take_no_room(noise, at, name):
    """Bytes of a bomb replaced, in places that often are its heads."""
    for kind, bombs, read in (
        ("Arrow", ARROWS, arrow_table),
        ("Parquet", PARQUETS, parquet_table),
    ):
        if name in bombs:
            body = bytearray(bomb(kind, name))
            at = at % len(body)
            for place in (at, len(body) - 1 - at):
                body[place : place + 1] = noise[:1] or b"\xff"
            try:
                read(bytes(body))
            except LMError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
    assert pa.total_allocated_bytes() < 2**27


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=9)
JSONISH = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(JSONISH, st.booleans())
def test_a_long_document_within_the_limits_is_read_as_a_short_one(value, plain):
    text = json.dumps([value], ensure_ascii=plain, allow_nan=False)
    long = text[:-1] + " " * 2**16 + "]"
    assert parse_json(long) == parse_json(text) == json.loads(text)


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.text() | st.binary() | st.integers(), st.lists, max_leaves=9))
def test_a_value_is_quoted_briefly_and_as_python_would(value):
    text = quoted(value)
    assert len(text) <= 60 and (text == repr(value) or text.endswith("..."))


@pytest.mark.parametrize("read", [parse_csv, parse_json, check_rows])
def test_work_stops_at_its_deadline(read):
    rows = many(2000)
    inputs = {
        parse_csv: lambda: parse_csv(rows.to_csv(index=False).encode()),
        parse_json: lambda: parse_json(rows.to_json(orient="records", date_format="iso").encode()),
        check_rows: lambda: check_rows(STUDY, rows),
    }[read]
    with deadline(60):
        assert len(inputs())
    with deadline(0), pytest.raises(Overdue, match="takes longer than 0 seconds"):
        inputs()
    check_time()
    assert list(timely(range(3))) == [0, 1, 2]


@pytest.mark.slow
def test_a_client_sends_more_rows_than_one_request_may_bring_in_parts(service, monkeypatch):
    monkeypatch.setenv("LM_LIMIT_ROWS", "400")
    url = str(service.web.base_url).rstrip("/")
    client = Client(url, token=service.web.headers["authorization"].removeprefix("Bearer "))
    frame = many(1001).assign(record_id=[f"part-{i}" for i in range(1001)]).astype(object)
    frame.loc[3, "sex"] = "x"
    result = client.receive_many(frame, on_arrival=True)
    assert len(result) == 1001 and (result["error"] == "").sum() == 1000
    assert result["error"].iloc[-1] and set(result["record_id"]) == set(frame["record_id"])

"""The same patient gives the same risk to the bit, or a refusal, at every path.

What a format cannot express: CSV and the form know text only, so no booleans, and a category 10.0
of a column of floats is another word than 10 there; JSON has no NaN, no infinity and no times but
text; Arrow, Parquet and tensors have no whole numbers beyond 64 bits. Longer: LM_DOORS=5000."""

import csv
import io
import itertools
import json
import math
import os
import threading
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone

import fakeredis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from support import outcomes as slow
from support import values as oracle
from support.waiting import PATIENCE

from lm.cli.cli import main
from lm.core.errors import LMError
from lm.core.reader import ARROW, PARQUET, read_table
from lm.core.study import load_study
from lm.core.study_rows import BadRows, read_rows
from lm.core.validation import RejectedRecord
from lm.data.source import read_file
from lm.jobs.jobs import Jobs
from lm.machine.machine import Machine
from lm.model.checked_rows import CheckedModel
from lm.model.onnx import Loaded, Portable, export
from lm.model.predict import fit, predict
from lm.serve.app import background, create_app
from lm.serve.streams import ask
from lm.serve.worker import Worker
from lm.ui.patients_actions import EntryForm, FileUpload
from lm.ui.patients_state import PatientsState

EXAMPLES = int(os.environ.get("LM_DOORS", 16))
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
FAST = settings(
    max_examples=EXAMPLES, phases=NO_SHRINKING, deadline=None, suppress_health_check=SLOW
)
REFUSED = "refused"
CATEGORIES = ("grade", "smoker", "place")
STUDY = """
title = "Paths"
question = "Is it the same at every path?"
unit_of_time = "year"
not_for = ["anything but a test"]
first_model = 2020-01-01
every = 91
rows = "rows.csv"
person = "nr"
missing_words = ["-", "n.k."]
time_zone = "Europe/Berlin"

[outcome]
name = "event within 30 days"
event = "event"
horizon_days = 30

[[features]]
name = "age"
kind = "number"
range = [0, 120]
missing = "refused"

[[features]]
name = "excess"
kind = "number"
range = [-30.5, 1000000]

[[features]]
name = "crp"
kind = "number"
range = [0, 1000]
transform = "log1p"

[[features]]
name = "grade"
kind = "level"
levels = ["1", "2", "10"]

[[features]]
name = "smoker"
kind = "level"
levels = ["true", "false"]

[[features]]
name = "place"
kind = "level"
levels = ["caf\u00e9", "NA", "0.5"]
missing = "refused"
"""


def write_study(folder):
    """A study with a table of its own."""
    rng, n = np.random.default_rng(1), 400
    folder.mkdir()
    (folder / "study.toml").write_text(STUDY, encoding="utf-8")
    arrived = pd.Timestamp("2018-01-01") + pd.to_timedelta(rng.integers(0, 600, n), unit="D")
    age, sick = rng.integers(20, 90, n), rng.random(n)
    event = np.where(sick < age / 200, (arrived + pd.Timedelta(days=9)).strftime("%Y-%m-%d"), "")
    table = {"record_id": [f"p{i}" for i in range(n)], "arrived": arrived.strftime("%Y-%m-%d")}
    table |= {"age": age, "excess": rng.normal(0, 5, n).round(2), "crp": rng.integers(0, 300, n)}
    table |= {
        "grade": rng.choice(["1", "2", "10"], n),
        "smoker": rng.choice(["true", "false"], n),
    }
    table |= {"place": rng.choice(["caf\u00e9", "NA", "0.5"], n), "event": event}
    table |= {"followed_until": (arrived + pd.Timedelta(days=40)).strftime("%Y-%m-%d")}
    pd.DataFrame(table).to_csv(folder / "rows.csv", index=False)
    return load_study(folder)


class House:
    """One machine with all its paths."""

    def __init__(self, folder):
        self.folder, self.study = folder, write_study(folder / "paths")
        self.model = fit(self.study, read_rows(self.study))
        self.machine = Machine(self.study, folder / "home")
        self.machine.registry.register(self.model, {}, {}, {}, "the first model")
        first = {"as_of": "2020-01-01", "action": "first", "reason": "first model"}
        self.machine.adopt(first | {"from_version": None, "to_version": 1})
        self.app = create_app(self.machine, Jobs(folder / "jobs", limit=0), None)
        self.web = TestClient(self.app)
        self.state = PatientsState(self.machine, self.study)
        self.rules = (self.study.missing_words, self.study.time_zone)
        self.loaded = CheckedModel(self.model, *self.rules)
        self.portable = Loaded(self.model, *self.rules)
        self.file = Portable(export(self.model, "paths", 1, 0.95, *self.rules))
        self.redis = fakeredis.FakeRedis()
        self.count = itertools.count()

    def expected(self, row):
        """What the oracle and the model's table of many say."""
        try:
            oracle.moment(row["arrived"], self.study.time_zone)
            result = oracle.features(self.study, row)
        except oracle.No:
            return REFUSED
        return float(predict(self.model, pd.DataFrame([result]))["risk"].iloc[0])

    def named(self, row):
        """The row with a name that no other has."""
        return {"record_id": f"r{next(self.count)}"} | row


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    house = House(tmp_path_factory.mktemp("paths"))
    with house.machine:
        listener = Worker(house.machine, house.redis, name="one", patience=5)
        thread = threading.Thread(target=listener.run)
        thread.start()
        yield house
        listener.stop.set()
        thread.join(30)
    counts = listener.counts
    assert not thread.is_alive() and not counts["dead"] and not counts["late"], counts


# -- How each format writes a value -----------------------------------------------------------


class Inexpressible(Exception):
    """The format cannot say it."""


def as_text(value, name=""):
    """For CSV and the form."""
    pointed = isinstance(value, float) and value.is_integer() and name in CATEGORIES
    if isinstance(value, bool) or pointed:
        raise Inexpressible
    if value is None or value != value:
        return ""
    return value.isoformat() if isinstance(value, date) else str(value)


def as_csv(*rows):
    """A CSV file."""
    out = io.StringIO(newline="")
    table = [[as_text(value, name) for name, value in row.items()] for row in rows]
    csv.writer(out).writerows([list(rows[0]), *table])
    return out.getvalue().encode()


def as_json_value(value):
    """For all that speaks JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Inexpressible
    return value.isoformat() if isinstance(value, date) else value


def as_json(row):
    """An object."""
    return {name: as_json_value(value) for name, value in row.items()}


def as_table(*rows):
    """Columns with the types of their values."""
    try:
        return pa.table({name: pa.array([row[name] for row in rows]) for name in rows[0]})
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        raise Inexpressible from None


def written(table, start):
    """The bytes of an Arrow stream or file, or of Parquet."""
    sink = io.BytesIO()
    if start is pq.write_table:
        pq.write_table(table, sink)
    else:
        with start(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def as_tensors(*rows):
    """The inputs of the Open Inference Protocol."""
    tensors = []
    for name in rows[0]:
        values = [as_json_value(row[name]) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        names = {str: "BYTES", float: "FP64", int: "INT64", bool: "BOOL"}
        if len(kinds) > 1 or any(type(v) is int and abs(v) >= 2**63 for v in values):
            raise Inexpressible
        kind = names[kinds.pop()] if kinds else "BYTES"
        tensors.append({"name": name, "datatype": kind, "shape": [len(rows)], "data": values})
    return tensors


# -- The paths: each gives a risk or REFUSED -------------------------------------------------


def answered(answer, risk):
    """The risk in an answer of the service; a refusal has one sentence."""
    assert answer.status_code in (200, 400, 404, 409, 422), (answer.status_code, answer.text)
    content = answer.json()
    if answer.status_code == 200:
        return risk(content)
    result = content.get("error") or content.get("message")
    assert result and "\n" not in result and "Traceback" not in result and len(result) < 1000, (
        result
    )
    return REFUSED


def first_of(result):
    """Of a batch."""
    if result["error"]:
        assert "Traceback" not in result["error"] and len(result["error"]) < 1000
        return REFUSED
    return result["risk"]


def post(house, path, risk, **how):
    return answered(house.web.post(path, **how), risk)


def batch(house, content, kind):
    """`POST /v1/records/batch`."""
    inputs = {"content": content, "headers": {"content-type": kind}}
    path = "/v1/records/batch?form=json"
    return post(house, path, lambda result: first_of(result[0]), **inputs)


def study_table(name, write):
    """The study's own table."""

    def middleware(house, row):
        path = house.folder / "paths" / name
        path.write_bytes(write(house.named(row) | {"event": None, "followed_until": None}))
        try:
            rows = read_rows(replace(house.study, rows=path))
        except LMError as error:
            assert "\n" not in str(error)
            return REFUSED
        return float(predict(house.model, rows)["risk"].iloc[0])

    return middleware


def score_file(end, write):
    """What `lm predict` does with a file."""

    def middleware(house, row):
        path = house.folder / f"ward{end}"
        path.write_bytes(write(house.named(row)))
        return first_of(house.machine.receive_many(read_file(house.study, path)).iloc[0])

    return middleware


def in_process(house, row):
    try:
        return house.machine.receive(house.named(row))["risk"]
    except RejectedRecord as error:
        assert error.rule and "\n" not in str(error)
        return REFUSED


def one_of_many(house, row):
    """The vectorised path: more than 32 patients at once."""
    try:
        risks = house.machine.score([row] * 40)["risk"]
    except RejectedRecord:
        return REFUSED
    assert risks.nunique() == 1
    return float(risks.iloc[0])


def form(house, row):
    """The page's form."""
    entry = EntryForm(house.state)
    for name, value in house.named(row).items():
        entry.put(name, as_text(value, name))
    entry.send()
    return entry.answer["risk"] if entry.answer else REFUSED


def page_file(name, write):
    """The page's upload."""

    def middleware(house, row):
        state, upload = house.state, FileUpload(house.state)
        upload.start(name, write(house.named(row)))
        while upload.more:
            state.tick()
        assert not state.failed, state.message
        return first_of(upload.results[0])

    return middleware


def broker(house, row):
    """Redis Streams, with the listener's own loop at the other end."""
    try:
        return ask(house.redis, "paths", as_json(house.named(row)), timeout=PATIENCE)["risk"]
    except RejectedRecord as error:
        assert error.rule and "\n" not in str(error)
        return REFUSED


def invocations(form_of):
    def middleware(house, row):
        body = form_of({name: as_json_value(value) for name, value in row.items()})
        return post(house, "/invocations", lambda result: result["predictions"][0]["risk"],
                    json=body | {"params": {"details": True}})  # fmt: skip

    return middleware


def invoked_csv(house, row):
    head = {"content-type": "text/csv"}
    risk = lambda result: result["predictions"][0][1]  # noqa: E731
    return post(house, "/invocations", risk, content=as_csv(row), headers=head)


def inferred(stored):
    def middleware(house, row):
        row = house.named(row) if stored else {k: v for k, v in row.items() if k != "arrived"}
        outputs = lambda result: result["outputs"][0]["data"][0]  # noqa: E731
        return post(house, "/v2/models/paths/infer", outputs, json={"inputs": as_tensors(row)})

    return middleware


def elsewhere(asked):
    """What leaves this program: MLflow's function, `load_model`, the ONNX file."""

    def middleware(house, row):
        try:
            return float(getattr(house, asked).predict_proba([row])[0][1])
        except RejectedRecord as error:
            assert error.rule and "\n" not in str(error)
            return REFUSED

    return middleware


def pyfunc(house, row):
    """What MLflow loads."""
    try:
        return float(house.loaded.predict([row])[0][1])
    except RejectedRecord:
        return REFUSED


def arrow(*rows):
    return written(as_table(*rows), pa.ipc.new_stream)


def parquet(*rows):
    return written(as_table(*rows), pq.write_table)


def json_rows(row):
    return json.dumps([as_json(row)]).encode()


RISK = lambda result: result["risk"]  # noqa: E731
ENTRY_POINTS = {
    "receive": in_process,
    "score, 40 at once": one_of_many,
    "study table, CSV": study_table("other.csv", as_csv),
    "study table, Parquet": study_table("other.parquet", lambda row: parquet(row)),
    "lm predict, CSV": score_file(".csv", as_csv),
    "lm predict, Parquet": score_file(".parquet", parquet),
    "lm predict, Arrow": score_file(".arrow", lambda row: written(as_table(row), pa.ipc.new_file)),
    "lm predict, JSON": score_file(".json", json_rows),
    "REST": lambda h, r: post(h, "/v1/records", RISK, json={"row": as_json(h.named(r))}),
    "REST, not stored": lambda h, r: post(
        h, "/v1/predictions", lambda result: result[0]["risk"], json={"rows": [as_json(r)]}
    ),
    "batch, JSON": lambda h, r: batch(h, json_rows(h.named(r)), "application/json"),
    "batch, CSV": lambda h, r: batch(h, as_csv(h.named(r)), "text/csv"),
    "batch, Arrow": lambda h, r: batch(h, arrow(h.named(r)), ARROW),
    "batch, Parquet": lambda h, r: batch(h, parquet(h.named(r)), PARQUET),
    "invocations, split": invocations(
        lambda r: {"dataframe_split": {"columns": list(r), "data": [list(r.values())]}}
    ),
    "invocations, records": invocations(lambda r: {"dataframe_records": [r]}),
    "invocations, inputs": invocations(lambda r: {"inputs": {k: [v] for k, v in r.items()}}),
    "invocations, CSV": invoked_csv,
    "inference": inferred(False),
    "pyfunc": pyfunc,
    "load_model": elsewhere("portable"),
    "load_model, ONNX": elsewhere("file"),
    "inference, stored": inferred(True),
    "broker": broker,
    "form": form,
    "page, CSV": page_file("ward.csv", as_csv),
    "page, Parquet": page_file("ward.parquet", parquet),
}

# -- Patients ---------------------------------------------------------------------------------

NASTY = (
    *(
        "120_80",
        "\uff16\uff13",
        "\u0663",
        "0x10",
        "nan",
        "inf",
        "-inf",
        "1,5",
        "1.000,5",
        "5.",
        ".5",
    ),
    *(
        " 5 ",
        "\u00a05",
        "5\u200b",
        "+5",
        "--5",
        "1e2",
        "1E+2",
        "1e-3",
        "1e400",
        "1e-400",
        "-0",
        "e5",
    ),
    *(
        ".",
        "",
        " ",
        "-",
        " - ",
        "n.k.",
        "N.K.",
        "NA",
        "null",
        "None",
        "true",
        "True",
        "TRUE",
        "yes",
    ),
    *(
        "cafe\u0301",
        "caf\u00e9 ",
        "Caf\u00e9",
        "=1+1",
        "5\n",
        "5;6",
        '"5"',
        "0.5",
        "0.50",
        "1",
        "01",
    ),
    *(
        "2",
        "10",
        "1.0",
        "10.0",
        "63",
        "120",
        "120.0000001",
        "-30.5",
        "-30.51",
        "999999.999999",
        "0",
    ),
    *(
        "False",
        "false",
        "x" * 200,
        "5\0",
        "\ufeff5",
        "9" * 25,
        "0." + "1" * 25,
        "1e",
        "1e+",
        "\u2212" + "5",
    ),
)
NUMBERS = st.one_of(
    st.integers(-40, 1100),
    st.floats(-40, 1100),
    st.sampled_from([-0.0, 0, 1, 2, 10, 1.0, 10.0, 0.5, 120, 120.5, 2**53, 2**70, -30.5, 1e300]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.integers(0, 130).map(str),
    st.floats(0, 130).map(repr),
    st.text("0123456789.eE+-_ \u0660", max_size=6),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=4),
)
VALUES = st.one_of(TEXTS, NUMBERS, st.booleans(), st.none())
ARRIVALS = st.one_of(
    st.dates(date(1990, 1, 1), date(2025, 1, 1)),
    st.datetimes(datetime(1990, 1, 1), datetime(2025, 1, 1)).map(
        lambda t: t.replace(microsecond=0, tzinfo=timezone(timedelta(hours=2)))
    ),
    st.datetimes(datetime(1990, 1, 1), datetime(2025, 1, 1)).map(
        lambda t: t.replace(microsecond=0).isoformat(" ")
    ),
    st.sampled_from(
        [
            *("2024-05-31", " 2024-05-31 ", "2024-05-31T10:00", "2024-05-31T10:00:00+02:00"),
            *("31/05/2024", "05/31/2024", "2024-02-30", "now", "today", "20240531", "24-05-31"),
            *(
                "2024-5-1",
                "2024-03-31T02:30",
                "2023-10-29T02:30",
                "",
                "-",
                None,
                1717113600,
                2024.0,
            ),
            *("2024-05-31T25:00", "2024-05-31T10", "\uff12024-05-31", "2024-W22-5", "1e9", True),
        ]
    ),
)
SANE = {
    "age": st.sampled_from([63, 63.0, "63", "6.3e1"]),
    "excess": st.sampled_from([-1.5, "-1.5", None, ""]),
    "crp": st.sampled_from([0, "0", 12.25, None]),
    "grade": st.sampled_from(["1", 2, 10.0, None]),
    "smoker": st.sampled_from([True, "false", None, "-"]),
    "place": st.sampled_from(["caf\u00e9", "cafe\u0301", "NA", 0.5]),
}


@st.composite
def patients(draw):
    """Mostly sane patients, with one, two or no strange values."""
    row = {"arrived": draw(ARRIVALS) if draw(st.booleans()) else date(2020, 5, 31)}
    row |= {name: draw(values) for name, values in SANE.items()}
    for name in draw(st.lists(st.sampled_from(list(SANE)), max_size=2)):
        row[name] = draw(VALUES)
    return row


def same(name, result, want):
    """To the bit; a file in another runtime adds up in another order."""
    if "ONNX" in name and REFUSED not in (result, want):
        return abs(result - want) < 1e-12
    return result == want


SLOWER = [name for name in ENTRY_POINTS if name.startswith(("lm predict", "batch", "page", "form"))]
SLOWER += ["inference, stored"]


def judge(house, row, entry_points):
    """Every path that can take the row agrees with the oracle."""
    want, results = house.expected(row), {}
    for name in entry_points:
        untold = name == "inference"  # It needs no arrival
        result = row | {"arrived": "2020-05-31"} if untold else row
        try:
            results[name] = (
                ENTRY_POINTS[name](house, row),
                house.expected(result) if result != row else want,
            )
        except Inexpressible:
            continue
    wrong = {name: result for name, result in results.items() if not same(name, *result)}
    assert not wrong, (row, want, wrong)
    assert len(results) >= 3


@pytest.mark.slow
@FAST
@given(patients(), st.lists(st.sampled_from(SLOWER), min_size=2, max_size=2, unique=True))
def test_every_entry_point_gives_the_same_risk_or_a_refusal(house, row, slower):
    quick = [name for name in ENTRY_POINTS if name not in SLOWER]
    judge(house, row, quick + slower)


def test_every_strange_text_means_the_same_in_every_table(house):
    sane = {"arrived": "2020-05-31", "age": "63", "excess": "1.5", "crp": "2", "grade": "1"}
    sane |= {"smoker": "true", "place": "NA"}
    fields = ("age", "crp", "smoker", "place", "grade")
    texts = [text for text in NASTY if "\0" not in text]  # NUL makes a whole CSV file no text
    rows = [sane | {name: text} for text in texts for name in fields]
    rows += [sane | {"arrived": text} for text in ("2024-02-30", "now", "2024-05-31T10:00Z", "")]
    want = [house.expected(row) for row in rows]
    assert 20 < want.count(REFUSED) < len(want) - 20
    writers = {"text/csv": as_csv, PARQUET: parquet, ARROW: arrow}
    writers |= {"application/json": lambda *rows: json.dumps(rows).encode()}
    for kind, write in writers.items():
        named = [house.named(row) for row in rows]
        head = {"content-type": kind}
        answer = house.web.post("/v1/records/batch?form=json", content=write(*named), headers=head)
        results = {row["record_id"]: first_of(row) for row in answer.json()}
        assert [results[row["record_id"]] for row in named] == want, kind
    path = house.folder / "paths" / "strange.csv"
    path.write_bytes(as_csv(*[row | {"event": "", "followed_until": ""} for row in named]))
    lines = map(str, read_table(path).numbers)  # Some values hold line ends
    places = dict(zip(lines, want, strict=True))
    with pytest.raises(BadRows) as error:
        read_rows(replace(house.study, rows=path))
    bad = {place.removeprefix("line ") for place, *_ in error.value.faults}
    assert bad == {place for place, result in places.items() if result == REFUSED}


# -- Outcomes ---------------------------------------------------------------------------------

CAME = "2020-05-31T10:00:00Z"  # The horizon of 30 days passes on 30 June
DATES = st.sampled_from(
    [
        *(None, "", "-", "2020-05-30", "2020-05-31", "2020-05-31T09:00:00Z", "2020-06-10"),
        *("2020-06-10T10:00:00+02:00", "2020-06-29", "2020-06-30", "2020-07-01", "2020-08-01"),
        *("2142-01-01", "10/06/2020", "now", 1591747200, True, "2020-06-10T25:00"),
    ]
)
LABELS = st.sampled_from([1, 0, None, 1.0, 2, "1", True, "yes", -1])
OUTCOMES = st.fixed_dictionaries(
    {"y": LABELS, "known_at": DATES, "event": DATES, "followed_until": DATES}
)


def verdict(answer):
    """Whether an outcome was taken by a batch."""
    assert answer.status_code in (200, 400, 404, 409, 422), answer.text
    payload = answer.json()
    return answer.status_code == 200 and not payload.get("refused")


def outcome_entries(house, result):
    """The same outcome for a patient of each path: whether it was taken."""
    results = {}

    def fresh():
        row = house.named({"arrived": CAME, "age": 63, "excess": 1.5, "crp": 2, "grade": "1"})
        row |= {"smoker": "true", "place": "NA"}
        house.machine.receive(row)
        return {"record_id": row["record_id"]} | result

    try:
        house.machine.add_outcome(**fresh())
        results["machine"] = True
    except LMError as error:
        assert "\n" not in str(error)
        results["machine"] = False
    frame = pd.DataFrame({name: [value] for name, value in fresh().items()}, dtype=object)
    results["machine, many"] = house.machine.add_outcomes(frame)["accepted"] == 1
    results["REST"] = verdict(house.web.post("/v1/outcomes", json=fresh()))
    results["REST, JSON"] = verdict(house.web.post("/v1/outcomes/batch", json=[fresh()]))
    for kind, write in ((ARROW, arrow), (PARQUET, parquet)):
        head = {"content-type": kind}
        results[kind] = verdict(
            house.web.post("/v1/outcomes/batch", content=write(fresh()), headers=head)
        )
    return results


EVENT = {"y": 1, "known_at": "2020-06-10", "event": "2020-06-10", "followed_until": None}
SURVIVED = {"y": 0, "known_at": "2020-08-01", "event": None, "followed_until": "2020-06-30"}
LOST = {"y": None, "known_at": "2020-06-10", "event": "", "followed_until": "2020-06-10"}


@pytest.mark.slow
@settings(FAST, max_examples=max(15, EXAMPLES // 2))
@example(EVENT, True)
@example(EVENT | {"event": "2020-05-31"}, True)
@example(SURVIVED, True)
@example(LOST, True)
@example(EVENT | {"event": "2020-07-01", "known_at": "2020-07-01"}, False)
@example(EVENT | {"followed_until": "2020-06-09"}, False)
@example(EVENT | {"followed_until": "2020-06-10"}, True)
@example(SURVIVED | {"known_at": "2020-06-29"}, False)
@example(EVENT | {"known_at": "2142-01-01"}, False)
@given(OUTCOMES, st.none())
def test_every_entry_point_takes_or_refuses_the_same_outcome(house, result, want):
    results = outcome_entries(house, result)
    assert len(set(results.values())) == 1, (result, results)
    assert want is None or set(results.values()) == {want}, (result, results)


# The study's own table and `lm trigger`, which send an outcome as its dates

TEXT_DATES = st.sampled_from(
    [
        *("", "-", "2020-05-30", "2020-05-31", "2020-05-31T09:00:00Z", "2020-06-10"),
        *("2020-06-10T10:00:00+02:00", "2020-06-29", "2020-06-30", "2020-07-01", "2020-08-01"),
        *("2142-01-01", "10/06/2020", "now"),
    ]
)


def expected_label(study, event, until):
    """1, 0, None (lost) or "" (nothing is known) by the slow rules; REFUSED."""
    zone, came = study.time_zone, slow.moment(CAME)
    due = slow.end_of_horizon(came, study.horizon_days, zone)
    try:
        dates = [slow.moment(t, zone) if t not in ("", "-") else None for t in (event, until)]
    except ValueError:
        return REFUSED
    event, until = dates
    for when in filter(None, dates):
        if slow.earlier(when, came, zone) or when[0].year > 2100:
            return REFUSED
    if event and until and slow.earlier(until, event, zone):
        return REFUSED
    if event and not slow.earlier(due, event, zone):
        return 1
    return "" if not until else None if slow.earlier(until, due, zone) else 0


@pytest.fixture
def commands(house, monkeypatch):
    """The command line beside a service of that machine."""
    monkeypatch.setenv("LM_DATA", str(house.folder))
    monkeypatch.setenv("LM_HOME", str(house.folder / "home"))
    with background(house.machine):
        yield house


@pytest.mark.slow
@settings(FAST, max_examples=max(8, EXAMPLES // 3))
@example("2020-06-10", "2020-06-10")
@example("2020-06-10", "2020-06-09")
@example("", "2020-06-30")
@example("", "2020-06-29")
@example("2020-07-01", "2020-08-01")
@given(TEXT_DATES, TEXT_DATES)
def test_the_command_line_takes_or_refuses_the_same_outcome(commands, event, until):
    house, want = commands, expected_label(commands.study, event, until)
    row = house.named({"arrived": CAME, "age": 63, "excess": 1.5, "crp": 2, "grade": "1"})
    row |= {"smoker": "true", "place": "NA", "event": event, "followed_until": until}
    table = house.folder / "paths" / "rows.csv"
    before = table.read_bytes()
    table.write_bytes(as_csv(row))
    try:
        status = main(["trigger", "paths", "--until", "2024-01-01"])
    finally:
        table.write_bytes(before)
    stored = house.machine.table("outcomes", record_id=row["record_id"])["y"].tolist()
    if want == REFUSED:
        assert status == 2 and not house.machine.has(row["record_id"])
    else:
        result = "" if not stored else None if stored[0] != stored[0] else stored[0]
        why = house.machine.table("rejects", last=1)["message"].tolist()
        assert status == 0 and result == want, (event, until, result, want, why)
        if stored:
            results = [
                "withdraw",
                "paths",
                "outcome",
                row["record_id"],
                "--by",
                "A",
                "--reason",
                "b",
            ]
            assert main(results) == 0 and main(results) == 2  # What is withdrawn cannot be again
            assert house.machine.explain(row["record_id"])["lost"] is False

"""A job over HTTP is a name with typed parameters: no path, no SQL, no foreign code."""

import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from papermill.translators import papermill_translators

from lm.jobs.notebook_runner import find_notebook, read_parameters
from lm.machine.machine import Machine
from lm.serve.app import create_app
from lm.serve.auth import Tokens
from lm.serve.job_requests import JOBS, over_http
from lm.serve.routes import JOB, PERMISSIONS


class Recorded:
    """Jobs that are noted down and not run."""

    def __init__(self):
        self.runs = []

    def start(self, notebook, parameters, token):
        self.runs.append((notebook, parameters))
        return {"job": f"{notebook}-1", "state": "running"}

    def states(self):
        return {"waiting": 0, "running": 0, "done": 0, "failed": 0}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Recorded jobs and a function that asks for one as a data scientist."""
    home = tmp_path_factory.mktemp("state")
    with Machine("monica", home) as machine:
        jobs, tokens = Recorded(), Tokens(home)
        shown = {"authorization": f"Bearer {tokens.create('dana', 'data scientist')}"}
        app = create_app(machine, jobs, tokens=tokens)
        shown["content-type"] = "application/json"
        with TestClient(app, "http://127.0.0.1", headers=shown) as web:
            yield jobs, lambda body: web.post("/v1/jobs", content=body)


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """A folder with a secret and a notebook that would write into it."""
    folder = tmp_path_factory.mktemp("canary")
    (folder / "secret.txt").write_text("CANARY")
    cell = {"cell_type": "code", "execution_count": None, "metadata": {"tags": ["parameters"]}}
    cell |= {"outputs": [], "source": f"open({str(folder / 'written')!r}, 'w')"}
    book = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (folder / "own.ipynb").write_text(json.dumps(book))
    return folder


def refused(service, body):
    """The sentence with which a body is refused; nothing was started."""
    jobs, ask = service
    before = len(jobs.runs)
    response = ask(json.dumps(body))
    assert 400 <= response.status_code < 500, (body, response.text)
    assert len(jobs.runs) == before
    return response.json()["error"]


READS, WRITES = "FROM read_text('{canary}/secret.txt')", "open('{canary}/written', 'w')"
EXPLOITS = [
    {"notebook": "score", "parameters": {"query": f"SELECT * {READS}"}},
    {"notebook": "score", "parameters": {"query": "COPY (SELECT 1) TO '{canary}/written'"}},
    {"notebook": "score", "parameters": {"query": "INSTALL httpfs; LOAD httpfs"}},
    {"notebook": "score", "parameters": {"file": "{canary}/secret.txt"}},
    {"notebook": "score", "parameters": {"output": "{canary}/written"}},
    {"notebook": "facts", "parameters": {"output": "{canary}"}},
    {"notebook": "{canary}/own.ipynb"},
    {"notebook": "{canary}/own"},
    {"notebook": "../pipelines/monitor"},
    {"notebook": "nbs/pipelines/monitor.ipynb"},
    {"notebook": "simulate"},
    {"notebook": "prepare", "parameters": {"folder": "{canary}"}},
    {"notebook": "experiment", "parameters": {"snapshot": "{canary}/x.parquet"}},
    {"notebook": "experiment", "parameters": {"name": "../../{canary}"}},
    {"notebook": "monitor", "parameters": {"study": "rotterdam"}},
    {"notebook": "monitor", "parameters": {"study": "../monica"}},
    {
        "notebook": "monitor",
        "parameters": {"as_of": f"2020-01-01'); {WRITES} #"},
    },
    {"notebook": "retrain", "parameters": {"families": f"logistic\n{WRITES}"}},
    {"notebook": "retrain", "parameters": {"learner": "__import__('os')"}},
    {"notebook": "monitor", "parameters": {"LM_HOME": "{canary}"}},
    {"notebook": "monitor", "parameters": {}, "output": "{canary}/written"},
    {"notebook": "monitor", "parameters": {}, "environment": {"LM_DATA": "{canary}"}},
    {"notebook": ["monitor"]},
    {"notebook": "monitor", "parameters": []},
    {"notebook": "monitor", "parameters": {"budget": "0.25"}},
    {"notebook": "monitor", "parameters": {"evidently": 1}},
    {"notebook": "monitor", "parameters": {"window_days": 730.5}},
    {"notebook": "retrain", "parameters": {"seed": True}},
    {"notebook": "retrain", "parameters": {"seed": -1}},
    {"notebook": "monitor", "parameters": {"budget": None}},
]


@pytest.mark.parametrize("body", EXPLOITS, ids=lambda body: json.dumps(body)[:60])
def test_no_path_no_sql_no_foreign_notebook_and_no_output_place(service, canary, body):
    sentence = refused(service, json.loads(json.dumps(body).replace("{canary}", str(canary))))
    assert sentence and "\n" not in sentence and "CANARY" not in sentence
    assert sorted(p.name for p in canary.iterdir()) == ["own.ipynb", "secret.txt"]


def test_what_the_table_allows_is_started_with_the_served_study(service):
    jobs, ask = service
    good = {"notebook": "monitor", "parameters": {"budget": 1, "as_of": "1990-01-01"}}
    assert ask(json.dumps(good)).status_code == 202
    assert jobs.runs[-1] == (
        "monitor",
        {"budget": 1.0, "as_of": "1990-01-01", "study": "monica"},
    )
    for name in JOBS:
        assert ask(json.dumps({"notebook": name})).status_code == 202
        assert jobs.runs[-1] == (name, {"study": "monica"})


def test_the_table_agrees_with_the_notebooks():
    for name, kind in JOBS.items():
        assert find_notebook(name).parent.name == "pipelines"
        defaults = {p.name: p.default for p in read_parameters(name)}
        for field, about in kind.model_fields.items():
            assert field == "study" or about.default == defaults[field]
            free = about.annotation is str and not about.metadata
            assert not free, f"{name}.{field} takes any text"


@pytest.mark.parametrize(
    "content",
    [
        '{"notebook": "monitor", "notebook": "{canary}/own"}',
        '{"notebook": "monitor", "parameters": {"seed": 1, "seed": 2}}',
        '{"notebook": "monitor", "parameters": {"budget": NaN}}',
        '[{"notebook": "monitor"}]',
        '"monitor"',
        "notebook: monitor",
        "!!python/object/apply:os.system ['true']",
        '{"notebook": "ｍonitor"}',
        '{"notebook": "monitor\\u0000"}',
        '{"notebook": "Monitor"}',
        "",
    ],
)
def test_strange_json_starts_nothing(service, canary, content):
    jobs, ask = service
    before = len(jobs.runs)
    response = ask(content.replace("{canary}", str(canary)).encode())
    assert 400 <= response.status_code < 500 and len(jobs.runs) == before


def test_a_job_s_token_opens_what_a_job_needs():
    writes = {route for route, who in PERMISSIONS.items() if JOB in who and route[0] != "GET"}
    takes = (
        "/v1/results/verdicts",
        "/v1/results/sketches",
        "/v1/results/updates",
        "/v1/snapshots",
        "/v1/predictions",
        "/v1/records/batch",
    )
    assert writes <= {("POST", path) for path in (*takes, "/v1/audit/notes")}
    assert {("POST", path) for path in takes} <= writes


@settings(max_examples=100, deadline=None)
@given(st.text() | st.lists(st.text(), max_size=3))
def test_a_parameter_reaches_the_notebook_as_a_value(value):
    """Papermill writes parameters as code: whatever the text is, it stays text."""
    python, seen = papermill_translators.find_translator("python3", "python"), {}
    code = python.codify({"x": value}, "Parameters")
    exec(code, seen)
    assert seen["x"] == value and seen.keys() == {"__builtins__", "x"}


text = st.sampled_from(
    ["monitor", "retrain", "score", "experiment", "facts", "simulate", "prepare", "{canary}/own"]
) | st.text(max_size=30)
names = st.sampled_from(
    [*{f for kind in JOBS.values() for f in kind.model_fields}, "query", "file", "output"]
) | st.text(max_size=12)
texts = st.sampled_from(
    ["{canary}/secret.txt", "SELECT 1", "'''\nimport os\n'''", "1990-01-01", "{{x}}", "monica"]
) | st.text(max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
bodies = st.fixed_dictionaries(
    {"notebook": text},
    optional={"parameters": st.dictionaries(names, values, max_size=4) | values, "output": texts},
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies)
def test_no_request_names_a_file_or_brings_code(service, canary, body):
    """What is started are names of the table with values of its types; all else is refused."""
    jobs, ask = service
    before = len(jobs.runs)
    response = ask(json.dumps(body).replace("{canary}", str(canary)))
    assert response.status_code == 202 or 400 <= response.status_code < 500, response.text
    assert len(jobs.runs) - before == (response.status_code == 202)
    for name, parameters in jobs.runs[before:]:
        assert over_http(name, parameters) and parameters["study"] == "monica"
        for value in parameters.values():
            assert not isinstance(value, str) or not set(value) & set("/\\'\"\n;(){}")
    assert sorted(p.name for p in canary.iterdir()) == ["own.ipynb", "secret.txt"]

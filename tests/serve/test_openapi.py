"""The document that the service gives of itself is about the study it serves, and it is true."""

import re

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, TypeAdapter

from lm.core.reader import ARROW, PARQUET
from lm.core.study import load_study, study_names
from lm.core.study_rows import read_rows
from lm.core.validation import check_row
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.serve.app import create_app
from lm.serve.auth import AuthMiddleware, Tokens
from lm.serve.error_codes import CODES
from lm.serve.openapi import error_statuses, example_record, example_requests
from lm.serve.routes import OPERATIONS, TEXT
from lm.serve.schemas import RESPONSES
from lm.update.change_control import read_plan

HANDED_IN = {
    "/v1/results/verdicts",
    "/v1/results/sketches",
    "/v1/results/updates",
    "/v1/grants",
}  # By jobs of the service alone


class NoJobs:
    """Takes a job and forgets it."""

    def start(self, notebook, parameters, token):
        return {"job": "monitor-1a2b3c4d", "state": "running"}

    report = cancel = states = None


@pytest.fixture(scope="module", params=["monica", "rotterdam"])
def served(request, tmp_path_factory):
    """A service with two models, and its document."""
    study, folder = load_study(request.param), tmp_path_factory.mktemp("openapi")
    rows = read_rows(study)
    model = fit(study, rows[rows["known_at"] < study.first_model])
    with Machine(request.param, folder) as machine:
        for part in (model, model.recalibrated(0.1)):
            machine.registry.register(part, {}, {}, {}, "for the test")
        first = {"as_of": study.first_model, "action": "first", "reason": "first model"}
        machine.adopt(first | {"from_version": None, "to_version": 1})
        app = create_app(machine, NoJobs(), None)
        with TestClient(app, base_url="http://localhost") as web:
            yield study, machine, web, web.get("/openapi.json").json()


def fields(value):
    """The names in an answer; of a list those of its first row."""
    value = value[0] if isinstance(value, list) and value else value
    return set(value) if isinstance(value, dict) else type(value)


def operation_in(method, path):
    """The line of the table."""
    named = {(o.method, o.path.replace(":path", "")): o for o in OPERATIONS.values()}
    return named[method.upper(), path]


def check_fields(method, path, answer, shown):
    """The answer fulfils its model and has every field that is shown; FastAPI shows no nulls."""
    operation = operation_in(method, path)
    model = RESPONSES[operation.response]
    TypeAdapter(model).validate_python(answer, strict=False)
    if isinstance(model, type) and issubclass(model, BaseModel):
        assert set(answer) <= set(model.model_fields), path
    result, expected = fields(answer), fields(shown)
    assert expected <= result if isinstance(expected, set) else expected == result, path


def good(document, method, path):
    """What a route says of its good answer."""
    result = document["paths"][path][method.lower()]["responses"]
    return next(text for status, text in result.items() if status[0] == "2")


def sent(served):
    """Every example of every body, sent as it stands, in the order of the list."""
    study, machine, web, document = served
    order = list(example_requests(study, machine.status()))
    for name in order:
        path = OPERATIONS[name].path
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            where = path.format(name=study.name, version=2)
            query = {"form": "json"} if path == "/v1/records/batch" else {}
            yield path, example, web.post(where, json=example["value"], params=query)


@pytest.mark.slow
def test_every_example_is_accepted_or_says_that_it_is_a_mistake(served):
    _, _, _, document = served
    tried, refused = set(), set()
    for path, example, answer in sent(served):
        tried.add(path)
        stated = re.fullmatch(r"status (\d+)", example.get("description", ""))
        assert answer.status_code == int(stated[1]) if stated else answer.is_success, answer.text
        if stated:
            refused.add(path)
            body = document["components"]["schemas"]["Error"]
            assert set(body["required"]) <= set(answer.json())
            assert answer.json()["code"] in body["properties"]["code"]["enum"]
            assert stated[1] in document["paths"][path]["post"]["responses"]
            continue
        shown = good(document, "post", path)["content"].get("application/json", {}).get("example")
        if shown is not None:
            check_fields("post", path, answer.json(), shown)
    bodies = {
        path
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {})
    }
    assert tried == bodies and len(tried) == len(set(tried)) == 25
    assert refused == {"/v1/records", "/v1/approvals", "/v1/rejections"} | HANDED_IN


def test_the_answers_of_other_routes_have_the_fields_that_are_shown(served):
    study, machine, web, document = served
    machine.receive(example_record(study))
    query = {"record_id": "example-1", "form": "json"}
    seen = 0
    for path, methods in document["paths"].items():
        shown = good(document, "get", path)["content"] if "get" in methods else {}
        shown = shown.get("application/json", {}).get("example")
        if shown is not None and path != "/v1/jobs/{job}":
            where = path.format(record_id="example-1", version=2)
            answer = web.get(where, params=query)
            check_fields("get", path, answer.json(), shown)
            seen += 1
    assert seen >= 6


def test_the_error_that_is_shown_is_the_error_that_comes(served):
    _, _, web, document = served
    receive = document["paths"]["/v1/records"]["post"]
    shown = receive["responses"]["422"]["content"]["application/json"]["example"]
    content = receive["requestBody"]["content"]["application/json"]
    answer = web.post("/v1/records", json=content["examples"]["a rejected value"]["value"])
    assert answer.json() == shown and answer.status_code == 422


def test_tables_come_in_three_forms_and_all_errors_have_codes(served):
    _, _, _, document = served
    for path in (
        "/v1/patients",
        "/v1/tables/{name}",
        "/v1/models",
        "/v1/models/{version}/risks",
        "/v1/approvals",
    ):
        result = document["paths"][path]["get"]
        assert {ARROW, PARQUET, "application/json"} <= set(result["responses"]["200"]["content"])
        (form,) = [p for p in result["parameters"] if p["name"] == "form"]
        assert form["schema"]["enum"] == ["arrow", "parquet", "json"]
    codes = {code.code for code in CODES.values()}
    for path, methods in document["paths"].items():
        for method, result in methods.items():
            refusals = {k: v for k, v in result["responses"].items() if k[0] != "2"}
            assert all(
                set(re.findall(r"LM-\d+", v["description"])) & codes for v in refusals.values()
            )
            if not path.startswith(("/v2", "/invocations", "/ping", "/version")):
                assert [int(k) for k in refusals] == error_statuses(operation_in(method, path))
    assert "HTTPValidationError" not in str(document)


def test_the_patients_of_the_examples_are_nobodys_and_keep_every_rule(served):
    study, _, _, document = served
    assert set(example_record(study)) == {"record_id", "arrived", *study.feature_names}
    for name in study_names():
        for number in (1, 2):
            check_row(load_study(name), example_record(load_study(name), number))
    ids = read_rows(study)["record_id"]
    assert not [one for one in re.findall(r"[a-z]\d{4,}", str(document)) if one in set(ids)]


def test_the_document_follows_the_model_that_serves(served):
    study, machine, web, _ = served
    machine.rollback() if machine.status()["champion"] == 2 else None
    for serves in (1, 2):
        paths = web.get("/openapi.json").json()["paths"]
        value = paths["/v1/results/updates"]["post"]["requestBody"]["content"]["application/json"][
            "examples"
        ]
        assert value["not from a job"]["value"]["update"]["from_version"] == serves
        if serves == 1:
            machine.promote(2, "for the test", read_plan(study).approvers[0])


def test_every_operation_says_how_to_sign_in_what_comes_back_and_what_may_go_wrong(served):
    _, _, _, document = served
    assert document["servers"] and set(document["components"]["securitySchemes"]) == {
        "bearer",
        "basic",
    }
    for path, methods in document["paths"].items():
        for method, result in methods.items():
            where = f"{method} {path}"
            assert isinstance(result["security"], list), where
            content = good(document, method, path)["content"]
            assert operation_in(method, path).response == TEXT or all(
                kind.get("schema") for kind in content.values()
            ), where
            needed = {"403", "408", "413", "415", "422", "431", "503"}
            needed |= {"401", "429"} if result["security"] else set()
            assert needed <= set(result["responses"]), where


def test_what_the_token_check_refuses_is_described_for_every_operation(served, tmp_path):
    _, machine, _, document = served
    app = create_app(machine, NoJobs(), tokens=Tokens(tmp_path))
    calibrated = app.front
    while not isinstance(calibrated, AuthMiddleware):
        calibrated = calibrated.app
    calibrated.limits.strangers = 1e6  # All operations are asked at once
    with TestClient(app, base_url="http://localhost") as middleware:
        for path, methods in document["paths"].items():
            where = re.sub(r"{\w+}", "1", path)
            for method, result in methods.items():
                bare = middleware.request(method, where)
                assert (bare.status_code == 401) == bool(result["security"]), where
                packed = middleware.request(method, where, headers={"content-encoding": "gzip"})
                stranger = middleware.request(method, where, headers={"host": "evil.example"})
                long = middleware.request(method, where, headers={"content-length": "9" * 9})
                refused = [packed, stranger, long]
                assert [answer.status_code for answer in refused] == [415, 403, 413], where
                for answer in [*refused, bare]:
                    if answer.status_code >= 400:
                        assert str(answer.status_code) in result["responses"], where
                        assert answer.json()["code"]
    app.state.refusals.pool.shutdown(wait=True)

"""A client that a public generator makes from the OpenAPI document works against the service."""

import compileall
import importlib
import json
import subprocess
import sys

import httpx
import pytest

from lm.core.protocol import Status
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.handlers import study_folder
from lm.serve.routes import OPERATIONS

pytestmark = pytest.mark.slow

STUDY = load_study("monica")
ROWS = read_rows(STUDY)
PATIENT = httpx.Timeout(600)  # A busy computer is no failure
GENERATOR = {  # Bytes that the generator passes on as they are; nothing is formatted
    "content_type_overrides": {
        "application/vnd.apache.arrow.stream": "application/octet-stream",
        "application/vnd.apache.parquet": "application/octet-stream",
        "application/zstd": "application/octet-stream",
    },
    "post_hooks": [],
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A machine with a model, the address of its service, and an admin's token."""
    with Machine("monica", tmp_path_factory.mktemp("home")) as machine:
        model = fit(STUDY, ROWS[ROWS["known_at"] < STUDY.first_model])
        machine.registry.register(model, {}, {}, {}, "for the test")
        first = {"as_of": STUDY.first_model, "action": "first", "reason": "first model"}
        machine.adopt(first | {"from_version": None, "to_version": 1})
        token = Tokens(study_folder(machine)).create("integrator", "admin")
        with background(machine) as url:
            yield machine, url, token


@pytest.fixture(scope="module")
def generated(served, tmp_path_factory):
    """The folder of the generated package, after a generation without any warning."""
    _, url, token = served
    folder = tmp_path_factory.mktemp("generated")
    head = {"authorization": f"Bearer {token}"}
    answer = httpx.get(f"{url}/openapi.json", headers=head, timeout=PATIENT)
    (folder / "openapi.json").write_bytes(answer.raise_for_status().content)
    (folder / "generator.json").write_text(json.dumps(GENERATOR))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning"]
    command += ["--path", "openapi.json", "--config", "generator.json"]
    command += ["--meta", "none", "--output-path", "generated_client"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def call(served, generated):
    """A function that calls an operation of the generated client: its module and arguments."""
    _, url, token = served
    sys.path.insert(0, str(generated))
    client = importlib.import_module("generated_client").AuthenticatedClient(
        url, token, timeout=PATIENT
    )

    def run(name, **arguments):
        module = importlib.import_module(f"generated_client.api.default.{name}")
        return module.sync_detailed(client=client, **arguments)

    with client:
        yield run
    sys.path.remove(str(generated))


def model_of(name, **fields):
    """A model of the generated client from JSON."""
    return getattr(importlib.import_module("generated_client.models"), name).from_dict(fields)


@pytest.mark.slow
def test_the_client_compiles_and_has_a_function_for_every_operation(generated):
    package = generated / "generated_client"
    assert compileall.compile_dir(package, quiet=2, force=True)
    modules = {path.stem for path in (package / "api" / "default").glob("*.py")} - {"__init__"}
    assert modules == set(OPERATIONS)


def test_a_record_an_outcome_and_the_status_pass_through_it(served, call):
    machine, _, _ = served
    row = ROWS[ROWS["arrived"] > STUDY.first_model].iloc[0]
    fields = row[["record_id", "arrived", *STUDY.feature_names]].to_json(date_format="iso")
    record = model_of("NewRecord", row=json.loads(fields), source="generated")
    answer = call("receive", body=record).parsed
    stored = machine.explain(row["record_id"])
    assert (answer.risk, answer.version) == (stored["risk"], 1) and not answer.repeated
    assert answer.contributions.to_dict() == stored["contributions"]
    known = (row["arrived"] + STUDY.horizon).isoformat()
    outcome = model_of("NewOutcome", record_id=row["record_id"], y=0, known_at=known)
    assert call("add_outcome", body=outcome).parsed.accepted == 1
    assert call("explain", record_id=row["record_id"]).parsed.y == 0
    status = call("status").parsed.to_dict()
    assert status["counts"] == machine.status()["counts"] and status["counts"]["outcomes"] == 1
    assert Status.__required_keys__ <= set(status)


def test_a_rejected_record_is_a_typed_error(call):
    answer = call("receive", body=model_of("NewRecord", row={"record_id": "no-features"}))
    assert answer.status_code == 422
    assert answer.parsed.kind == "RejectedRecord" and answer.parsed.code == "LM-101"
    assert answer.parsed.field and answer.parsed.advice


def test_rows_of_a_table_and_predictions_are_lists(call):
    features = json.loads(ROWS[list(STUDY.feature_names)].head(2).to_json(orient="records"))
    scored = call("score", body=model_of("PredictionRequest", rows=features)).parsed
    assert len(scored) == 2 and 0 < scored[0]["risk"] < 1
    models = importlib.import_module("generated_client.models")
    versions = call("models", form=models.ModelsForm("json")).parsed
    assert [version["version"] for version in versions] == [1]

"""Clients of others get the machine's predictions, and malformed bodies get a sentence."""

import contextlib
import json
import random
import threading

import httpx
import numpy as np
import pandas as pd
import pytest
import uvicorn
from fastapi import FastAPI
from support.waiting import PATIENCE, eventually

from lm.core.serialization import json_values
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.machine.machine import Machine
from lm.model.predict import fit, predict
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.dependencies import ServedState
from lm.serve.inference_protocols import DATATYPES, OUTPUT_TYPES, PROTOCOL_HANDLERS, pack, unpack
from lm.serve.routes import OPERATIONS

STUDY = load_study("monica")
ROWS = read_rows(STUDY)
SEEN = ROWS.tail(5)[STUDY.feature_names]
MODEL = fit(STUDY, ROWS[ROWS["arrived"] < STUDY.first_model])
EXPECTED = predict(MODEL, SEEN)
TYPES = {f.name: "FP64" if f.kind == "number" else "BYTES" for f in STUDY.features}


@contextlib.contextmanager
def served(app):
    """An app on a port of this computer, from a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield "127.0.0.1:" + str(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join(5)


def asked(machine):
    """An app with both protocols."""
    app = FastAPI()
    app.state.service = ServedState(machine, None, "monica")
    for name, handler in PROTOCOL_HANDLERS.items():
        route = OPERATIONS[name]
        app.add_api_route(route.path, handler, methods=[route.method], response_model=None)
    return app


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine whose version 1 serves."""
    with Machine("monica", tmp_path_factory.mktemp("home")) as machine:
        machine.registry.register(MODEL, {}, {}, {}, "the first model")
        first = {"as_of": "1987-01-01", "action": "first", "reason": "first model"}
        machine.adopt(first | {"from_version": None, "to_version": 1})
        assert machine.status()["champion"] == 1
        yield machine


@pytest.fixture(scope="module")
def place(machine):
    with served(asked(machine)) as place:
        yield place


@pytest.fixture
def web(place):
    with httpx.Client(base_url=f"http://{place}", timeout=PATIENCE) as web:
        yield web


def stored(machine):
    return machine.status()["counts"]["records"]


def tensors(frame, kinds=TYPES):
    """What a client without our library sends, as JSON."""
    return [
        {"name": name, "datatype": kind, "shape": [len(frame)], "data": json_values(frame[name])}
        for name, kind in kinds.items()
    ]


def check_answer(outputs, expected=EXPECTED):
    """Every number is the model's own."""
    assert list(outputs) == list(OUTPUT_TYPES)
    for name in ("risk", "low", "high", "unlike"):
        np.testing.assert_allclose(outputs[name], expected[name], rtol=0, atol=1e-12)
    assert set(outputs["version"]) == {1}


# -- Open Inference Protocol ------------------------------------------------------------------


@pytest.fixture
def triton(place):
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(place)
    yield http, client
    client.close()


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("deep", [True, False], ids=["column", "flat"])
def test_tritonclient_gets_the_models_predictions(triton, machine, binary, deep):
    http, client = triton
    before, sent = stored(machine), []
    for name, kind in TYPES.items():
        values = SEEN[name].to_numpy(float if kind == "FP64" else object)
        values = values[:, None] if deep else values
        sent.append(http.InferInput(name, values.shape, kind))
        sent[-1].set_data_from_numpy(values, binary_data=binary)
    wanted = [http.InferRequestedOutput(name, binary_data=binary) for name in OUTPUT_TYPES]
    for how in ({}, {"outputs": wanted}, {"model_version": "1"}):
        result = client.infer("monica", sent, request_id="q7", **how)
        check_answer({name: result.as_numpy(name) for name in OUTPUT_TYPES})
        results = result.get_response()
        assert (results["id"], results["model_name"], results["model_version"]) == (
            "q7",
            "monica",
            "1",
        )
    assert stored(machine) == before


def test_tritonclient_reads_health_and_metadata(triton):
    _, client = triton
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("monica") and client.is_model_ready("monica", "1")
    assert not client.is_model_ready("rotterdam") and not client.is_model_ready("monica", "2")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    result = client.get_model_metadata("monica")
    assert (result["name"], result["versions"]) == ("monica", ["1"])
    assert {i["name"]: i["datatype"] for i in result["inputs"]} == TYPES
    assert {o["name"]: o["datatype"] for o in result["outputs"]} == OUTPUT_TYPES
    assert client.get_model_metadata("monica", "1")["versions"] == ["1"]


def test_tritonclient_reads_our_sentences(triton):
    http, client = triton
    gaps = http.InferInput("age", [1], "FP64")
    gaps.set_data_from_numpy(np.array([61.0]))
    for model, version, sentence in (
        ("rotterdam", "", "model 'rotterdam' is unknown"),
        ("monica", "9", "model version 9"),
        ("monica", "one", "versions are numbers"),
        ("monica", "", "lacks the input sex"),
    ):
        sent = [gaps] if not version else whole(http)
        with pytest.raises(http.InferenceServerException, match=sentence):
            client.infer(model, sent, model_version=version)


def whole(http):
    """All inputs of five patients."""
    sent = []
    for name, kind in TYPES.items():
        values = SEEN[name].to_numpy(float if kind == "FP64" else object)
        sent.append(http.InferInput(name, values.shape, kind))
        sent[-1].set_data_from_numpy(values)
    return sent


def test_every_datatype_and_every_kind_of_gap(web):
    frame = SEEN.assign(age=np.round(SEEN["age"]))
    expected = predict(MODEL, frame)
    for kind in set(DATATYPES) - {"BOOL", "BYTES"}:
        raw = pack(frame["age"], kind)
        age = {"name": "age", "datatype": kind, "shape": [5]}
        age["parameters"] = {"binary_data_size": len(raw)}
        rest = [t for t in tensors(frame) if t["name"] != "age"]
        head = json.dumps({"inputs": [age, *rest]}).encode()
        size = {"Inference-Header-Content-Length": str(len(head))}
        answer = web.post("/v2/models/monica/infer", content=head + raw, headers=size)
        check_answer({o["name"]: o["data"] for o in answer.json()["outputs"]}, expected)
    assert unpack(pack([True, False], "BOOL"), "BOOL", 2) == [True, False]
    gone = predict(MODEL, frame.assign(premi=np.nan))
    for nothing in ("", " ", None):
        sent = tensors(frame.assign(premi=[nothing] * 5))
        answer = web.post("/v2/models/monica/infer", json={"inputs": sent}).json()
        check_answer({o["name"]: o["data"] for o in answer["outputs"]}, gone)


def named(*names, arrived="1993-05-01"):
    return [
        {"name": "record_id", "datatype": "BYTES", "shape": [len(names)], "data": list(names)},
        {
            "name": "arrived",
            "datatype": "BYTES",
            "shape": [len(names)],
            "data": [arrived] * len(names),
        },
    ]


@pytest.mark.slow
def test_patients_with_a_name_are_stored_once_and_answered(web, machine):
    before, path = stored(machine), "/v2/models/monica/infer"
    body = {"inputs": tensors(SEEN) + named(*"abcde")}
    for _ in range(2):
        answer = web.post(path, json=body).json()
        assert answer["parameters"] == {"stored": True}
        check_answer({o["name"]: o["data"] for o in answer["outputs"]})
        assert stored(machine) == before + 5
    remaining = machine.explain("c")
    assert remaining["risk"] == pytest.approx(EXPECTED["risk"].iloc[2], abs=1e-12)
    assert machine.table("records", record_id="c")["source"].tolist() == ["inference"]
    assert web.post("/v2/models/monica/versions/1/infer", json=body).status_code == 400


def test_a_refused_patient_is_named_and_the_others_are_stored(web, machine):
    before, rejects = stored(machine), machine.status()["counts"]["rejects"]
    ages = [340.0, *SEEN["age"].iloc[1:]]
    body = {"inputs": tensors(SEEN.assign(age=ages)) + named(*"vwxyz")}
    answer = web.post("/v2/models/monica/infer", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("record 'v': age = 340.0 breaks the rule")
    assert "4 of 5 patients are stored" in answer.json()["error"]
    assert stored(machine) == before + 4 and not machine.has("v")
    assert machine.status()["counts"]["rejects"] == rejects + 1
    body["inputs"] = tensors(SEEN) + named(*"vwxyz")
    mended = web.post("/v2/models/monica/infer", json=body)
    check_answer({o["name"]: o["data"] for o in mended.json()["outputs"]})
    assert stored(machine) == before + 5


def test_without_a_model_the_service_is_live_but_not_ready(tmp_path):
    with Machine("monica", tmp_path / "empty") as empty, served(asked(empty)) as place:
        web = httpx.Client(base_url=f"http://{place}", timeout=PATIENCE)
        assert web.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/monica/ready"):
            assert web.get(path).status_code == 503
        assert web.get("/v2/models/monica").json()["versions"] == []
        answer = web.post("/v2/models/monica/infer", json={"inputs": tensors(SEEN)})
        assert (answer.status_code, answer.json()) == (503, {"error": "no model serves yet"})
        answer = web.post(
            "/v2/models/monica/infer", json={"inputs": tensors(SEEN) + named(*"abcde")}
        )
        assert answer.status_code == 503 and "5 patients are stored" in answer.json()["error"]
        assert stored(empty) == 5
        assert web.get("/ping").status_code == 404
        answer = web.post("/invocations", json={"inputs": json_values(SEEN.to_dict("list"))})
        assert answer.status_code == 503
        assert answer.json()["error_code"] == "TEMPORARILY_UNAVAILABLE"
        web.close()


def test_wrong_tensors_get_a_sentence(web, machine):
    before = stored(machine)
    age, *others = sorted(tensors(SEEN), key=lambda t: t["name"] != "age")
    size = {"parameters": {"binary_data_size": 40}}
    for wrong, sentence in (
        (age | {"datatype": "FP65"}, "datatype must be one of"),
        (age | {"datatype": ["FP64"]}, "datatype must be one of"),
        (age | {"shape": [5, 2]}, "shape must be"),
        (age | {"shape": [-5]}, "shape must be"),
        (age | {"shape": []}, "shape must be"),
        (age | {"shape": [4]}, "5 values, but its shape says 4"),
        (age | {"data": "61"}, "lacks its data"),
        (age | {"data": ["61"] * 5}, "not of datatype FP64"),
        (age | {"data": [[1, 2]] * 5}, "not of datatype FP64"),
        (age | {"data": [1e400] * 5}, "Infinity, which is no JSON"),
        (age | {"data": [10**400] * 5}, "not of datatype FP64"),
        (age | {"data": [None] * 5}, "must not be missing"),
        (age | {"name": "agee"}, "lacks the input age"),
        (age | {"name": "sex"}, "comes twice"),
        (age | {"name": None}, "an object with name"),
        (age | size, "binary_data_size is not what came"),
        (age | {"parameters": [1]}, "parameters must be an object"),
        ("age", "an object with name"),
    ):
        body = json.dumps({"inputs": [wrong, *others]})
        answer = web.post("/v2/models/monica/infer", content=body)
        assert answer.status_code == 400 and sentence in answer.json()["error"], answer.text
    few = [t | {"shape": [1], "data": t["data"][:1]} for t in others]
    for body, sentence in (
        ({"inputs": [age, *few]}, "differ in their number"),
        ({"inputs": []}, "lacks the input"),
        ({"inputs": {}}, "a list of inputs"),
        ([], "a list of inputs"),
        ({"inputs": [age, *others], "outputs": ["risk"]}, "outputs must be"),
        ({"inputs": [age, *others], "outputs": [{"name": "y"}]}, "outputs must be of risk"),
        ({"inputs": [age, *others, named(*"abcde")[0]]}, "lacks the input arrived"),
    ):
        answer = web.post("/v2/models/monica/infer", json=body)
        assert answer.status_code == 400 and sentence in answer.json()["error"], answer.text
    for length in ("-1", "x", "99999999", "3"):
        head = {"Inference-Header-Content-Length": length}
        answer = web.post("/v2/models/monica/infer", json={"inputs": [age]}, headers=head)
        assert answer.status_code == 400
    assert stored(machine) == before


# -- MLflow's scoring protocol ----------------------------------------------------------------


def forms(table):
    """The same patients in every form that the protocol has."""
    rows = json_values(table.to_dict("records"))
    split = {"columns": list(table), "data": json_values(table.to_numpy(object))}
    return {
        "dataframe_split": split,
        "dataframe_records": rows,
        "instances": rows,
        "inputs": json_values(table.to_dict("list")),
    }


@pytest.fixture(scope="module")
def mlflows_own(machine):
    """MLflow's own scoring server on the same registered model."""
    from mlflow.pyfunc import load_model, scoring_server

    (skops,) = machine.registry.models.rglob("model.skops")
    app = scoring_server.init(load_model(str(skops.parent)))
    with served(app) as place, httpx.Client(base_url=f"http://{place}", timeout=PATIENCE) as web:
        yield web


GOOD = {
    "as they are": SEEN,
    "one": SEEN.head(1),
    "gaps": SEEN.assign(hichol=[None] * 5, premi=[None, "y", None, "n", "n"]),
    "more columns, another order": SEEN.assign(record_id=list("abcde"))[
        ["record_id", *STUDY.feature_names[::-1]]
    ],
}


@pytest.mark.parametrize("what", GOOD)
def test_mlflows_server_and_ours_give_the_same_answers(web, mlflows_own, machine, what):
    before, table = stored(machine), GOOD[what]
    expected = MODEL.predict_proba(table)
    for form, content in forms(table).items():
        ours = web.post("/invocations", json={form: content})
        theirs = mlflows_own.post("/invocations", json={form: content})
        assert ours.status_code == theirs.status_code == 200, (form, theirs.text)
        assert ours.json().keys() == theirs.json().keys() == {"predictions"}
        for answer in (ours, theirs):
            payload = answer.json()["predictions"]
            np.testing.assert_allclose(payload, expected, rtol=0, atol=1e-12)
    csv = {"content": table.to_csv(index=False), "headers": {"content-type": "text/csv"}}
    ours, theirs = (w.post("/invocations", **csv) for w in (web, mlflows_own))
    np.testing.assert_allclose(ours.json()["predictions"], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(theirs.json()["predictions"], expected, rtol=0, atol=1e-12)
    assert stored(machine) == before


JSON, CSV = {"content-type": "application/json"}, {"content-type": "text/csv"}
FORM = {"inputs": json_values(SEEN.to_dict("list"))}
BAD = {
    "nothing": ("", JSON),
    "no JSON": ("{inputs: 1}", JSON),
    "no UTF-8": (b'{"inputs": "\xff"}', JSON),
    "a list": ([FORM], JSON),
    "a number": ("7", JSON),
    "no form": ({"data": []}, JSON),
    "two forms": (FORM | {"instances": []}, JSON),
    "no data": ({"dataframe_split": {"columns": ["age"]}}, JSON),
    "split as list": ({"dataframe_split": [[1]]}, JSON),
    "more in split": ({"dataframe_split": {"data": [[1]], "columns": ["age"], "x": 1}}, JSON),
    "records as object": ({"dataframe_records": {"age": [61]}}, JSON),
    "a column less": ({"inputs": {k: v for k, v in FORM["inputs"].items() if k != "age"}}, JSON),
    "text for a number": ({"inputs": FORM["inputs"] | {"age": ["old"] * 5}}, JSON),
    "uneven columns": ({"instances": FORM["inputs"] | {"age": [61.0]}}, JSON),
    "short rows": ({"dataframe_split": {"columns": ["age", "sex"], "data": [[1]]}}, JSON),
    "empty CSV": ("", CSV),
    "CSV without columns": ("1,2\n3,4\n", CSV),
    "another type": ("x", {"content-type": "text/plain"}),
    "another charset": ("{}", {"content-type": "application/json; charset=latin-1"}),
    "a strange parameter": ("{}", {"content-type": "application/json; odd=1"}),
}


@pytest.mark.parametrize("what", BAD)
def test_mlflows_server_and_ours_refuse_the_same_bodies(web, mlflows_own, what):
    body, headers = BAD[what]
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    ours, theirs = (
        w.post("/invocations", content=content, headers=headers) for w in (web, mlflows_own)
    )
    assert ours.status_code == theirs.status_code, (ours.text, theirs.text)
    assert {"error_code", "message"} <= ours.json().keys()


def test_mlflows_client_gets_the_models_predictions(place):
    import mlflow
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    client = ScoringServerClient(*place.split(":"))
    client.ping()
    assert client.get_version() == mlflow.__version__
    result = client.invoke(SEEN).get_predictions().to_numpy()
    np.testing.assert_allclose(result, MODEL.predict_proba(SEEN), rtol=0, atol=1e-12)


def test_mlflows_client_sends_a_token_from_netrc_or_the_address(machine, tmp_path, monkeypatch):
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    with background(machine) as url:
        host, port = url.removeprefix("http://").split(":")
        tokens = Tokens(machine.store.folder)
        token = tokens.create("mlflow", "machine")
        client = ScoringServerClient(host, port)
        client.wait_server_ready()
        with pytest.raises(Exception, match="error code 401"):
            client.invoke(SEEN)
        (tmp_path / "netrc").write_text(f"machine {host} login mlflow password {token}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        sent = [client.invoke(SEEN)]
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        sent += [ScoringServerClient(f"Zo%C3%AB:{token}@{host}", port).invoke(SEEN)]
        for result in sent:
            results = result.get_predictions().to_numpy()
            np.testing.assert_allclose(results, MODEL.predict_proba(SEEN), rtol=0, atol=1e-12)
        tokens.revoke("mlflow")
        with pytest.raises(Exception, match="token of mlflow was revoked"):
            ScoringServerClient(f"mlflow:{token}@{host}", port).invoke(SEEN)
    log = "".join(machine.table("audit")["content"])
    assert token not in log


def test_details_and_what_the_study_refuses(web):
    answer = web.post("/invocations", json=FORM | {"params": {"details": True}}).json()
    check_answer(pd.DataFrame(answer["predictions"]).to_dict("list"))
    old = {"inputs": FORM["inputs"] | {"age": [61.0, 340.0, 50.0, 50.0, 50.0]}}
    answer = web.post("/invocations", json=old)
    assert answer.status_code == 400 and "age = 340.0 breaks the rule" in answer.json()["message"]


# -- Nothing breaks it ------------------------------------------------------------------------

STRANGE = [
    *(None, True, -1, 1e308, 10**30, "", "x" * 1000, "<b>", "'; DROP TABLE records;--", "\u0000"),
    *([], {}, [[]], [[[[1]]]], {"a": {"b": []}}, float("nan"), float("inf"), "NaN", [None]),
]


def mutated(rng, value):
    """A copy with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {rng.choice(["x", "parameters", "data", "index"]): rng.choice(STRANGE)}
        return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return [*value[:i], mutated(rng, value[i]), *value[i + 1 :]]
    return rng.choice(STRANGE)


def spoilt(rng, body):
    """Bytes that are almost the body."""
    text = json.dumps(mutated(rng, mutated(rng, body))).encode()
    kind = rng.random()
    if kind < 0.1:
        return text[: rng.randrange(len(text))]
    if kind < 0.2:
        at = rng.randrange(len(text))
        return text[:at] + rng.randbytes(3) + text[at:]
    if kind < 0.25:
        return b"[" * 50_000
    return text


def test_malformed_bodies_never_break_the_service(web, machine):
    rng, before, codes = random.Random(0), stored(machine), set()
    wholes = [{"inputs": tensors(SEEN.head(2))}, *({k: v} for k, v in forms(SEEN.head(2)).items())]
    for number in range(400):
        body = spoilt(rng, wholes[number % 5])
        path = "/invocations" if number % 5 else "/v2/models/monica/infer"
        kind = rng.choice(["application/json"] * 4 + ["text/csv", ""])
        head = {"content-type": kind}
        if rng.random() < 0.2:
            head["Inference-Header-Content-Length"] = str(rng.randrange(-5, 2 * len(body) + 5))
        answer = web.post(path, content=body, headers=head)
        codes.add(answer.status_code)
        assert answer.status_code in (200, 400, 415), (body[:500], answer.text[:500])
        assert answer.json()
    assert {200, 400} <= codes and stored(machine) == before


def test_spoilt_patients_never_break_the_service(web, machine):
    rng, body = random.Random(1), {"inputs": tensors(SEEN.head(2)) + named("p", "q")}
    for _ in range(100):
        answer = web.post("/v2/models/monica/infer", content=spoilt(rng, body))
        assert answer.status_code in (200, 400), answer.text[:500]
    assert machine.verify() == []

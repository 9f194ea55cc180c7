"""One patient by the short way: the answer and what is stored are those of the long way."""

import asyncio
import json
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pandas as pd
import pytest
from support.monica import BY, FIRST, HALF, NEXT, STUDY, begun
from support.waiting import PATIENCE

from lm.core.study_rows import read_rows
from lm.data.journal import StoreFailed
from lm.jobs.jobs import Jobs
from lm.model.explain import contributions
from lm.model.fast_path import fast_path
from lm.model.predict import FAMILIES, fit, predict
from lm.serve.app import create_app
from lm.serve.auth import Tokens

WAYS = ("front", "routed")
KIND = {"content-type": "application/json"}


@pytest.fixture
def machine(home):
    with begun(home) as machine:
        yield machine


@pytest.fixture
def app(machine, tmp_path):
    return create_app(machine, Jobs(tmp_path / "jobs"), hosts=None)


def body(number, name=None, **more):
    row = json.loads(NEXT.loc[number, STUDY.feature_names].to_json())
    who = {"record_id": name or f"x{number}", "arrived": str(NEXT.loc[number, "arrived"])}
    return {"row": who | row} | more


def post(app, way, content, headers=KIND, path="/v1/records"):
    """Status and content of the answer that one way gives."""

    async def ask():
        inner = app if way == "front" else app.routed
        transport = httpx.ASGITransport(inner)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=content, headers=headers)

    result = asyncio.run(ask())
    return result.status_code, result.json()


@pytest.mark.slow
@pytest.mark.parametrize("trial", [False, True])
def test_both_ways_give_and_keep_the_same(machine, app, trial):
    if trial:
        machine.set_rollout(HALF | {"share": 0.999}, "trial", BY)
    for number in range(6):
        more = {"now": "1993-05-01T10:00:00"} if number % 2 else {"source": "ward"}
        results = [
            post(app, way, json.dumps(body(number, f"{way} {number}", **more))) for way in WAYS
        ]
        for (status, result), way in zip(results, WAYS, strict=True):
            assert status == 200 and result.pop("record_id") == f"{way} {number}"
            assert result.pop("counts_as") == f"{way} {number}"
            result["why"] = str(result["why"]).split(":")[0]  # The hash is the name's
        assert results[0] == results[1]
    for table in ("records", "predictions", "explanations"):
        stored = machine.table(table)
        stored = stored[stored["record_id"].str.contains(" ")].drop(
            columns=["received"], errors="ignore"
        )
        halves = [
            stored[stored["record_id"].str.startswith(way)]
            .drop(columns=["record_id", "why", "known_at", "predicted_at"], errors="ignore")
            .reset_index(drop=True)
            for way in WAYS
        ]
        pd.testing.assert_frame_equal(*halves)


TEXTS = {
    "no object": b"[1, 2]",
    "no JSON": b'{"row": {',
    "not UTF-8": b'{"row": {"record_id": "\xff"}}',
    "NaN": json.dumps(body(0) | {"row": body(0)["row"] | {"age": float("nan")}}).encode(),
    "half a character": rb'{"row": {"record_id": "\ud800"}}',
    "an unknown field": json.dumps(body(1) | {"extra": 1}).encode(),
    "no row": b'{"now": null}',
    "a number as name": json.dumps(body(2) | {"row": body(2)["row"] | {"record_id": 12}}).encode(),
    "a huge number": json.dumps(body(3) | {"row": body(3)["row"] | {"age": 10**30}}).encode(),
    "a wrong time": json.dumps(body(4, now="yesterday")).encode(),
    "a wrong source": json.dumps(body(5, source=None)).encode(),
    "refused": json.dumps(body(6) | {"row": body(6)["row"] | {"age": 900}}).encode(),
    "deep": b'{"row": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nothing": b"",
}


def test_whatever_is_odd_is_answered_by_the_routes(app):
    for what, content in TEXTS.items():
        results = {}
        for way in reversed(WAYS):
            status, result = post(app, way, content)
            results[way] = status, {k: v for k, v in result.items() if k != "repeated"}
        assert results["front"] == results["routed"], what


def test_other_content_types_are_answered_by_the_routes(app):
    for kind in ("text/plain", "application/json; charset=utf-8", None):
        headers = {} if kind is None else {"content-type": kind}
        results = [post(app, way, json.dumps(body(7, f"{way} {kind}")), headers) for way in WAYS]
        assert results[0][0] == results[1][0], kind


def test_the_same_again_is_the_stored_answer(machine, app):
    first, again = (post(app, "front", json.dumps(body(8)))[1] for _ in range(2))
    assert not first.pop("repeated") and again.pop("repeated")
    assert first == again and len(machine.table("records", record_id="x8")) == 1
    other = body(8) | {"row": body(8)["row"] | {"age": 64.0, "sex": "m"}}
    status, result = post(app, "front", json.dumps(other))
    assert status == 422 and "taken by a patient whose" in result["error"]


def test_nothing_is_answered_that_the_disk_refused(machine, app, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lm.data.journal._synchronise", refuse)
    status, result = post(app, "front", json.dumps(body(9)))
    assert status == 503 and result["code"] == "LM-306" and "No space left" in result["error"]
    monkeypatch.undo()
    assert not machine.has("x9") and post(app, "front", json.dumps(body(9)))[0] == 200


def test_the_token_check_stands_before_the_short_way(machine, tmp_path):
    tokens = Tokens(machine.store.folder)
    token = tokens.create("a viewer", "viewer")
    app = create_app(machine, Jobs(tmp_path / "jobs"), hosts=None, tokens=tokens)
    for headers, status in (({}, 401), ({"authorization": f"Bearer {token}"}, 403)):
        assert post(app, "front", json.dumps(body(10)), KIND | headers)[0] == status
    assert not machine.has("x10")
    long = json.dumps(body(10, source="x" * 2_000_000))
    sender = tokens.create("a ward", "machine")
    headers = KIND | {"authorization": f"Bearer {sender}"}
    assert post(app, "front", long, headers)[0] == 413


def test_a_bug_is_stated_once_and_harms_no_other_request(machine, app, monkeypatch, caplog):
    monkeypatch.setattr(machine.live, "predict_one", lambda checked: 1 / 0)
    with caplog.at_level(logging.ERROR):
        status, result = post(app, "front", json.dumps(body(11)))
    assert status == 500 and result["code"] == "LM-500" and result["request_id"]
    monkeypatch.setattr(machine, "status", lambda: 1 / 0)
    assert post(app, "front", b"", path="/v1/rollout/reviews")[0] in (200, 422)


# Many at once


@pytest.mark.slow
def test_sixty_four_at_once_with_swaps_between(machine, app):
    """Every answer is one version's, and what is stored is what was answered."""

    async def all_at_once():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = [
                client.post("/v1/records", json=body(i % len(NEXT), f"many {i}"))
                for i in range(256)
            ]
            return [result.json() for result in await asyncio.gather(*asked)]

    def swaps():
        for _ in range(5):
            machine.promote(2, "swap", BY)
            machine.rollback()

    swapping = threading.Thread(target=swaps)
    swapping.start()
    result = asyncio.run(all_at_once())
    swapping.join()
    stored = machine.table("predictions").set_index("record_id")
    for answer in result:
        model = machine.registry.load(answer["version"])
        risk = model.predict_proba(answer["features"])[0, 1]
        assert abs(answer["risk"] - risk) < 1e-9
        assert stored.loc[answer["record_id"], "risk"] == answer["risk"]
        assert stored.loc[answer["record_id"], "version"] == answer["version"]
    assert machine.verify() == [] and sys.getswitchinterval() == 0.005


def test_a_swap_reads_no_model_and_waits_for_nothing_but_the_journal(machine, monkeypatch):
    """Models are ready before, and neither the tables' lock nor MLflow's file is asked."""
    machine.warm(later=True)
    machine.registry.settle()

    def absent(*_):
        raise AssertionError("a model is read while versions are swapped")

    monkeypatch.setattr(type(machine.registry), "load", absent)
    monkeypatch.setattr(type(machine.registry.aliases), "set", absent)
    monkeypatch.setattr("lm.machine.live_rollout.contributions", absent)
    taken, free = threading.Event(), threading.Event()

    def hold():
        with machine.store.database.lock:
            taken.set()
            free.wait(PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(PATIENCE)
    try:
        for number in range(3):
            with ThreadPoolExecutor(1) as pool:
                done = pool.submit(machine.promote, 2, "swap", BY).result(20)
                assert done["to_version"] == 2
                assert machine.receive(body(number, f"after {number}")["row"])["version"] == 2
                assert pool.submit(machine.rollback).result(20)["to_version"] == 1
    finally:
        free.set()
        holder.join()
    assert machine.receive(body(20)["row"])["version"] == 1 and machine.verify() == []
    assert (machine.table("audit")["kind"] == "attempt").sum() == 7  # One update came before


def test_a_model_is_read_once_for_all_first_requests(machine, monkeypatch):
    began, free, read, real = threading.Event(), threading.Event(), [], type(machine.registry).load
    machine.registry._loaded.pop(2), machine.champion.models._read.pop(2, None)

    def slow(registry, version):
        read.append(version)
        began.set()
        assert free.wait(PATIENCE)
        return real(registry, version)

    monkeypatch.setattr(type(machine.registry), "load", slow)
    with ThreadPoolExecutor(2) as pool:
        warming = pool.submit(machine.warm, later=True)
        assert began.wait(PATIENCE)
        swap = pool.submit(machine.promote, 2, "swap", BY)
        assert machine.receive(body(0)["row"])["version"] == 1  # No other request waits
        free.set()
        warming.result(20)
        assert swap.result(20)["to_version"] == 2 and read == [2]
    assert machine.receive(body(1)["row"])["version"] == 2


def test_sent_twice_is_stored_once(machine):
    machine.receive(body(12)["row"])
    arrived = NEXT.loc[12, "arrived"]
    later = arrived + pd.Timedelta(days=800)
    for _ in range(3):
        machine.add_outcome("x12", 0, later)
        rows = pd.DataFrame([{"record_id": "x12", "y": 0, "known_at": later}] * 2)
        assert machine.add_outcomes(rows) == {"accepted": 2, "refused": []}
        machine.add_decision("x12", "Dr A", "override", "too low", now=later)
    assert len(machine.table("outcomes", record_id="x12")) == 1
    assert len(machine.table("decisions", record_id="x12")) == 1
    machine.add_outcome("x12", 1, later, event=arrived)
    machine.add_outcome("x12", 0, later)  # Back again: a correction, not a repetition
    machine.add_decision("x12", "Dr B", "agree", now=later)
    assert machine.table("outcomes", record_id="x12")["y"].tolist() == [0, 1, 0]
    assert len(machine.table("decisions", record_id="x12")) == 2


def test_a_store_with_no_room_left_in_memory_says_so(machine, monkeypatch):
    monkeypatch.setattr("lm.data.intake.MOST_WAITING", 0)
    with pytest.raises(StoreFailed, match="wait for the disk"):
        machine.receive(body(13)["row"])


# The single-row fast path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selected", [None, ("age", "sex", "smstat")])
def test_fast_path_is_the_model(family, selected):
    rows = read_rows(STUDY)
    early = rows[rows["arrived"] <= FIRST]
    model = fit(STUDY, early, family, trees=15, members=4, selected=selected)
    model, asked = model.recalibrated(-0.2, 1.3), NEXT[STUDY.feature_names].head(40).copy()
    for i, name in enumerate(STUDY.feature_names):
        asked.loc[asked.index[i], name] = None
    base, shares = contributions(model, asked)
    truth = predict(model, asked)
    for i, row in enumerate(asked.to_dict("records")):
        result, mine, reasons = fast_path(model)(row)
        assert fast_path(model).predict(row) == result
        np.testing.assert_allclose([result[k] for k in truth], truth.iloc[i], rtol=1e-9)
        np.testing.assert_allclose([reasons[k] for k in shares], shares.iloc[i], atol=1e-9)
        assert abs(mine - base) < 1e-9

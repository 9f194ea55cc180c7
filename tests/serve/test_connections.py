"""No client shuts others out, and no answer is cut: limits of connections, the end of a service."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.waiting import PATIENCE, UNPROXIED, eventually

from lm.core.serialization import json_values
from lm.core.settings import find_root
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.machine.machine import Machine
from lm.serve import connections
from lm.serve.app import background
from lm.serve.auth import AuthMiddleware, RateLimits, Tokens
from lm.serve.connections import (
    ConnectionLimits,
    ConnectionTable,
    ForwardedMiddleware,
    client_address,
    is_trusted_proxy,
    open_listener,
    serve_in_thread,
)

STRICT = ConnectionLimits(
    max_open=40,
    max_per_address=40,
    header_bytes=4096,
    header_count=20,
    header_timeout=0.4,
    transfer_timeout=0.4,
    min_rate=4096,
)
STRICT = STRICT._replace(keep_alive=0.6, pipeline_bytes=100_000, drain_timeout=20.0)
ASK = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
Z = b"0\r\n\r\n"


async def parrot(scope, receive, send):
    """Answers path and length of the body; waits, where the query says so, for an event."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message["body"]), message["more_body"]
    if scope["query_string"]:
        await parrot.wait(scope["query_string"])
    head = {"path": scope["path"], "length": length, "client": scope["client"][0]}
    head["headers"] = [name.decode("latin-1") for name, _ in scope["headers"]]
    result = json.dumps(head).encode()
    if scope["path"] == "/long":
        result = b"x" * 50_000_000
    headers = [(b"content-length", b"%d" % len(result))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": result})


def place(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def connect(url, **how):
    return socket.create_connection(place(url), **{"timeout": PATIENCE} | how)


def until_closed(client):
    """All that comes; a reset is an error."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def dialogue(url, *parts):
    with connect(url) as client:
        for part in parts:
            client.sendall(part)
        return until_closed(client)


def statuses(heard):
    return [int(result) for result in re.findall(rb"HTTP/1.1 (\d{3})", heard)]


@pytest.fixture(scope="module")
def strict():
    with serve_in_thread(parrot, open_listener("127.0.0.1", 0), ConnectionTable(STRICT)) as url:
        yield url


@pytest.fixture
def polite(strict):
    with httpx.Client(base_url=strict, **UNPROXIED) as client:
        yield client


# What one connection may send


WRONG = {  # Name: what is sent, and the statuses that are heard before the server closes
    "a header without end": (b"GET / HTTP/1.1\r\nx: " + b"x" * 10_000, [431]),
    "a path without end": (b"GET /" + b"x" * 10_000, [431]),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 21 + b"\r\n", [431]),
    "many headers without end": (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 5000, [431]),
    "a name without end": (b"GET / HTTP/1.1\r\n" + b"x" * 10_000, [431]),
    "a slow head": (b"GET / HTTP/1.1\r\nHo", [408]),
    "nothing": (b"", []),
    "line breaks": (b"\r\n" * 10, []),
    "a slow body": (POST + b"Content-Length: 5\r\n\r\nab", [408]),
    "a slow chunk": (CHUNKED + b"5\r\nab", [408]),
    "chunks of a byte": (
        CHUNKED + b"1\r\nx\r\n" * 5000,
        [400],
    ),
    "trailers": (CHUNKED + b"0\r\n" + b"a: b\r\n" * 5000, [400]),
    "a long trailer": (CHUNKED + b"0\r\na: " + b"b" * 9999, [400]),
    "an extension": (CHUNKED + b"5;" + b"x" * 9999, [400]),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", [400]),
    "two equal lengths": (POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na", [400]),
    "a list of lengths": (POST + b"Content-Length: 1, 1\r\n\r\na", [400]),
    "length and chunks": (
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + Z + ASK,
        [400],
    ),
    "chunks and length": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + Z + ASK,
        [400],
    ),
    "an unknown coding": (POST + b"Transfer-Encoding: x\r\n\r\nabc", [400]),
    "chunked, then another": (POST + b"Transfer-Encoding: chunked, x\r\n\r\n" + Z, [400]),
    "a blank before the colon": (POST + b"Content-Length : 3\r\n\r\nabc", [400]),
    "a folded header": (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", [400]),
    "a bare line break": (b"GET / HTTP/1.1\nHost: a\n\n", [400]),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", [400]),
    "a huge length": (POST + b"Content-Length: 99999999999999999999\r\n\r\n", [400]),
    "a huge chunk": (CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "a tunnel": (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", [400]),
    "a zero byte": (b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n", [400]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_or_slow_request_is_answered_and_closed_without_a_reset(strict, polite, case):
    sent, expected = WRONG[case]
    heard = dialogue(strict, sent)
    assert statuses(heard) == expected, heard[:300]
    for body in re.findall(rb"\{.*\}", heard):
        assert {"error", "kind", "code", "advice"} <= json.loads(body).keys()
    assert polite.get("/").status_code == 200


RIGHT = {
    "in single bytes": [bytes([byte]) for byte in ASK] + [b""],
    "HTTP/0.9": [b"GET /\r\n\r\n"],
    "HTTP/1.0": [b"GET / HTTP/1.0\r\n\r\n"],
    "an absolute address": [b"GET http://b/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"],
    "another protocol": [ASK[:-2] + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n" + ASK],
    "a web socket": [
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    ],
    "a body in chunks": [CHUNKED + b"3\r\nabc\r\n" + Z],
}


@pytest.mark.parametrize("case", RIGHT)
def test_an_odd_but_right_request_is_answered(strict, case):
    assert statuses(dialogue(strict, *RIGHT[case])) == [200]


def test_trailers_are_not_passed_on(strict):
    trailer = b"Transfer-Encoding: chunked\r\n\r\n0\r\nAuthorization: x\r\n\r\n"
    body = json.loads(dialogue(strict, POST + trailer).split(b"\r\n\r\n")[1])
    assert body["headers"] == ["host", "transfer-encoding"]


def test_a_client_that_has_stated_all_still_gets_its_answer(strict):
    with connect(strict) as client:
        client.sendall(ASK)
        client.shutdown(socket.SHUT_WR)
        assert statuses(until_closed(client)) == [200]


def test_pipelined_requests_are_answered_in_their_order(strict):
    asked = b"".join(ASK.replace(b"/ ", b"/%d " % number) for number in range(2000))
    answers = re.findall(rb'"path": "/(\d+)"', dialogue(strict, asked))
    assert answers == [b"%d" % number for number in range(2000)]
    after = statuses(dialogue(strict, ASK * 3 + b"\x00nonsense" + ASK))
    assert after == [200] * 3  # What was right is answered; then it closes


class Gate:
    """Lets `parrot` wait for an event of the test."""

    def __init__(self):
        self.reached, self.opened = threading.Semaphore(0), threading.Event()

    async def wait(self, _):
        self.reached.release()
        while not self.opened.is_set():
            await asyncio.sleep(0.01)


@pytest.fixture
def gate(monkeypatch):
    made = Gate()
    monkeypatch.setattr(parrot, "wait", made.wait, raising=False)
    yield made
    made.opened.set()


def test_what_is_sent_ahead_of_an_answer_is_bounded(gate):
    connections = ConnectionTable(STRICT._replace(transfer_timeout=60))
    with (
        serve_in_thread(parrot, open_listener("127.0.0.1", 0), connections) as url,
        connect(url) as client,
    ):
        client.sendall(ASK.replace(b"/ ", b"/?wait "))
        assert gate.reached.acquire(timeout=PATIENCE)
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):  # The system takes no more
            while True:
                client.sendall(ASK * 2000)
        (there,) = connections.open["127.0.0.1"]
        assert len(there.pipeline) < 200 and len(there.ahead) < 2**19
        client.close()
        gate.opened.set()


def test_a_client_that_does_not_take_its_answer_is_cut_off(strict, polite):
    with connect(strict) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(ASK.replace(b"/ ", b"/long "))
        with pytest.raises(ConnectionResetError):  # So its memory is free again
            while True:
                time.sleep(0.05)
                client.send(b"x")
    assert polite.get("/").status_code == 200


# Many connections


def test_idle_connections_make_room_for_those_who_ask(strict, polite):
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(strict)) for _ in range(3 * STRICT.max_open)]
        begun = [stack.enter_context(connect(strict)) for _ in range(3 * STRICT.max_open)]
        for client in begun:
            client.send(b"G")
        for _ in range(5):
            assert httpx.get(strict, **UNPROXIED).status_code == 200
        assert polite.get("/").status_code == 200
        assert statuses(until_closed(idle[0])) == []


def test_slow_bodies_make_room_where_all_are_at_work(monkeypatch):
    monkeypatch.setattr(connections, "_SLOW_BODY", -1.0)
    held_connections = ConnectionTable(STRICT._replace(transfer_timeout=60, header_timeout=60))
    with (
        serve_in_thread(parrot, open_listener("127.0.0.1", 0), held_connections) as url,
        ExitStack() as stack,
    ):
        slow = [stack.enter_context(connect(url)) for _ in range(STRICT.max_open)]
        for client in slow:
            client.sendall(POST + b"Content-Length: 1000\r\n\r\n{")

        def states():
            return [one.state for one in list(held_connections.open.get("127.0.0.1", ()))]

        eventually(lambda: states() == ["body"] * STRICT.max_open)
        assert httpx.get(url, **UNPROXIED).status_code == 200
        assert statuses(until_closed(slow[0])) == [408]


def test_bodies_whose_request_was_refused_make_room():
    async def refuse(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    connections = ConnectionTable(STRICT._replace(transfer_timeout=60, header_timeout=60))
    with (
        serve_in_thread(refuse, open_listener("127.0.0.1", 0), connections) as url,
        ExitStack() as stack,
    ):
        for _ in range(3 * STRICT.max_open):
            client = stack.enter_context(connect(url))
            client.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
            assert client.recv(12) == b"HTTP/1.1 401"


def test_the_address_that_holds_most_makes_room_and_the_proxies_last():
    class One:
        def __init__(self, connections, address):
            self.key, self.transport, self.closed = connections.key_of(address), self, False
            self.table = connections

        def waits(self):
            return True

        def close(self):
            self.closed = True
            self.table.remove(self)

    connections = ConnectionTable(STRICT._replace(max_open=10, max_per_address=5), ["10.0.0.0/8"])
    addresses = ["10.0.0.1"] * 5 + ["203.0.113.7"] * 3 + ["2001:db8::1", "2001:db8::2"]
    there = [One(connections, address) for address in addresses]
    assert all(connections.admit(one) for one in there)
    assert all(connections.admit(One(connections, f"198.51.100.{number}")) for number in range(3))
    assert [one.closed for one in there] == [False] * 5 + [True, True, False] + [True, False]


def test_only_where_all_work_a_new_one_hears_503(strict, gate):
    with ExitStack() as stack:
        busy = [stack.enter_context(connect(strict)) for _ in range(STRICT.max_open)]
        for client in busy:
            client.sendall(ASK.replace(b"/ ", b"/?wait "))
        for _ in busy:
            assert gate.reached.acquire(timeout=PATIENCE)
        full = httpx.get(strict, **UNPROXIED)
        assert full.status_code == 503 and full.headers["retry-after"] == "1"
        assert "no connection free" in full.json()["error"]
        gate.opened.set()
        for client in busy:
            assert client.recv(12) == b"HTTP/1.1 200"
        assert httpx.get(strict, **UNPROXIED).status_code == 200


def test_one_address_has_its_part_and_a_trusted_proxy_all():
    limits = STRICT._replace(max_open=20, max_per_address=3, keep_alive=60, header_timeout=60)
    for trusted, most in (((), 3), (("127.0.0.0/8",), 20)):
        connections = ConnectionTable(limits, trusted)
        with (
            serve_in_thread(parrot, open_listener("127.0.0.1", 0), connections) as url,
            ExitStack() as stack,
        ):
            for _ in range(25):
                client = stack.enter_context(connect(url))
                client.sendall(ASK)
                assert client.recv(12) == b"HTTP/1.1 200"
            assert sum(map(len, connections.open.values())) == most


def test_a_service_answers_beside_two_thousand_idle_connections(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 6000:
        pytest.skip(f"this system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
    with Machine("monica", tmp_path) as machine, background(machine) as url, ExitStack() as stack:
        token = Tokens(machine.store.folder).create("anna", "viewer")
        for _ in range(2000):
            stack.enter_context(connect(url))
        shown = {"authorization": f"Bearer {token}"}
        for path in ("/health", "/health/live", "/health/ready", "/v1/status"):
            got = httpx.get(url + path, headers=shown, **UNPROXIED)
            assert got.status_code == 200


def test_a_body_that_was_cut_is_stored_nowhere(tmp_path):
    study = load_study("monica")
    row = read_rows(study)[["arrived", *study.feature_names]].iloc[0].to_dict()
    with Machine(study, tmp_path) as machine, background(machine) as url:
        token = Tokens(machine.store.folder).create("ehr", "machine")
        shown = f"Host: localhost\r\nAuthorization: Bearer {token}\r\n"
        for name, more in (("cut", 10), ("whole", 0)):
            sent = json_values({"row": row | {"record_id": name}, "now": row["arrived"]})
            body = json.dumps(sent).encode()
            head = f"POST /v1/records HTTP/1.1\r\n{shown}Content-Type: application/json\r\n"
            head += f"Content-Length: {len(body) + more}\r\n\r\n"
            with connect(url) as client:
                client.sendall(head.encode() + body)
                client.shutdown(socket.SHUT_WR)
                assert statuses(until_closed(client)) == ([] if more else [200])
        assert machine.has("whole") and not machine.has("cut")


# Behind proxies

NETWORK = ConnectionTable(trusted=["10.0.0.0/8", "fd00::/8"]).trusted
INSIDE = st.sampled_from(["10.0.0.0/8", "fd00::/8"]).flatmap(
    lambda network: st.ip_addresses(network=network).map(str)
)
OUTSIDE = st.ip_addresses().map(str).filter(lambda text: not is_trusted_proxy(text, NETWORK))
OUTSIDE = OUTSIDE.filter(lambda text: not text.startswith("::ffff:"))  # IPv4's, as IPv6 writes them
CLAIM = st.text(st.characters(max_codepoint=255), max_size=60) | st.ip_addresses().map(str)


@given(INSIDE, st.lists(CLAIM, max_size=30), OUTSIDE, st.lists(INSIDE, max_size=3))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_claim_of_a_client_changes_whom_the_proxies_saw(peer, claims, client, hops):
    """Proxies append whom they saw; all before that is the client's own text."""
    chain = ",".join([*claims, client, *hops]).encode("latin-1")
    assert client_address(peer, [chain], NETWORK) == client
    assert client_address("203.0.113.7", [chain], NETWORK) == "203.0.113.7"


def test_limits_of_strangers_count_by_the_address_that_a_trusted_proxy_says(tmp_path):
    def asked(app, *chain):
        """Status of a request without a token, from the proxy 127.0.0.1."""
        wire = httpx.ASGITransport(app, client=("127.0.0.1", 5000))
        headers = {"x-forwarded-for": ", ".join(chain)}
        asking = httpx.AsyncClient(transport=wire, base_url="http://lm", headers=headers)
        return asyncio.run(asking.get("/v1/status")).status_code

    for trusted, others in ((("127.0.0.0/8",), 401), ((), 429)):
        limits = RateLimits(strangers=2.0)
        middleware = AuthMiddleware(parrot, Tokens(tmp_path), limits=limits, clock=lambda: 0.0)
        app = ForwardedMiddleware(middleware, trusted)
        claimed = [asked(app, f"198.51.100.{number}", "203.0.113.7") for number in range(8)]
        assert claimed == [401] * 4 + [429] * 4  # Whatever it claims
        assert asked(app, "203.0.113.8") == others


def test_who_asks_too_often_loses_the_connection_and_what_was_asked_ahead(tmp_path):
    """RefusalLog cost time too: thousands of requests that come at once are not worked off."""
    limits = RateLimits(strangers=2.0)
    middleware = AuthMiddleware(parrot, Tokens(tmp_path), limits=limits, clock=lambda: 0.0)
    with serve_in_thread(middleware, open_listener("127.0.0.1", 0), ConnectionTable(STRICT)) as url:
        with connect(url) as client:
            with suppress(OSError):
                client.sendall(ASK * 3000)
            heard = b""
            with suppress(ConnectionResetError):  # What was not read is thrown away
                while part := client.recv(65536):
                    heard += part
        assert statuses(heard) == [401] * 4 + [429]
        assert heard.count(b"connection: close") == 1
        token = middleware.tokens.create("ehr", "machine")
        shown = {"authorization": f"Bearer {token}"}
        assert httpx.get(url, headers=shown, **UNPROXIED).status_code == 404


# The end


def requests_until_refused(url, number, results):
    """Ask over connections that stay open, then over new ones, until nothing listens."""
    body = b"x" * (number % 3 * 30_000)
    asked = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    while True:
        try:
            client = connect(url)
        except ConnectionRefusedError:
            return
        with client:
            while True:
                try:
                    client.sendall(asked * (1 + number % 2))
                    heard = b""
                    while heard.count(b'"headers"') < 1 + number % 2:
                        part = client.recv(65536)
                        if not part:
                            break
                        heard += part
                except OSError as error:
                    results.append((heard, repr(error)))
                    break
                results.append((heard, ""))
                if not part or b"connection: close" in heard:
                    break


def complete(heard):
    """How many answers are whole, or -1 where one is cut."""
    count, rest = 0, heard
    while rest:
        head, gap, rest = rest.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head)[1]) if gap else 1
        if len(rest) < length:
            return -1
        count, rest = count + 1, rest[length:]
    return count


@pytest.mark.slow
@pytest.mark.parametrize("round", range(6))
def test_the_end_of_a_server_cuts_no_answer(round):
    results = []
    connections = ConnectionTable(
        STRICT._replace(
            max_open=200, max_per_address=200, transfer_timeout=20, header_timeout=20, keep_alive=20
        )
    )
    with serve_in_thread(parrot, open_listener("127.0.0.1", 0), connections) as url:
        clients = [
            threading.Thread(target=requests_until_refused, args=(url, number, results))
            for number in range(24)
        ]
        for client in clients:
            client.start()
        eventually(lambda: len(results) >= 200 + 37 * round, 0.001)
    for client in clients:
        client.join(PATIENCE)
    assert len(results) > 200
    cut = [(heard[-200:], error) for heard, error in results if error or complete(heard) < 1]
    assert not cut, (len(cut), len(results), cut[:3])


@pytest.mark.slow
def test_the_end_answers_what_waits_in_the_systems_queue(gate):
    """Connections that the server has not accepted yet when it is asked to end."""
    with ExitStack() as stack:
        with serve_in_thread(parrot, open_listener("127.0.0.1", 0), ConnectionTable(STRICT)) as url:
            waiting = stack.enter_context(connect(url))
            waiting.sendall(ASK.replace(b"/ ", b"/?wait "))
            assert gate.reached.acquire(timeout=PATIENCE)
            late = [stack.enter_context(connect(url)) for _ in range(30)]
            for client in late:
                client.sendall(ASK)
            gate.opened.set()
        for client in (waiting, *late):
            heard = until_closed(client)
            assert statuses(heard) == [200] and complete(heard) == 1
        with pytest.raises(ConnectionRefusedError):
            connect(url)


@contextmanager
def service(home, *options):
    """A service as a process of its own, and what it printed first."""
    command = [sys.executable, "-m", "lm.cli.cli", "serve", "monica", "--port", "0", *options]
    environment = os.environ | {"LM_HOME": str(home)}
    how = {"stdout": subprocess.PIPE, "text": True, "cwd": find_root(), "env": environment}
    with subprocess.Popen(command, **how) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_sigterm_drains_and_health_is_answered_on_its_own_port(tmp_path):
    with service(tmp_path, "--health-port", "0") as process:
        probe = re.search(r"http://\S+", process.stdout.readline())[0]
        assert httpx.get(probe.replace("ready", "live"), **UNPROXIED).status_code == 200
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        token = re.search(r"lm_\S+", process.stdout.readline())[0]
        assert httpx.get(probe, **UNPROXIED).json() == {"ready": True}
        sent = {"authorization": f"Bearer {token}"}
        answers, errors = [], []

        def ask():
            with httpx.Client(base_url=url, headers=sent, **UNPROXIED) as client:
                while True:
                    try:
                        answers.append(client.get("/v1/status").status_code)
                    except httpx.ConnectError:
                        return
                    except httpx.TransportError as error:
                        errors.append(repr(error))

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        eventually(lambda: len(answers) >= 100)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(PATIENCE)
        assert process.wait(PATIENCE) == 0
        assert set(answers) <= {200, 429} and not errors

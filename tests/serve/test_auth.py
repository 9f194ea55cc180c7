"""Who may do what: every role on every route, tokens that end, a middleware that refuses."""

import asyncio
import base64
import errno
import hashlib
import hmac
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import httpx
import pandas as pd
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.routing import Mount, Route
from support.waiting import PATIENCE, UNPROXIED, eventually

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.serve.app import create_app
from lm.serve.auth import (
    LONGEST_TOKEN,
    PREFIX,
    REFUSALS,
    REQUEST_RATES,
    AuthMiddleware,
    Person,
    RateLimits,
    RefusalLog,
    TokenBuckets,
    Tokens,
    token_table,
)
from lm.serve.routes import (
    ANYBODY,
    JOB,
    PERMISSIONS,
    ROLES,
    TABLES,
    Rights,
    permission_table,
    unlisted,
    unused,
)

NOW = datetime(2031, 3, 1, 9, tzinfo=UTC)
LOOP = asyncio.new_event_loop()
SHUT = ("NoToken", "BadToken", "Expired", "Revoked", "Forbidden", "TokensDamaged")


class Clock:
    """Seconds that pass on command."""

    now = 0.0

    def __call__(self):
        return self.now


def call(app, method, path, *headers, client=("10.0.0.7", 5000), **more):
    """Status, headers and body of one request, straight through ASGI."""
    results = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        results.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": "", "query_string": b""}
    scope |= {"headers": list(headers), "client": client, "state": {}, **more}
    LOOP.run_until_complete(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in results)
    named = {key.decode().lower(): value.decode() for key, value in results[0]["headers"]}
    return results[0]["status"], named, body


def bearer(token):
    return (b"authorization", f"Bearer {token}".encode())


def ask(app, method, path, token=None, **more):
    """Status and what the JSON says."""
    status, headers, body = call(app, method, path, *([bearer(token)] if token else []), **more)
    assert not [name for name in headers if name.startswith("access-control")]
    return status, json.loads(body) if body else None


def filled(path):
    """A path that fits a template."""
    parts = [("a/7" if ":path" in p else "7") if p[:1] == "{" else p for p in path.split("/")]
    return "/".join(parts)


def app_of(permissions):
    """An application with one route for each line; it answers with the line."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for method, path in sorted(permissions, key=lambda line: "{" in line[1]):

        async def say(_, line=f"{method} {path}"):
            return JSONResponse(line)

        app.router.routes.append(Route(path, say, methods=[method]))
    return app


ALL = app_of(PERMISSIONS)


@pytest.fixture
def tokens(tmp_path):
    return Tokens(tmp_path)


@pytest.fixture
def by_role(tokens):
    """A token for each role."""
    return {role: tokens.create(role.replace(" ", "-"), role) for role in ROLES}


@pytest.fixture
def middleware(tokens):
    return AuthMiddleware(ALL, tokens, limits=RateLimits(dict.fromkeys(ROLES, 1e6), 1e6))


# Every role on every route


@pytest.mark.parametrize("role", [*ROLES, ANYBODY])
def test_a_role_uses_exactly_the_routes_of_its_lines(middleware, by_role, role):
    for line, who in PERMISSIONS.items():
        status, result = ask(middleware, line[0], filled(line[1]), by_role.get(role))
        if ANYBODY in who or role in who:
            assert (status, result) == (200, " ".join(line))
        elif role == ANYBODY:
            assert (status, result["kind"]) == (401, "NoToken"), line
        else:
            assert (status, result["kind"]) == (403, "Forbidden"), line
            assert f"{role} and may not {' '.join(line)}" in result["error"]


class Ward:
    """A stand-in for the machine: every method answers with nothing."""

    study = load_study("monica")

    def status(self):
        return {"study": "ward", "champion": 1, "counts": {}, "clock": None, "since": None}

    def __getattr__(self, name):
        tables = ("table", "known", "models", "risks", "waiting")
        return lambda *_, **__: pd.DataFrame() if name in tables else {}


@pytest.fixture(scope="module")
def service():
    return create_app(Ward(), Ward(), hosts=None)


def test_every_route_of_the_service_has_a_line(service):
    assert unlisted(service) == []
    assert not {"GET /health", "POST /v1/promotions", "GET /v1/tables/audit"} & set(unused(service))
    for name in TABLES:
        assert ("GET", f"/v1/tables/{name}") in PERMISSIONS


@pytest.mark.parametrize("role", ROLES)
def test_the_service_behind_the_token_check_lets_in_exactly_who_may(service, tokens, by_role, role):
    middleware = AuthMiddleware(service, tokens)
    gone = set(unused(service))
    for (method, path), who in PERMISSIONS.items():
        if f"{method} {path}" in gone:
            continue
        status, _, body = call(middleware, method, filled(path), bearer(by_role[role]))
        shut = status in (401, 403) and json.loads(body)["kind"] in SHUT
        assert shut is not (role in who or ANYBODY in who), f"{role} {method} {path}"


def test_what_single_patients_say_is_not_for_viewers_and_machines():
    private = ("records", "predictions", "explanations", "outcomes", "decisions", "rejects")
    lines = [("GET", f"/v1/tables/{n}") for n in (*private, "updates", "audit", "sketches", "new")]
    lines += [
        ("GET", "/v1/records/7"),
        ("GET", "/v1/patients"),
        ("GET", "/v1/models/3/risks"),
        ("GET", "/v1/audit"),
    ]
    for line in lines:
        assert not Rights().find(*line)[1] & {"viewer", "machine", ANYBODY}
    assert Rights().find("POST", "/v1/decisions")[1] == {"clinician", "admin"}
    assert Rights().find("POST", "/v1/outcomes")[1] == {"machine", "data scientist", "admin"}


def test_a_route_without_a_line_is_refused_to_all(tokens, by_role):
    app = FastAPI(docs_url=None, redoc_url=None)
    app.router.routes += [
        Route("/secret", lambda _: JSONResponse("secret"), methods=["GET", "POST"]),
        Mount("/files", app_of({})),
    ]

    @app.websocket("/live")
    async def live(socket):
        raise AssertionError("the middleware passes no websocket")

    assert unlisted(app) == [
        "GET /secret", "POST /secret", "Mount /files", "APIWebSocketRoute /live"
    ]  # fmt: skip
    middleware = AuthMiddleware(app, tokens)
    for role in ROLES:
        for path in ("/secret", "/files", "/files/x", "/live"):
            assert ask(middleware, "GET", path, by_role[role])[0] == 404
    assert ask(middleware, "GET", "/secret")[0] == 401


def test_the_printed_table_says_the_same():
    table = permission_table().set_index(["method", "path"])
    assert list(table.index) == list(PERMISSIONS)
    for line, who in PERMISSIONS.items():
        yes = {role for role in (*ROLES, JOB) if table.loc[line, role] == "yes"}
        assert yes == ({*ROLES, JOB} if ANYBODY in who else set(who))
        assert (table.loc[line, "no token"] == "yes") is (ANYBODY in who)


def test_no_path_leads_a_role_to_a_route_it_may_not_use(middleware, by_role):
    draw = random.Random(7)
    parts = sorted({part for _, path in PERMISSIONS for part in path.split("/")})
    marks = ["", "/", "//", "..", ".", "%2F", "\n", ";x", "?", "#", " ", "\\", "é", "\x00"]
    reached = set()
    for _ in range(1500):
        method, path = draw.choice(list(PERMISSIONS))
        bits = filled(path).split("/")
        bits[draw.randrange(len(bits))] += draw.choice([*marks, *parts])
        path, role = "/".join(bits), draw.choice(["viewer", "clinician", "machine"])
        more = {"root_path": draw.choice(["", "", "/v1/records", "/v1/tables"])}
        status, result = ask(middleware, method, path, by_role[role], **more)
        assert status in (200, 403, 404, 405), (path, status)
        if status == 200:
            reached.add(result)
            assert PERMISSIONS[tuple(result.split(" ", 1))] & {role, ANYBODY}, (role, path, result)
    assert len(reached) > 10


def test_the_prefix_of_a_proxy_is_read_as_the_router_reads_it(middleware, by_role):
    def get(path, role, root_path):
        return ask(middleware, "GET", path, by_role[role], root_path=root_path)

    assert get("/lm/v1/status", "viewer", "/lm") == (200, "GET /v1/status")
    assert get("/lm/v1/status", "viewer", "")[0] == get("/lmstatus", "viewer", "/lm")[0] == 404
    assert get("/v1/records/v1/patients", "clinician", "/v1/records") == (200, "GET /v1/patients")
    assert get("/v1/records/v1/audit", "clinician", "/v1/records")[0] == 403


def test_two_templates_that_fit_must_both_allow():
    lines = {("GET", "/a/{x}"): frozenset({ANYBODY}), ("GET", "/{x:path}"): frozenset(ROLES)}
    assert Rights(lines).find("GET", "/a/b") == ("/a/{x}", frozenset())


# Tokens


def test_a_token_is_random_and_stored_only_as_its_hash(tokens, tmp_path):
    made = [tokens.create(f"t{number}", "viewer") for number in range(20)]
    assert len(set(made)) == 20
    for token in made:
        assert token.startswith(PREFIX)
        assert len(base64.urlsafe_b64decode(token[len(PREFIX) :] + "=")) == 32
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for token in made:
        assert token.encode() not in written and token[3:20].encode() not in written
        assert hashlib.sha256(token.encode()).hexdigest().encode() in written
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert "sha256" not in token_table(tokens) and token_table(tokens)["ends"][0] == made[0][-4:]


def test_expiry_counts_to_the_moment(tmp_path):
    at = SimpleNamespace(now=NOW)
    tokens = Tokens(tmp_path, clock=lambda: at.now)
    short, never = tokens.create("short", "viewer", 1 / 24), tokens.create("never", "admin", None)
    middleware = AuthMiddleware(ALL, tokens)
    at.now = NOW + timedelta(minutes=60, microseconds=-1)
    assert ask(middleware, "GET", "/v1/status", short)[0] == 200
    at.now = NOW + timedelta(minutes=60)
    status, result = ask(middleware, "GET", "/v1/status", short)
    assert (status, result["kind"]) == (401, "Expired") and "short has expired" in result["error"]
    assert tokens.person(short, NOW) == Person("short", "viewer")
    assert tokens.person(short, (NOW + timedelta(hours=2)).replace(tzinfo=None)) is None
    assert tokens.person(never, NOW + timedelta(days=40_000)) == Person("never", "admin")
    assert token_table(tokens)["state"].tolist() == ["expired", "valid"]
    assert token_table(tokens)["expires"].tolist()[0] == pd.Timestamp("2031-03-01 10:00")


def test_a_revocation_by_another_process_counts_from_the_next_request(tokens, by_role, middleware):
    assert ask(middleware, "GET", "/v1/status", by_role["viewer"])[0] == 200
    code = "import sys; from lm.serve.auth import Tokens; Tokens(sys.argv[1]).revoke('viewer')"
    subprocess.run([sys.executable, "-c", code, tokens.path.parent], check=True)
    status, result = ask(middleware, "GET", "/v1/status", by_role["viewer"])
    assert (status, result["kind"]) == (401, "Revoked")
    assert ask(middleware, "GET", "/v1/status", by_role["clinician"])[0] == 200
    when = token_table(tokens).set_index("name").loc["viewer", "revoked"]
    tokens.revoke("viewer")
    assert token_table(tokens).set_index("name").loc["viewer", "revoked"] == when


def test_a_hundred_changes_in_a_row_are_each_seen_at_once(tokens):
    reader = Tokens(tokens.path.parent)
    for number in range(50):
        token = tokens.create(f"t{number}", "viewer")
        assert reader.person(token) == Person(f"t{number}", "viewer")
        tokens.revoke(f"t{number}")
        assert reader.person(token) is None


def test_a_change_is_later_than_the_one_before_whatever_the_clock_says(tokens):
    tokens.create("x", "viewer")
    ahead = time.time_ns() + 10**12
    os.utime(tokens.path, ns=(ahead, ahead))
    tokens.revoke("x")
    assert tokens.path.stat().st_mtime_ns > ahead


@pytest.mark.parametrize(
    ("name", "role", "days", "rule"),
    [
        ("", "viewer", 1, "not usable"),
        ("a  b", "viewer", 1, "not usable"),
        ("../x", "viewer", 1, "not usable"),
        ("a\n", "viewer", 1, "not usable"),
        ("a" * 65, "viewer", 1, "not usable"),
        ("LOCAL", "viewer", 1, "taken"),
        ("Anybody", "viewer", 1, "taken"),
        ("x", "root", 1, "choose one of viewer"),
        ("x", ANYBODY, 1, "choose one of viewer"),
        ("x", "viewer", 0, "above 0"),
        ("x", "viewer", -1, "above 0"),
        ("x", "viewer", float("nan"), "above 0"),
        ("x", "viewer", float("inf"), "above 0"),
        ("x", "viewer", True, "above 0"),
        ("x", "viewer", "90", "above 0"),
    ],
)
def test_senseless_tokens_are_refused(tokens, name, role, days, rule):
    with pytest.raises(LMError, match=rule):
        tokens.create(name, role, days)
    assert token_table(tokens).empty


def test_names_are_never_reused(tokens):
    tokens.create("ehr", "machine")
    tokens.revoke("ehr")
    for name in ("ehr", "EHR"):
        with pytest.raises(LMError, match="taken"):
            tokens.create(name, "admin")
    with pytest.raises(LMError, match="no token of 'absent', only: ehr"):
        tokens.revoke("absent")


def test_the_first_start_makes_one_admin(tmp_path):
    token = Tokens(tmp_path / "new").first()
    again = Tokens(tmp_path / "new")
    assert again.person(token) == Person("admin", "admin") and again.first() is None
    again.path.write_text("{")
    with pytest.raises(LMError, match="damaged"):
        again.first()


def test_the_local_token_is_in_no_file(tokens, tmp_path, middleware):
    token = tokens.local()
    assert token == tokens.local() != Tokens(tmp_path).local()
    assert tokens.person(token) == Person("local", "admin") and Tokens(tmp_path).identify(token)[1]
    tokens.create("x", "viewer")
    assert not [p for p in tmp_path.iterdir() if token.encode() in p.read_bytes()]
    assert ask(middleware, "POST", "/v1/promotions", token)[0] == 200


MAKE = """
import sys, time
from lm.serve.auth import Tokens
from lm.core.pseudonyms import Pseudonyms
folder, who = sys.argv[1:]
while time.time() % 1 > 0.1: time.sleep(0.002)
tokens = Tokens(folder)
first = tokens.first()
for number in range(15): tokens.create(f"{who}{number}", "viewer")
try: tokens.create("both", "viewer"); won = 1
except Exception: won = 0
print(int(first is not None), won, Pseudonyms(folder).of("m1"))
"""


def test_three_processes_may_create_at_once(tmp_path):
    text = [sys.executable, "-c", MAKE, str(tmp_path)]
    running = [subprocess.Popen([*text, who], stdout=subprocess.PIPE, text=True) for who in "abc"]
    reader, seen = Tokens(tmp_path), []
    while any(process.poll() is None for process in running):
        seen.append(len(token_table(reader)))  # Never half a file
        time.sleep(0.01)
    results = [process.communicate()[0].split() for process in running]
    assert sum(int(text[0]) for text in results) == sum(int(text[1]) for text in results) == 1
    assert len({text[2] for text in results}) == 1
    names = token_table(reader)["name"]
    assert len(names) == names.nunique() == 3 * 15 + 2 and seen == sorted(seen)


def test_a_full_disk_leaves_the_old_file(tokens, monkeypatch):
    token = tokens.create("ehr", "machine")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LMError, match="cannot be written: No space left"):
        tokens.revoke("ehr")
    assert tokens.person(token) == Person("ehr", "machine")
    assert sorted(p.name for p in tokens.path.parent.iterdir()) == ["tokens.json", "tokens.lock"]


def test_a_folder_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LMError, match=r"cannot be opened|damaged"):
        Tokens(tmp_path / "file").first()


# A file in doubt opens nothing


def damage(change):
    def spoil(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


DAMAGES = {
    "empty": lambda p: p.write_bytes(b""),
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "noise": lambda p: p.write_bytes(bytes(range(256))),
    "list": lambda p: p.write_text("[]"),
    "number": lambda p: p.write_text("7"),
    "null": lambda p: p.write_text("null"),
    "no list": lambda p: p.write_text('{"tokens": {"name": 1}}'),
    "deep": lambda p: p.write_text("[" * 100_000),
    "utf-16": lambda p: p.write_bytes("{}".encode("utf-16")),
    "no tokens": damage(lambda c: c.pop("tokens")),
    "role": damage(lambda c: c["tokens"][0].update(role="root")),
    "open role": damage(lambda c: c["tokens"][0].update(role=ANYBODY)),
    "role list": damage(lambda c: c["tokens"][0].update(role=["admin"])),
    "more fields": damage(lambda c: c["tokens"][0].update(also=1)),
    "fewer fields": damage(lambda c: c["tokens"][0].pop("expires")),
    "name": damage(lambda c: c["tokens"][0].update(name="../x")),
    "number as name": damage(lambda c: c["tokens"][0].update(name=7)),
    "local": damage(lambda c: c["tokens"][0].update(name="Local")),
    "hash": damage(lambda c: c["tokens"][0].update(sha256="0" * 63)),
    "no hash": damage(lambda c: c["tokens"][0].update(sha256=None)),
    "time": damage(lambda c: c["tokens"][0].update(expires="soon")),
    "zone": damage(lambda c: c["tokens"][0].update(expires="2031-03-01T09:00:00")),
    "time as number": damage(lambda c: c["tokens"][0].update(expires=9e99)),
    "no creation": damage(lambda c: c["tokens"][0].update(created=None)),
    "twice": damage(lambda c: c["tokens"].append(c["tokens"][0])),
    "same hash": damage(lambda c: c["tokens"][1].update(sha256=c["tokens"][0]["sha256"])),
    "same name": damage(lambda c: c["tokens"][1].update(name=c["tokens"][0]["name"].upper())),
    "readable": lambda p: p.chmod(0o604),
    "world": lambda p: p.chmod(0o602),
    "folder": lambda p: (p.unlink(), p.mkdir()),
}

IN_DOUBT = r"tokens.json (is damaged \(.+\): mend it|may be used by others .+: chmod 600)"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_opens_for_no_user_and_says_so(tokens, middleware, kind, caplog):
    held = [tokens.create("anna", "clinician"), tokens.create("root", "admin")]
    assert ask(middleware, "GET", "/v1/status", held[0])[0] == 200
    stored = tokens.path.read_bytes()
    DAMAGES[kind](tokens.path)
    for token in held:
        status, result = ask(middleware, "GET", "/v1/status", token)
        assert (status, result["kind"]) == (503, "TokensDamaged")
    for act in (
        lambda: tokens.person(held[0]),
        lambda: token_table(tokens),
        lambda: tokens.create("x", "viewer"),
    ):
        with pytest.raises(LMError, match=IN_DOUBT):
            act()
    assert caplog.text.count("is damaged") + caplog.text.count("may be used") == 1
    assert not [token for token in held if token in caplog.text]
    assert ask(middleware, "GET", "/v1/status", tokens.local())[0] == 200
    assert ask(middleware, "GET", "/health")[0] == 200
    if kind == "folder":
        tokens.path.rmdir()
    tokens.path.write_bytes(stored)
    tokens.path.chmod(0o600)
    assert ask(middleware, "GET", "/v1/status", held[0])[0] == 200


def test_without_a_file_no_user_gets_in(tokens, by_role, middleware):
    tokens.path.unlink()
    assert ask(middleware, "GET", "/v1/status", by_role["admin"])[1]["kind"] == "BadToken"
    tokens.path.write_text('{"tokens": []}')
    tokens.path.chmod(0o600)
    assert ask(middleware, "GET", "/v1/status", by_role["admin"])[1]["kind"] == "BadToken"


# The header


def test_wrong_headers_are_refused(tokens, by_role, middleware):
    good = by_role["admin"].encode()
    basic = base64.b64encode(b"admin:" + good)
    wrong = [
        b"", b"Bearer", b"Bearer ", good, b"Basic " + good, b"Token " + good, b"Bearer" + good,
        b"Bearer\t" + good, b"Bearer " + good + b" x", b"Bearer " + good[:-1], b"Bearer x" + good,
        b"Bearer " + good.upper(), b"Bearer " + good + b"\x00", b"Bearer \xff\xfe" + good,
        "Bearer lm_ü€😀".encode(), b"Bearer " + b"a" * 10**6, b"Bearer " + good * 1000,
        b"Bearer " + hashlib.sha256(good).hexdigest().encode(), b"Bearer " + b"0" * 64,
        b"Bearer " + basic, b"Basic " + basic[:-4], b"Basic " + basic + b"!", b"Basic",
        b"Basic " + base64.b64encode(good), b"Basic " + base64.b64encode(good + b":"),
        b"Basic " + base64.b64encode(b"admin:" + good + b":x"), b"Basic " + base64.b64encode(b":"),
        b"Basic " + base64.b64encode("admin:ü€".encode()), b"Basic \xff\xfe",
        b"Basic " + base64.b64encode(b"a" * 10**6),
        b"Basic " + base64.b64encode(b"admin:\x00" + good),
    ]  # fmt: skip
    for value in wrong:
        status, headers, body = call(middleware, "GET", "/v1/status", (b"authorization", value))
        assert (status, json.loads(body)["kind"]) == (401, "BadToken"), value[:40]
        assert headers["www-authenticate"].endswith('error="invalid_token"')
    for scheme in (b"Bearer", b"bearer", b"BEARER"):
        for gap in (b" ", b"   "):
            assert (
                call(middleware, "GET", "/v1/status", (b"authorization", scheme + gap + good))[0]
                == 200
            )
    for name in ("admin", "", "Zoë", "viewer", "x" * 200):
        shown = b"bAsIc " + base64.b64encode(f"{name}:".encode() + good)
        assert call(middleware, "GET", "/v1/status", (b"authorization", shown))[0] == 200
    twice = (bearer(by_role["admin"]), bearer(by_role["admin"]))
    assert call(middleware, "GET", "/v1/status", *twice)[0] == 401
    assert len(good) < LONGEST_TOKEN


def test_a_token_counts_only_in_its_header(by_role, middleware):
    token = by_role["admin"].encode()
    for query in (b"access_token=", b"token=", b"authorization=Bearer%20"):
        assert call(middleware, "GET", "/v1/status", query_string=query + token)[0] == 401
    for name in (b"cookie", b"x-api-key", b"proxy-authorization", b"x-authorization"):
        assert call(middleware, "GET", "/v1/status", (name, b"Bearer " + token))[0] == 401


@pytest.mark.parametrize("odd", [None, 7, b"lm_x", "é", "\ud800", "", "a" * 10**6, ["x"]])
def test_odd_values_are_no_user(tokens, odd):
    tokens.create("x", "viewer")
    assert tokens.person(odd) is None


def test_hashes_are_compared_in_constant_time(tokens, monkeypatch):
    token, compared, real = tokens.create("x", "viewer"), [], hmac.compare_digest

    def watch(one, other):
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    assert tokens.person(token) and not tokens.person(token[:-1] + "?")
    assert not Tokens(tokens.path.parent / "none").person(token)
    assert compared == [(64, 64)] * 6  # The local one and the file's, found or not


def test_pages_from_elsewhere_get_nothing(middleware, by_role):
    asked = [(b"origin", b"https://evil.example"), (b"access-control-request-method", b"POST")]
    for path in ("/v1/records", "/health", "/v1/status"):
        for more in ([], [bearer(by_role["admin"])]):
            status, headers, _ = call(middleware, "OPTIONS", path, *asked, *more)
            assert status in (401, 405)
            assert not [name for name in headers if name.startswith("access-control")]
    _, headers, _ = call(middleware, "OPTIONS", "/v1/records", bearer(by_role["admin"]))
    assert headers["allow"] == "POST"


def test_head_is_get_without_a_body(middleware, by_role):
    _, got, body = call(middleware, "GET", "/v1/status", bearer(by_role["viewer"]))
    status, headers, nothing = call(middleware, "HEAD", "/v1/status", bearer(by_role["viewer"]))
    assert (status, headers, nothing) == (200, got, b"") and int(got["content-length"]) == len(body)
    assert call(middleware, "HEAD", "/v1/tables/records", bearer(by_role["viewer"]))[::2] == (
        403,
        b"",
    )
    assert call(middleware, "HEAD", "/v1/promotions", bearer(by_role["admin"]))[0] == 405
    assert call(middleware, "HEAD", "/health")[::2] == (200, b"")


def test_the_application_learns_who_asks(tokens, by_role):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["state"]["person"])
        await JSONResponse(1)(scope, receive, send)

    middleware = AuthMiddleware(app, tokens)
    call(middleware, "GET", "/v1/status", bearer(by_role["viewer"]))
    call(middleware, "GET", "/health", bearer(by_role["viewer"]))
    assert seen == [Person("viewer", "viewer"), None]
    tokens.revoke("viewer")
    state = {}
    call(middleware, "GET", "/v1/status", bearer(by_role["viewer"]), state=state)
    assert len(seen) == 2 and state == {"person": None}


def test_websockets_are_closed_and_the_life_of_the_server_passes(tokens):
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    async def send(message):
        sent.append(message)

    middleware = AuthMiddleware(app, tokens)
    LOOP.run_until_complete(middleware({"type": "websocket", "path": "/health"}, None, send))
    LOOP.run_until_complete(middleware({"type": "lifespan"}, None, send))
    assert passed == ["lifespan"] and sent == [{"type": "websocket.close", "code": 1008}]


# How often


def test_a_person_has_a_rate_and_gets_it_back(tokens, by_role):
    clock = Clock()
    middleware = AuthMiddleware(
        ALL, tokens, limits=RateLimits({"viewer": 5.0, "machine": 1000.0}), clock=clock
    )
    got = [ask(middleware, "GET", "/v1/status", by_role["viewer"])[0] for _ in range(12)]
    assert got == [200] * 10 + [429] * 2
    status, headers, body = call(middleware, "GET", "/v1/status", bearer(by_role["viewer"]))
    assert (status, headers["retry-after"], json.loads(body)["kind"]) == (429, "1", "TooMany")
    assert "wait 1 s" in json.loads(body)["error"]
    assert ask(middleware, "GET", "/v1/status", by_role["clinician"])[0] == 200
    clock.now = 0.2
    got = [ask(middleware, "GET", "/v1/status", by_role["viewer"])[0] for _ in range(2)]
    assert got == [200, 429]
    for second in range(1, 4):  # A thousand a second go on for as long as one likes
        clock.now = float(second)
        got = {ask(middleware, "POST", "/v1/records", by_role["machine"])[0] for _ in range(1000)}
        assert got == {200}
    assert REQUEST_RATES["machine"] >= 1000


def test_strangers_pay_per_address_and_never_for_others(tokens, by_role):
    clock = Clock()
    middleware = AuthMiddleware(ALL, tokens, limits=RateLimits(strangers=2.0), clock=clock)

    def knock(address="203.0.113.9", token="lm_guess"):
        return ask(middleware, "GET", "/v1/status", token, client=(address, 1))[0]

    assert [knock() for _ in range(6)] == [401] * 4 + [429] * 2
    assert knock("203.0.113.10") == 401
    assert ask(middleware, "GET", "/health", client=("203.0.113.9", 1))[0] == 200
    assert knock(token=by_role["viewer"]) == 200
    six = [knock(f"2001:db8:1:2::{number:x}") for number in range(6)]
    assert six == [401] * 4 + [429] * 2 and knock("2001:db8:1:3::1") == 401
    assert [knock(f"::ffff:203.0.113.{number}") for number in range(20, 26)] == [401] * 6
    clock.now = 1.0
    assert [knock() for _ in range(3)] == [401, 401, 429]
    no_one = {"client": None, "headers": []}
    assert [ask(middleware, "GET", "/v1/status", **no_one)[0] for _ in range(5)] == [401] * 4 + [
        429
    ]


def test_memory_and_log_stay_bounded_under_attack(tokens, by_role):
    clock, heard = Clock(), []
    middleware = AuthMiddleware(ALL, tokens, RefusalLog(heard.append, clock=clock), clock=clock)
    middleware.limits.addresses.most = 500
    for number in range(3000):
        address = f"10.{number >> 8 & 255}.{number & 255}.1"
        ask(middleware, "GET", f"/v1/records/{number}", "lm_guess", client=(address, 1))
    assert len(middleware.limits.addresses) == 500 and len(middleware.log) == len(heard) == 101
    assert ask(middleware, "GET", "/v1/patients", by_role["viewer"])[0] == 403
    assert heard[-1]["who"] == "viewer"  # A crowd of strangers does not hide a person
    clock.now = 60.0
    assert ask(middleware, "GET", "/v1/status", by_role["viewer"])[0] == 200
    assert sum(entry["refusals"] for entry in heard) == 3001 and len(heard) == 103
    clock.now = 120.0
    assert ask(middleware, "GET", "/v1/status", by_role["viewer"])[0] == 200
    assert len(middleware.log) == 0 and len(heard) == 103
    for number in range(2000):
        middleware.limits.persons.take(number, 1.0, 0.0)
    assert len(middleware.limits.persons) <= TokenBuckets().most == 10_000


# What the audit log hears


def test_nothing_refused_goes_uncounted_or_is_reported_more_than_once_a_minute():
    draw, clock, heard, refused = random.Random(3), Clock(), [], 0
    refusals = RefusalLog(lambda entry: heard.append((clock.now, entry)), most=5, clock=clock)
    for _ in range(2000):
        clock.now += draw.choice([0.0, 0.1, 5.0])
        who, named = draw.choice([(f"10.0.0.{draw.randrange(9)}", False), ("anna", True)])
        refusals.count({"who": who, "kind": "Forbidden"}, named)
        refused += 1
    refusals.sweep()
    assert sum(entry["refusals"] for _, entry in heard) == refused
    last = {}
    for at, entry in heard[:-7]:
        assert at - last.get(entry["who"], -60.0) >= 60.0 - 1e-9
        last[entry["who"]] = at
    assert "other addresses" in last and "anna" in last


def test_an_entry_says_who_what_and_how_often_but_no_patient(tokens, by_role):
    clock, heard = Clock(), []
    middleware = AuthMiddleware(ALL, tokens, RefusalLog(heard.append, clock=clock), clock=clock)
    for number in range(7):
        ask(middleware, "GET", f"/v1/records/patient-{number}", by_role["machine"])
    middleware.log.sweep()
    entry = {"who": "machine", "address": "10.0.0.7", "role": "machine", "kind": "Forbidden"}
    entry |= {"status": 403, "request": "GET /v1/records/{record_id:path}"}
    assert heard == [entry | {"refusals": 1}, entry | {"refusals": 6}]
    ask(middleware, "GET", "/no/patient-8", "lm_guess")
    ask(middleware, "SECRET-9" * 10, "/v1/status", "lm_guess", client=("10.0.0.8", 1))
    assert heard[-1]["request"] == heard[-2]["request"] == "no route of the table"
    ask(middleware, "GET", "/no/route", by_role["viewer"])
    assert len(heard) == 4  # A mistyped path is no failed access


def test_a_log_that_fails_or_is_slow_harms_no_request(tokens, caplog):
    def broken(_):
        raise RuntimeError("the store is closed")

    assert ask(AuthMiddleware(ALL, tokens, RefusalLog(broken)), "GET", "/v1/status")[0] == 401
    assert "1 refusals of access could not be written" in caplog.text
    held, heard = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        slow = RefusalLog(lambda entry: (held.wait(PATIENCE), heard.append(entry)), pool)
        assert ask(AuthMiddleware(ALL, tokens, slow), "GET", "/v1/status")[0] == 401 and heard == []
        held.set()
    assert len(heard) == 1


def test_no_token_shows_up_anywhere(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    tokens, heard = Tokens(tmp_path), []
    held = [tokens.first(), tokens.local(), tokens.create("x", "viewer"), "lm_guessed-by-one"]
    middleware = AuthMiddleware(ALL, tokens, RefusalLog(heard.append))
    results = [ask(middleware, "POST", "/v1/promotions", token) for token in held]
    tokens.revoke("x")
    results += [ask(middleware, "GET", "/v1/status", held[2])]
    tokens.path.write_text("{" + held[2])
    results += [ask(middleware, "GET", "/v1/status", held[2])]
    with pytest.raises(LMError) as error:
        tokens.person(held[2])
    middleware.log.sweep()
    things = [
        tokens,
        middleware,
        middleware.log,
        middleware.limits.persons,
        heard,
        results,
        error.value,
        caplog.text,
    ]
    text = " ".join(f"{thing!r} {thing}" for thing in [*things, *capfd.readouterr()])
    assert not [token for token in held if token[4:] in text]


def test_every_refusal_is_a_code_and_a_sentence():
    for kind, (status, sentence) in REFUSALS.items():
        assert status in (401, 403, 404, 405, 429, 503) and kind.isidentifier()
        assert "\n" not in sentence and not sentence.endswith(".")


# Through a real server


def test_the_token_check_over_a_socket(tokens, by_role):
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        AuthMiddleware(ALL, tokens), log_level="error", lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", **UNPROXIED) as http:
            good = {"Authorization": f"Bearer {by_role['viewer']}"}
            assert http.get("/health").json() == "GET /health"
            assert http.get("/v1/status").status_code == 401
            assert http.get("/v1/status", headers=good).json() == "GET /v1/status"
            assert http.head("/v1/status", headers=good).content == b""
            assert http.get("/v1/tables%2Fverdicts", headers=good).status_code == 200
            for path in (
                "/v1/tables%2Frecords",
                "/v1/tables/verdicts%2F..%2Frecords",
                "/v1/%70romotions",
            ):
                assert http.request("POST", path, headers=good).status_code in (403, 404, 405)
            body = b"x" * 2**20  # Refused before it is read
            assert http.post("/v1/promotions", content=body, headers=good).status_code == 403
            assert http.get("/v1/status", headers=good).status_code == 200
            long = {"Authorization": "Bearer " + "a" * 30_000}
            assert http.get("/v1/status", headers=long).status_code == 401
        for raw in (
            b"GET /v1/status HTTP/1.1\r\nAuthorization: " + b"B" * 200_000,
            b"\x16\x03\x01\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as wire:
                wire.sendall(raw + b"\r\n\r\n")
                assert wire.recv(12)[9:10] == b"4"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()

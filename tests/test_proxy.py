"""Behind a reverse proxy: names, a path before all others, addresses; and no compressed body."""

import gzip
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest

from lm.access import PERMISSIONS, Tokens
from lm.api import DIRECT, Guard, Proxy, background, declared_proxy, path_prefix
from lm.client import Client
from lm.machine import Machine
from lm.panels import voila_command
from lm.settings import LMError

NAME = "ml.hospital.example"
TEXT = {"capture_output": True, "text": True}
HERE = Proxy(names=(NAME,), prefix="/lm", trusted=("127.0.0.1/32",))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url, **how):
    """The first response, as soon as something listens."""
    for _ in range(600):
        try:
            return httpx.get(url, trust_env=False, **how)
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"nothing listens at {url}")


@contextmanager
def nginx(folder, location):
    """The address of an nginx with one location block."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if not program:
        pytest.skip("nginx is not installed")
    folder.mkdir()
    port, kinds = free_port(), ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    upgrade = "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $upgrade;"
    chain = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_http_version 1.1;"
    location = location.replace("proxy_pass", f"{upgrade} {chain} proxy_pass")
    (folder / "nginx.conf").write_text(f"""
        daemon off; pid {folder}/pid; error_log {folder}/error.log;
        events {{}}
        http {{
            access_log off; {places}
            map $http_upgrade $upgrade {{ default upgrade; "" close; }}
            server {{
                listen 127.0.0.1:{port};
                {location}
            }}
        }}""")
    started = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"])
    try:
        answers(f"http://127.0.0.1:{port}/")
        yield f"http://127.0.0.1:{port}"
    finally:
        started.terminate()
        started.wait(10)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with Machine("monica", tmp_path_factory.mktemp("home")) as machine:
        yield machine


# The service

WAYS = {  # How administrators write it; HOST is the service's address
    "path and name kept": "location /lm/ { proxy_pass http://HOST; proxy_set_header Host $host; }",
    "path taken off": "location /lm/ { proxy_pass http://HOST/; proxy_set_header Host $host; }",
    "another name": "location /lm/ { proxy_pass http://HOST/; }",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_client_works_through_nginx(machine, tmp_path, way):
    with background(machine, proxy=HERE) as url:
        token = Tokens(machine.store.folder).create(way, "data scientist")
        location = WAYS[way].replace("HOST", url.removeprefix("http://"))
        with nginx(tmp_path / "nginx", location) as front:
            shown = {"authorization": f"Bearer {token}", "host": NAME}
            page = {**shown, "origin": f"https://{NAME}"}
            for headers in (shown, page):
                status = answers(f"{front}/lm/status", headers=headers)
                assert (status.status_code, status.json()["study"]) == (200, "monica"), status.text
            document = answers(f"{front}/lm/openapi.json", headers=shown).json()
            assert document["servers"] == [{"url": "/lm"}]
            assert answers(f"{front}/lm/nothing", headers=shown).status_code == 404
            evil = {**shown, "origin": "https://evil.example"}
            assert answers(f"{front}/lm/status", headers=evil).status_code == 403
            with Client(f"{front}/lm", token=token) as client:
                client._http.headers["host"] = NAME
                assert client.status()["study"] == "monica"
                assert client.table("audit").shape[0] >= 0
            for direct in (url, f"{url}/lm"):
                assert answers(f"{direct}/health").json()["study"] == "monica"


def test_a_name_and_a_path_that_are_not_declared_are_refused(machine):
    with background(machine) as url:
        asked = answers(f"{url}/health", headers={"host": NAME})
        assert asked.status_code == 403 and "--allow-host" in asked.json()["error"]
        assert answers(f"{url}/lm/health").status_code == 401
    with background(machine, host="0.0.0.0", proxy=Proxy(names=(NAME,))) as url:
        assert answers(f"{url}/health", headers={"host": NAME.upper()}).status_code == 200
        assert answers(f"{url}/health", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(("proxy", "who"), [(HERE, "203.0.113.7"), (DIRECT, "127.0.0.1")])
def test_an_address_from_a_header_counts_only_from_a_trusted_proxy(machine, proxy, who):
    before = len(machine.table("audit"))
    with background(machine, proxy=proxy) as url:
        claimed = {"x-forwarded-for": "198.51.100.9, 203.0.113.7"}
        assert answers(f"{url}/status", headers=claimed).status_code == 401
    log = machine.table("audit").iloc[before:]
    kept = [json.loads(text) for text in log.loc[log["kind"] == "access", "content"]]
    assert [entry["address"] for entry in kept] == [who]


def test_what_is_declared_is_checked(monkeypatch):
    monkeypatch.setenv("LM_ALLOW_HOSTS", f"{NAME}, b.example")
    monkeypatch.setenv("LM_ROOT_PATH", "lm/v1/")
    monkeypatch.setenv("LM_TRUST_PROXY", "10.1.2.3,10.0.0.0/8")
    expected = ((NAME, "b.example"), "/lm/v1", ("10.1.2.3/32", "10.0.0.0/8"))
    assert declared_proxy() == expected
    assert declared_proxy(["a.example"], "/").names == ("a.example", NAME, "b.example")
    assert declared_proxy([], "/").prefix == ""
    for names in (["https://a.example"], ["a.example:443"], ["a.example/lm"], [""], ["*"]):
        with pytest.raises(LMError, match=r"--allow-host .* must be a host name"):
            declared_proxy(names)
    for prefix in ("/a b", "/a?b", "/../a", "//a//b", "http://a", "/records", "/v2/x"):
        with pytest.raises(LMError, match=r"--root-path .* must be a path"):
            path_prefix(prefix)
    for address in ("proxy", "*", "10.0.0.1:80"):
        with pytest.raises(LMError, match=r"--trust-proxy .* must be an address"):
            declared_proxy(trusted=[address])


def test_the_commands_name_the_options_and_refuse_in_one_line():
    for verb, options in {
        "serve": ("--allow-host", "--root-path", "--trust-proxy", "LM_ALLOW_HOSTS"),
        "dashboards": ("--allow-host", "--base-path", "LM_BASE_PATH"),
    }.items():
        told = subprocess.run([sys.executable, "-m", "lm.cli", verb, "--help"], **TEXT).stdout
        assert all(option in told for option in options)
        words = [sys.executable, "-m", "lm.cli", verb, "monica", "--allow-host", "https://a"]
        ran = subprocess.run(words, **TEXT)
        assert ran.returncode == 2 and ran.stderr.startswith("lm: --allow-host 'https://a' must")
        assert ran.stderr.count("\n") == 1


# The pages


def test_pages_that_others_can_reach_need_a_token(monkeypatch):
    monkeypatch.delenv("LM_DASHBOARD_TOKEN", raising=False)
    with pytest.raises(LMError, match=f"on {NAME} needs LM_DASHBOARD_TOKEN"):
        voila_command(1, names=(NAME,))
    monkeypatch.setenv("LM_DASHBOARD_TOKEN", "x")
    assert "--Voila.base_url=/pages/" in voila_command(1, names=(NAME,), base="/pages")


def opened(url, headers):
    """Whether a web socket opens: "open", or the status with which it is refused."""
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.ioloop import IOLoop
    from tornado.websocket import websocket_connect

    async def connect():
        (await websocket_connect(HTTPRequest(url, headers=headers))).close()
        return "open"

    try:
        return IOLoop().run_sync(connect, timeout=60)
    except HTTPClientError as error:
        return error.code


def test_a_page_is_drawn_through_nginx_below_a_path(tmp_path, monkeypatch):
    """Page, scripts and web socket of a small notebook, with our settings of Voila."""
    import nbformat

    monkeypatch.setenv("LM_DASHBOARD_TOKEN", "secret")
    monkeypatch.setenv("LM_ALLOW_HOSTS", NAME)
    folder = tmp_path / "pages"
    folder.mkdir()
    cell = nbformat.v4.new_code_cell("print(6 * 7, 'is shown')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "small.ipynb")
    port = free_port()
    command = voila_command(port, folder=folder, names=(NAME,), base="/pages")
    location = f"location /pages/ {{ proxy_pass http://127.0.0.1:{port};"
    location += " proxy_set_header Host $http_host; }"
    voila = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        answers(f"http://127.0.0.1:{port}/pages/")
        with nginx(tmp_path / "nginx", location) as front:
            address = f"{front}/pages/voila/render/small.ipynb?token=secret"
            shown = {"host": NAME, "authorization": "token secret"}
            page = answers(address, headers=shown, timeout=120)
            assert page.status_code == 200 and "42 is shown" in page.text
            assert answers(address, headers={"host": "evil.example"}).status_code == 403
            linked = re.findall(r'(?:src|href)="(/[^"]+\.(?:js|css))', page.text)
            assert linked and all(link.startswith("/pages/") for link in linked)
            assert answers(f"{front}{linked[0]}", headers=shown).status_code == 200
            kernel = re.search(r'"kernelId": "([^"]+)"', page.text)[1]
            place = f"{front}/pages/api/kernels/{kernel}/channels?token=secret"
            socket_of = place.replace("http", "ws", 1)
            assert opened(socket_of, {"Host": NAME, "Origin": f"http://{NAME}"}) == "open"
            without = socket_of.split("?")[0]
            for origin in (f"http://{NAME}", "http://evil.example"):
                assert opened(without, {"Host": NAME, "Origin": origin}) == 403
    finally:
        voila.send_signal(signal.SIGTERM)
        voila.wait(20)


# Compressed bodies


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP"])
def test_a_compressed_body_has_one_answer_at_every_route(machine, coding):
    posts = sorted(path for method, path in PERMISSIONS if method == "POST")
    assert len(posts) > 15
    body = gzip.compress(b'{"rows": []}')
    kinds = ("application/json", "text/csv", "application/vnd.apache.arrow.stream")
    with background(machine) as url:
        token = f"Bearer {Tokens(machine.store.folder).local()}"
        for path in posts:
            for kind in kinds:
                headers = {"content-encoding": coding, "content-type": kind, "authorization": token}
                where = url + re.sub(r"{[^}]*}", "1", path)
                told = httpx.post(where, content=body, headers=headers, trust_env=False)
                assert told.status_code == 415, (path, told.text)
                assert told.json()["error"] == (
                    "a compressed body is not taken: send it without Content-Encoding"
                )


def test_an_identity_coding_is_no_coding():
    for coding in ("identity", "Identity", ""):
        headers = {"host": "localhost", "content-encoding": coding}
        assert Guard(None, ("localhost",)).refusal(headers, 10) is None

"""Behind a reverse proxy: names, a path before all others, addresses; and no compressed body."""

import asyncio
import gzip
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from support.waiting import PATIENCE, UNPROXIED, eventually

from lm.core.errors import LMError
from lm.core.settings import find_root
from lm.machine.machine import Machine
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client
from lm.serve.middleware import DIRECT, HeaderChecks, HostCheck, Proxy, declared_proxy, path_prefix
from lm.serve.routes import PERMISSIONS
from lm.ui.server import voila_command

NAME = "ml.hospital.example"
TEXT = {"capture_output": True, "text": True}
HERE = Proxy(names=(NAME,), prefix="/lm", trusted=("127.0.0.1/32",))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url, **how):
    """The first response, as soon as something listens."""

    def ask():
        try:
            return [httpx.get(url, **UNPROXIED | how)]
        except httpx.TransportError:
            return []

    return eventually(ask, 0.1)[0]


@contextmanager
def started(folder, text, front):
    """An nginx with this text in its http block, once it answers at `front`."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if not program:
        pytest.skip("nginx is not installed")
    places = "".join(
        f"{kind}_temp_path {folder}/{kind}; "
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {places}\n{text}\n}}"
    )
    process = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"])
    try:
        answers(front, verify=False)
        yield front
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def nginx(folder, location):
    """The address of an nginx with one location block."""
    folder.mkdir()
    port = free_port()
    upgrade = "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $upgrade;"
    chain = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_http_version 1.1;"
    location = location.replace("proxy_pass", f"{upgrade} {chain} proxy_pass")
    switch = 'map $http_upgrade $upgrade { default upgrade; "" close; }'
    server = f"server {{ listen 127.0.0.1:{port}; {location} }}"
    with started(folder, f"{switch}\n{server}", f"http://127.0.0.1:{port}/") as front:
        yield front.rstrip("/")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for our name and this computer, and its key."""
    program = shutil.which("openssl")
    if not program:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "certificate.pem", folder / "key.pem"
    command = [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-out"]
    command += [files[0], "-keyout", files[1], "-subj", f"/CN={NAME}"]
    command += ["-addext", f"subjectAltName=DNS:{NAME},IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return files


@contextmanager
def shipped(folder, certificate, service="127.0.0.1:1", pages="127.0.0.1:1"):
    """The address of an nginx with the configuration of OPERATIONS.md, as it stands there."""
    (text,) = re.findall(r"```nginx\n(.*?)```", (find_root() / "OPERATIONS.md").read_text(), re.S)
    port = free_port()
    for old, new in {
        **{"127.0.0.1:8008": service, "127.0.0.1:8866": pages},
        **{"listen 443 ssl": f"listen 127.0.0.1:{port} ssl"},
        **{"/etc/ssl/lm/certificate.pem": certificate[0], "/etc/ssl/lm/key.pem": certificate[1]},
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, str(new))
    folder.mkdir()
    with started(folder, text, f"https://127.0.0.1:{port}/") as front:
        yield front.rstrip("/")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with Machine("monica", tmp_path_factory.mktemp("home")) as machine:
        yield machine


# The service

WAYS = {  # How administrators write it; HOST is the service's address
    "path and name stay": "location /lm/ { proxy_pass http://HOST; proxy_set_header Host $host; }",
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
                status = answers(f"{front}/lm/v1/status", headers=headers)
                assert (status.status_code, status.json()["study"]) == (200, "monica"), status.text
            document = answers(f"{front}/lm/openapi.json", headers=shown).json()
            assert document["servers"] == [{"url": "/lm"}]
            assert answers(f"{front}/lm/nothing", headers=shown).status_code == 404
            evil = {**shown, "origin": "https://evil.example"}
            assert answers(f"{front}/lm/v1/status", headers=evil).status_code == 403
            with Client(f"{front}/lm", token=token) as client:
                client._connection.http.headers["host"] = NAME
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
        assert answers(f"{url}/v1/status", headers=claimed).status_code == 401
    log = machine.table("audit").iloc[before:]
    stored = [json.loads(text) for text in log.loc[log["kind"] == "access", "content"]]
    assert [entry["address"] for entry in stored] == [who]


def test_the_configuration_of_operations_serves_with_tls_below_a_path(
    machine, certificate, tmp_path, monkeypatch
):
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    before = len(machine.table("audit"))
    with background(machine, proxy=HERE) as url:
        token = Tokens(machine.store.folder).create("tls", "admin")
        with shipped(tmp_path / "nginx", certificate, url.removeprefix("http://")) as front:
            trust = {"verify": ssl.create_default_context(cafile=certificate[0])}
            claimed = {"host": NAME, "x-forwarded-for": "198.51.100.9"}
            assert answers(f"{front}/lm/health/live", headers=claimed, **trust).json()["live"]
            assert answers(f"{front}/lm/v1/status", headers=claimed, **trust).status_code == 401
            assert answers(f"{front}/v1/status", headers=claimed, **trust).status_code == 404
            document = {"authorization": f"Bearer {token}", "host": NAME}
            shown = answers(f"{front}/lm/openapi.json", headers=document, **trust)
            assert shown.json()["servers"] == [{"url": "/lm"}]
            assert "max-age" in shown.headers["strict-transport-security"]
            long = answers(f"{front}/lm/v1/status", headers=document | {"x": "x" * 40_000}, **trust)
            assert long.status_code == 400
            with pytest.raises(LMError, match="does not answer"):
                Client(f"{front}/lm", token=token).status()  # An unknown authority
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
            with Client(f"{front}/lm", token=token) as client:
                assert client.status()["study"] == "monica"
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
            (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login x password {token}\n")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            mlflow = ScoringServerClient("127.0.0.1", 443)
            mlflow.url_prefix = f"{front}/lm"
            assert mlflow.get_version()
    log = machine.table("audit").iloc[before:]
    refused = [json.loads(text) for text in log.loc[log["kind"] == "access", "content"]]
    assert {entry["address"] for entry in refused} == {"127.0.0.1"}  # Not what was claimed


def test_the_configuration_of_operations_limits_connections_of_an_address(
    machine, certificate, tmp_path
):
    context = ssl.create_default_context(cafile=certificate[0])
    begun = b"POST /lm/v1/records HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1"
    with (
        background(machine, proxy=HERE) as url,
        shipped(tmp_path / "nginx", certificate, url.removeprefix("http://")) as front,
    ):
        host, port = front.removeprefix("https://").split(":")
        with ExitStack() as stack:
            for _ in range(100):  # Each is within its body
                plain = stack.enter_context(socket.create_connection((host, int(port))))
                secret = stack.enter_context(context.wrap_socket(plain, server_hostname=host))
                secret.sendall(begun)
            status = 0
            while status != 429:  # nginx counts those whose head it has read
                status = answers(f"{front}/lm/health", verify=context).status_code
        while status == 429:
            status = answers(f"{front}/lm/health", verify=context).status_code
        assert status == 200


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
    for prefix in ("/a b", "/a?b", "/../a", "//a//b", "http://a", "/v1/records", "/v2/x"):
        with pytest.raises(LMError, match=r"--root-path .* must be a path"):
            path_prefix(prefix)
    for address in ("proxy", "*", "10.0.0.1:80"):
        with pytest.raises(LMError, match=r"--trust-proxy .* must be an address"):
            declared_proxy(trusted=[address])


@pytest.mark.slow
def test_the_commands_name_the_options_and_refuse_in_one_line():
    for verb, options in {
        "serve": ("--allow-host", "--root-path", "--trust-proxy", "LM_ALLOW_HOSTS"),
        "dashboards": ("--allow-host", "--base-path", "LM_BASE_PATH"),
    }.items():
        run = subprocess.run([sys.executable, "-m", "lm.cli.cli", verb, "--help"], **TEXT).stdout
        assert all(option in run for option in options)
        text = [sys.executable, "-m", "lm.cli.cli", verb, "monica", "--allow-host", "https://a"]
        ran = subprocess.run(text, **TEXT)
        assert ran.returncode == 2 and ran.stderr.startswith("lm: --allow-host 'https://a' must")
        assert ran.stderr.count("\n") == 1


# The pages


def test_pages_that_others_can_reach_need_a_token(monkeypatch):
    monkeypatch.delenv("LM_DASHBOARD_TOKEN", raising=False)
    with pytest.raises(LMError, match=f"on {NAME} needs a token: set LM_DASHBOARD_TOKEN"):
        voila_command(1, names=(NAME,))
    monkeypatch.setenv("LM_DASHBOARD_TOKEN", "x")
    assert "--Voila.base_url=/pages/" in voila_command(1, names=(NAME,), base="/pages")


def opened(url, headers, **how):
    """Whether a web socket opens: "open", or the status with which it is refused."""
    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.ioloop import IOLoop
    from tornado.websocket import websocket_connect

    async def connect():
        (await websocket_connect(HTTPRequest(url, headers=headers, **how))).close()
        return "open"

    try:
        return IOLoop().run_sync(connect, timeout=PATIENCE)
    except HTTPClientError as error:
        return error.code


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of Voila with a small notebook and our settings, below /pages."""
    import nbformat

    folder = tmp_path_factory.mktemp("pages")
    cell = nbformat.v4.new_code_cell("print(6 * 7, 'is shown')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "small.ipynb")
    port = free_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LM_DASHBOARD_TOKEN", "secret")
        patched.setenv("LM_ALLOW_HOSTS", NAME)
        patched.setenv("LM_PAGES", "4")
        command = voila_command(port, folder=folder, names=(NAME,), base="/pages")
        voila = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        answers(f"http://127.0.0.1:{port}/pages/")
        yield f"127.0.0.1:{port}"
    finally:
        voila.send_signal(signal.SIGTERM)
        voila.wait(PATIENCE)


@pytest.mark.slow
def test_a_page_is_drawn_through_the_proxy_of_operations(pages, certificate, tmp_path):
    """Page, scripts and web socket, with TLS and below a path."""
    trust = {"verify": ssl.create_default_context(cafile=certificate[0]), "timeout": 120}
    with shipped(tmp_path / "nginx", certificate, pages=pages) as front:
        address = f"{front}/pages/voila/render/small.ipynb?token=secret"
        shown = {"host": NAME, "authorization": "token secret"}
        page = answers(address, headers=shown, **trust)
        assert page.status_code == 200 and "42 is shown" in page.text
        assert answers(address, headers={"host": "evil.example"}, **trust).status_code == 403
        linked = re.findall(r'(?:src|href)="(/[^"]+\.(?:js|css))', page.text)
        assert linked and all(link.startswith("/pages/") for link in linked)
        assert answers(f"{front}{linked[0]}", headers=shown, **trust).status_code == 200
        kernel = re.search(r'"kernelId": "([^"]+)"', page.text)[1]
        place = f"{front}/pages/api/kernels/{kernel}/channels?token=secret"
        socket_of, how = place.replace("http", "ws", 1), {"ca_certs": str(certificate[0])}
        mine = {"Host": NAME, "Origin": f"https://{NAME}"}
        assert opened(socket_of, mine, **how) == "open"
        without = socket_of.split("?")[0]
        for origin in (f"https://{NAME}", "https://evil.example"):
            assert opened(without, {"Host": NAME, "Origin": origin}, **how) == 403


@pytest.mark.slow
def test_idle_connections_and_open_pages_do_not_shut_the_pages(pages):
    host, port = pages.split(":")
    shown = {"host": NAME, "authorization": "token secret"}
    with ExitStack() as stack:
        for _ in range(700):
            idle = stack.enter_context(socket.create_connection((host, int(port))))
            idle.send(b"G")
        assert answers(f"http://{pages}/pages/", headers=shown).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(
            f"http://{pages}/pages/",
            headers=shown | {"x": "x" * 40_000},
            trust_env=False,
            timeout=PATIENCE,
        )
    address, statuses = f"http://{pages}/pages/voila/render/small.ipynb?token=secret", []
    while 503 not in statuses and len(statuses) < 9:
        statuses.append(answers(address, headers=shown, timeout=PATIENCE).status_code)
    assert statuses[-1] == 503
    assert answers(f"http://{pages}/pages/", headers=shown).status_code == 200


# Compressed bodies


@pytest.mark.slow
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
                response = httpx.post(where, content=body, headers=headers, **UNPROXIED)
                assert response.status_code == 415, (path, response.text)
                assert response.json()["error"] == (
                    "a compressed body is not accepted: send it without Content-Encoding"
                )


def asked_by(*hosts):
    """Status and body of the refusal of these Host headers; None where they pass."""
    sent, passed = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode("latin-1")) for host in hosts]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(HostCheck(app, ("localhost", "127.0.0.1"), HERE)(scope, None, send))
    return None if passed else (sent[0]["status"], sent[1]["body"])


def test_two_hosts_are_refused():
    assert asked_by("localhost", "evil")[0] == asked_by("localhost", "localhost")[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LocalHost:80", "127.0.0.1:1", NAME.upper()])
def test_our_names_are_ours(host):
    assert asked_by(host) is None


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil", "localhost.evil", "localhost.", "evil@localhost", "localhost#evil", "[::1]"),
        *("localhost/evil", "localhost?evil", "localhost:x", "localhost:", "localhost, evil"),
        *("localhost:80@evil", "localhost\\evil", " localhost", "[localhost]", "127.1", "0x7f.1"),
    ],
)
def test_a_name_that_only_resembles_ours_is_refused(host):
    status, body = asked_by(host)
    assert status == 403 and b"does not answer to the host name" in body


def test_an_identity_coding_is_no_coding():
    for coding in ("identity", "Identity", ""):
        headers = {"host": "localhost", "content-encoding": coding}
        assert HeaderChecks(None).refusal(headers, 10) is None

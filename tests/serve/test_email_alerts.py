"""Alerts by e-mail against a server that speaks STARTTLS and asks for a password."""

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lm.serve.alerts import Alert, send_alert
from lm.serve.automation import parse_automation
from lm.serve.scheduler import Scheduler

ALERT = Alert("monica", "failed", "monitor", "2026-03-01T12:00", "monitor of monica: it failed.")
SECRET = "correct-horse-battery"
NOON = datetime(2026, 3, 1, 12, 0)


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """A self-signed certificate of 127.0.0.1: file, and the server's side of it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    where = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    own = builder.add_extension(where, critical=True).sign(key, hashes.SHA256())
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = tmp_path_factory.mktemp("papers") / "mail.pem"
    text = key.private_bytes(encoding, private, serialization.NoEncryption())
    path.write_bytes(text + own.public_bytes(encoding))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return path, context


class Sink:
    """What has reached a server: every command, who logged in, the messages."""

    def __init__(self):
        self.commands, self.users, self.mails = [], [], []

    async def handle_DATA(self, server, session, envelope):
        self.mails.append((session.ssl is not None, session.authenticated, envelope))
        return "250 stored"

    def check(self, server, session, envelope, mechanism, data):
        inputs = (data.login.decode(), data.password.decode())
        self.users.append((inputs[0], session.ssl is not None))
        return AuthResult(success=inputs == ("lm", SECRET), handled=False)


class Heard(SMTP):
    """Remembers each command, in the clear or not."""

    async def smtp_EHLO(self, hostname):
        self.event_handler.commands.append(("EHLO", self.session.ssl is not None))
        await super().smtp_EHLO(hostname)

    async def smtp_MAIL(self, arg):
        self.event_handler.commands.append(("MAIL", self.session.ssl is not None))
        await super().smtp_MAIL(arg)


@pytest.fixture
def server(papers, request):
    """A server on a port of this computer; with STARTTLS unless the test says no."""
    sink, tls = Sink(), getattr(request, "param", True)
    asked = (
        {"tls_context": papers[1], "require_starttls": True, "auth_required": True} if tls else {}
    )

    class Here(Controller):
        def factory(self):
            return Heard(sink, authenticator=sink.check, auth_require_tls=tls, **asked)

        def _trigger_server(self):
            self.port = sink.port = self.server.sockets[0].getsockname()[1]  # It was 0: any
            super()._trigger_server()

    here = Here(sink, hostname="127.0.0.1", port=0)
    here.start()
    yield sink
    here.stop(no_assert=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch, papers):
    monkeypatch.setenv("SSL_CERT_FILE", str(papers[0]))
    monkeypatch.setenv("LM_MAIL", SECRET)


def rules(server, more=""):
    """An alert by e-mail alone, over STARTTLS with a password."""
    return parse_automation(
        f'{more}[alerts]\nlog = false\n[alerts.email]\nserver = "127.0.0.1"\nport = {server.port}\n'
        'from = "lm@clinic.example"\nto = ["ward@clinic.example"]\n'
        'starttls = true\nuser = "lm"\npassword = "env:LM_MAIL"\n'
    )


def test_an_alert_goes_through_starttls_with_a_login(server, caplog):
    assert send_alert(ALERT, rules(server).alerts) == []
    ((encrypted, known, mail),) = server.mails
    assert encrypted and known and server.users == [("lm", True)]
    assert mail.rcpt_tos == ["ward@clinic.example"] and ALERT.text in mail.content.decode()
    assert server.commands == [("EHLO", False), ("EHLO", True), ("MAIL", True)]
    assert SECRET not in caplog.text


def test_a_wrong_password_is_logged_and_the_work_goes_on(server, caplog, monkeypatch):
    monkeypatch.setenv("LM_MAIL", "wrong-" + SECRET)

    class Ward:
        """Machine and jobs; the first job fails, the second does not."""

        started = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def status(self):
            return {"champion": 1, "counts": {"outcomes": 0}}

        def table(self, name, last):
            import pandas as pd

            return pd.DataFrame()

        def start(self, notebook, parameters):
            self.started += 1
            return {"job": f"{notebook}-{self.started}", "state": "running"}

        def report(self, job):
            return {"state": "failed" if job == "monitor-1" else "done", "log": ""}

    every, ward = '[[rule]]\nrun = "monitor"\nevery_minutes = 5\n', Ward()
    works = Scheduler("monica", rules(server, every), lambda: ward, ward)
    for minute in range(0, 30):
        works.tick(NOON + timedelta(minutes=minute))
    assert ward.started > 2 and server.mails == []
    assert ("lm", True) in server.users
    assert caplog.text.count("could not be sent by e-mail: SMTPAuthenticationError") == 2
    assert SECRET not in caplog.text


@pytest.mark.parametrize("server", [False], indirect=True)
def test_a_server_without_starttls_gets_nothing_in_the_clear(server, caplog):
    assert send_alert(ALERT, rules(server).alerts) == ["e-mail"]
    assert "could not be sent by e-mail: SMTPNotSupportedError" in caplog.text
    assert server.commands == [("EHLO", False)] and server.users == server.mails == []


def test_a_certificate_that_no_authority_vouches_for_gets_nothing(
    server, caplog, monkeypatch, tmp_path
):
    (tmp_path / "none.pem").write_text("")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert send_alert(ALERT, rules(server).alerts) == ["e-mail"]
    assert "SSLCertVerificationError" in caplog.text
    assert server.users == server.mails == [] and ("MAIL", True) not in server.commands

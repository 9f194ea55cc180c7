"""What runs by itself: never twice at once, never forgotten; alerts name no patients."""

import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta

import msgspec
import nbformat
import pandas as pd
import pytest
from support.waiting import eventually

import lm.jobs.jobs
from lm.core.errors import LMError, NotFound
from lm.core.settings import find_root, settings
from lm.core.study import load_study
from lm.machine.machine import Machine
from lm.serve import alerts as alert_module
from lm.serve.alerts import Alert, send_alert
from lm.serve.app import background
from lm.serve.automation import DEFAULT_AUTOMATION, parse_automation, read_automation
from lm.serve.client import Client
from lm.serve.cron_expression import parse_cron
from lm.serve.crontab import crontab, systemd_units
from lm.serve.scheduler import Scheduler, run_scheduler, view_machine

NOON = datetime(2026, 3, 1, 12, 0)
MINUTE = timedelta(minutes=1)
EVERY = '[[rule]]\nrun = "monitor"\nevery_minutes = 60\n'
OUTCOMES = '[[rule]]\nrun = "monitor"\noutcomes = 50\n'
VERDICT = '[[rule]]\nrun = "retrain"\nverdict = ["recalibrate", "retrain"]\n'


class Ward:
    """Machine and jobs at once: jobs end as `ends` says, and say what no alert may repeat."""

    def __init__(self, **ends):
        self.outcomes, self.champion, self.verdicts = 0, 1, []
        self.started, self.ends, self.known = [], ends, True

    def __enter__(self):
        if not self.known:
            raise LMError("the store of patient m12 is locked")
        return self

    def __exit__(self, *_):
        pass

    def status(self):
        return {"champion": self.champion, "counts": {"outcomes": self.outcomes}}

    def table(self, name, last):
        rows = self.verdicts[-last:]
        return pd.DataFrame(rows, columns=["seq", "action", "version"])

    def start(self, notebook, parameters):
        if self.ends.get(notebook) == "refused":
            raise LMError("no job for patient m12")
        self.started.append((notebook, parameters))
        return {"job": f"{notebook}-{len(self.started)}"}

    def report(self, job):
        state = self.ends.get(job.partition("-")[0], "done")
        if state == "unknown":
            raise NotFound("job of patient m12 is unknown")
        if state == "busy":
            log = "lm: monitor on monica is already running: this run was not started"
            return {"state": "failed", "log": log}
        return {"state": state, "log": "record 'm12': age = 340 breaks the rule"}


class Reported(list):
    """The alerts."""

    def __call__(self, alert, rules):
        self.append(alert)

    @property
    def kinds(self):
        return [alert.kind for alert in self]


@pytest.fixture
def reported():
    alerts = Reported()
    yield alerts
    assert not any("m12" in " ".join(alert) or "340" in " ".join(alert) for alert in alerts)


def automation(ward, reported, text=EVERY):
    return Scheduler("monica", parse_automation(text), lambda: ward, ward, reported)


# Rules


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("[[rule]]\nrun = 5\ncron = '* * * * *'", "rule 1: run = 5 must be the name of a pipeline"),
        ("[[rule]]\nrun = 'dance'\ncron = '* * * * *'", "'dance' is unknown"),
        ("[[rule]]\nrun = 'monitor'\ncron = 7", "cron = 7 must be five fields"),
        ("[[rule]]\nrun = 'monitor'\ncron = '61 * * * *'", "cron = '61 [*] [*] [*] [*]' must be"),
        ("[[rule]]\nrun = 'monitor'\ncron = '0 0 31 feb *'", "never comes"),
        ("[[rule]]\nrun = 'monitor'\nevery_minutes = 0", "every_minutes = 0 must be a whole"),
        ("[[rule]]\nrun = 'monitor'\nevery_minutes = true", "every_minutes = True must be"),
        ("[[rule]]\nrun = 'monitor'\noutcomes = -1", "outcomes = -1 must be a whole number"),
        ("[[rule]]\nrun = 'monitor'\noutcomes = 1.5", "outcomes = 1.5 must be a whole number"),
        ("[[rule]]\nrun = 'retrain'\nverdict = 'retrain'", "verdict = 'retrain' must be a list"),
        ("[[rule]]\nrun = 'retrain'\nverdict = []", r"verdict = \[\] must be a list"),
        ("[[rule]]\nrun = 'monitor'", r"when = \[\] must be exactly one"),
        (EVERY.replace("60", "60\noutcomes = 5"), "must be exactly one of cron"),
        (EVERY + "hour = 5", "rule 1: hour is unknown: choose from"),
        (EVERY + "parameters = 5", "parameters = 5 must be a table"),
        (EVERY + "parameters = {study = 'x'}", "must be a table without 'study'"),
        (EVERY + "parameters = {budget = 'high'}", "parameter 'budget' = 'high' must be of type"),
        (EVERY + "name = ''", "name = '' must be a short name"),
        (EVERY + "name = 'a'\n" + OUTCOMES + "name = 'a'", r"names = \['a', 'a'\] must be diff"),
        ("rule = 5", "rule = 5 must be tables"),
        ("look_every_minutes = 7", "look_every_minutes = 7 must be one of"),
        ("overdue_minutes = 0", "overdue_minutes = 0 must be a whole number of minutes"),
        ("[retry]\nfirst_minutes = 'x'", "retry.first_minutes = 'x' must be"),
        ("[retry]\nfirst_minutes = 9\nlongest_minutes = 5", "longest_minutes = 5 must be at least"),
        ("[retry]\nsecond = 9", "retry: second is unknown"),
        ("[alerts]\nlog = 1", "alerts.log = 1 must be true or false"),
        ("[alerts]\nwebhook = 'file:///secret'", r"alerts.webhook = \.\.\. must be an address"),
        ("[alerts]\nemail = 'x'", "alerts.email = 'x' must be a table"),
        ("[alerts.email]\nserver = ''", "alerts.email.server = '' must be a name"),
        ("[alerts.email]\nserver = 'm'\nfrom = 'a'\nto = ['b']", "alerts.email.to = "),
        ("[alerts.email]\nserver = 'm'\nfrom = 'a'\nto = ['b@c']\nport = 0", "port = 0 must be"),
        (
            "[alerts.email]\nserver = 'm'\nfrom = 'a'\nto = ['b@c']\npassword = 'env:X'",
            "starttls = False must be true where a password is sent",
        ),
        ("shedule = 5", "shedule is unknown"),
        ("[[rule", "automation.toml cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_field(text, result):
    with pytest.raises(LMError, match=result) as error:
        parse_automation(text)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_study_may_have_rules_of_its_own(tmp_path, monkeypatch):
    monitor, retrain = read_automation("monica").rules
    hourly, same = parse_automation(DEFAULT_AUTOMATION, "monica/automation.toml").rules
    assert (monitor.name, monitor.every_minutes) == ("every 91 days", 91 * 24 * 60)
    assert monitor.run == hourly.run and hourly.cron == "7 * * * *" and retrain == same
    free = dataclasses.replace(load_study("monica"), every=None)
    assert read_automation(free) == parse_automation(DEFAULT_AUTOMATION, "monica/automation.toml")
    shutil.copytree(settings().data / "monica", tmp_path / "data" / "monica")
    monkeypatch.setenv("LM_DATA", str(tmp_path / "data"))
    file = tmp_path / "data" / "monica" / "automation.toml"
    file.write_text(OUTCOMES + "parameters = {window_days = 365}")
    (rule,) = read_automation("monica").rules
    assert (rule.run, rule.outcomes, rule.parameters) == ("monitor", 50, {"window_days": 365})
    file.write_bytes(b"\xff")
    with pytest.raises(LMError, match=r"monica/automation\.toml cannot be read"):
        read_automation("monica")
    with pytest.raises(LMError, match="unknown"):
        read_automation("absent")


@pytest.mark.parametrize(
    "text", ["*/7 3-5 * * *", "0 0 1,15 * *", "5 4 * * sun", "30 12 13 * fri", "59 23 31 dec *"]
)
def test_cron_comes_when_its_fields_say(text):
    cron, start = parse_cron(text), datetime(2026, 1, 30, 4, 3, 20)
    month_day, weekday = text.split()[2], text.split()[4]

    def matches(t):
        """The fields read one by one."""
        day, week = t.day in cron.days, t.isoweekday() % 7 in cron.weekdays
        both = day and week if "*" in (month_day, weekday) else day or week
        return t.minute in cron.minutes and t.hour in cron.hours and t.month in cron.months and both

    moment = cron.after(start)
    assert moment > start and matches(moment)
    between = (start.replace(second=0) + n * MINUTE for n in itertools.count(1))
    steps = itertools.takewhile(lambda t: t < moment, itertools.islice(between, 0, 100_000))
    assert not any(matches(t) for t in steps)
    assert cron.after(moment) > moment


# Ticks


def test_a_schedule_starts_its_job_once_and_nothing_overlaps(reported):
    ward = Ward(monitor="running")
    works = automation(ward, reported)
    (first,) = works.tick(NOON)
    assert (first.run, first.parameters) == ("monitor", {"study": "monica"})
    assert works.busy(NOON) and works.status().job.number == first.job
    assert not any(works.tick(NOON + n * 30 * MINUTE) for n in range(6))
    ward.ends["monitor"] = "done"
    assert len(works.tick(NOON + 200 * MINUTE)) == 1 and len(ward.started) == 2
    assert not works.busy(NOON + 201 * MINUTE) and reported == []


def test_a_restart_forgets_nothing(reported):
    ward = Ward(monitor="running")
    assert automation(ward, reported).tick(NOON)
    assert not automation(ward, reported).tick(NOON + 90 * MINUTE)  # Another process; the job runs
    ward.ends["monitor"] = "failed"
    assert not automation(ward, reported).tick(NOON + 91 * MINUTE)
    assert reported.kinds == ["failed"]
    assert not automation(ward, reported).tick(NOON + 95 * MINUTE)
    assert automation(ward, reported).tick(NOON + 96 * MINUTE)


def test_new_outcomes_are_counted_from_the_last_start(reported):
    ward = Ward()
    ward.outcomes = 1000
    works = automation(ward, reported, OUTCOMES)
    assert not works.tick(NOON)  # What was there before is not its business
    ward.outcomes = 1049
    assert not works.tick(NOON + MINUTE)
    ward.outcomes = 1050
    assert works.tick(NOON + 2 * MINUTE) and not works.tick(NOON + 3 * MINUTE)
    ward.outcomes = 3  # A store begun anew
    assert not works.tick(NOON + 4 * MINUTE)
    ward.outcomes = 53
    assert works.tick(NOON + 5 * MINUTE)


def test_two_rules_with_one_job_start_it_once(reported):
    ward = Ward()
    works = automation(ward, reported, EVERY + OUTCOMES)
    assert works.tick(NOON)
    ward.outcomes = 60
    assert works.tick(NOON + 30 * MINUTE)
    assert not works.tick(NOON + 60 * MINUTE)  # The hour counts from the last start
    assert works.tick(NOON + 90 * MINUTE)


def test_a_verdict_is_carried_to_its_end_once(reported):
    ward = Ward()
    ward.verdicts = [(4, "retrain", 1)]  # From before: a person's business
    works = automation(ward, reported, VERDICT)
    assert not works.tick(NOON)
    ward.verdicts += [(5, "look at the data", 1)]
    assert not works.tick(NOON + MINUTE)
    ward.verdicts += [(6, "recalibrate", 1)]
    (started,) = works.tick(NOON + 2 * MINUTE)
    assert started.parameters == {"study": "monica", "verdict": 6}
    ward.champion = 2
    assert not works.tick(NOON + 3 * MINUTE)
    ward.verdicts += [(7, "retrain", 1)]  # About a model that serves no more
    assert not works.tick(NOON + 4 * MINUTE)
    ward.verdicts += [(8, "retrain", float("nan"))]
    assert not works.tick(NOON + 5 * MINUTE)
    ward.champion = None  # The first model is asked for
    assert works.tick(NOON + 6 * MINUTE)[0].parameters["verdict"] == 8


def test_a_failed_retraining_keeps_its_verdict_while_its_model_serves(reported):
    ward = Ward(retrain="failed")
    works = automation(ward, reported, VERDICT)
    works.tick(NOON)
    ward.verdicts = [(1, "retrain", 1)]
    assert works.tick(NOON + MINUTE)
    assert not works.tick(NOON + 2 * MINUTE)
    ward.verdicts += [(2, "nothing", 1)]
    assert works.tick(NOON + 7 * MINUTE)[0].parameters["verdict"] == 1
    assert not works.tick(NOON + 8 * MINUTE) and works.status().failing
    ward.champion = 2  # A promotion by hand
    assert not works.tick(NOON + 60 * MINUTE) and not works.status().failing


def test_failures_are_tried_again_ever_more_rarely_until_they_succeed(reported):
    ward, starts = Ward(monitor="failed"), []
    works = automation(ward, reported, EVERY + "[retry]\nfirst_minutes = 5\nlongest_minutes = 60\n")
    for n in range(60 * 5):
        starts += [n] * len(works.tick(NOON + n * MINUTE))
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps[:5] == [6, 11, 21, 41, 61] and set(gaps[5:]) == {61}  # A minute to notice it
    assert reported.kinds == ["failed"] * len(starts)
    assert "try 3" in reported[2].text and "monitor-3, whose log says why" in reported[2].text
    ward.ends["monitor"] = "done"
    later = NOON + 9 * 60 * MINUTE
    works.tick(later)
    works.tick(later + MINUTE)
    assert reported.kinds[-1] == "recovered" and not works.status().failing


@pytest.mark.parametrize(
    ("end", "result"), [("refused", "was not started"), ("unknown", "it failed as job")]
)
def test_a_job_that_cannot_be_started_or_is_lost_is_a_failure(reported, end, result):
    works = automation(Ward(monitor=end), reported)
    works.tick(NOON)
    works.tick(NOON + MINUTE)
    assert reported.kinds == ["failed"] and result in reported[0].text
    assert works.status().failing["monitor"].times == 1 and not works.busy()


def test_a_run_that_another_process_has_started_is_no_failure(reported):
    ward = Ward(monitor="busy")
    works = automation(ward, reported)
    assert works.tick(NOON) and not works.tick(NOON + MINUTE)
    assert works.tick(NOON + 6 * MINUTE) and works.status().failing == {}
    ward.ends["monitor"] = "done"
    works.tick(NOON + 7 * MINUTE)
    assert reported == []


def test_a_job_that_takes_too_long_is_reported_once(reported):
    works = automation(Ward(monitor="running"), reported)
    for hour in range(9):
        works.tick(NOON + 60 * hour * MINUTE)
    assert reported.kinds == ["overdue"] and "2026-03-01T12:00:00" in reported[0].text


def test_a_machine_that_cannot_be_seen_is_reported(reported):
    ward = Ward()
    works = automation(ward, reported)
    ward.known = False
    for n in range(20):
        assert not works.tick(NOON + n * MINUTE)
    assert reported.kinds == ["unreachable"] * 3  # At once, after 5 and after 10 more minutes
    ward.known = True
    assert works.tick(NOON + 30 * MINUTE) and reported.kinds[-1] == "recovered"


def test_a_clock_that_was_set_back_stops_nothing(reported):
    ward = Ward()
    works = automation(ward, reported, EVERY)
    assert works.tick(NOON + timedelta(days=365))
    assert not works.tick(NOON) and works.tick(NOON + 60 * MINUTE)
    ward.ends["monitor"] = "failed"
    works.tick(NOON + 61 * MINUTE)
    assert works.status().failing


def test_a_memory_that_cannot_be_read_is_put_aside(reported, home):
    works = automation(Ward(), reported)
    works.tick(NOON)
    file = home / "monica" / "automation.json"
    assert not list(file.parent.glob("*.new"))
    file.write_text(file.read_text()[:30])
    assert works.status().job is None
    assert works.tick(NOON + MINUTE) and reported.kinds == ["state_error"]
    assert file.with_suffix(".broken").exists() and json.loads(file.read_text())["job"]


def test_a_full_disk_is_reported_and_starts_nothing(reported, monkeypatch):
    ward = Ward()
    works = automation(ward, reported)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            works.tick(NOON)
    assert (
        ward.started == [] and reported.kinds == ["state_error"] and "No space" in reported[0].text
    )
    assert works.tick(NOON + MINUTE) and works.status().job


def test_one_run_at_a_time_and_the_lock_of_the_dead_is_taken_over(reported, home):
    ward = Ward()
    works = automation(ward, reported)
    with works.file.locked():
        assert works.tick(NOON) == [] and works.busy(NOON)
    ready, wait = os.pipe()
    child = os.fork()
    if not child:
        with works.file.locked():
            os.write(wait, b"x")
            time.sleep(3600)
    os.read(ready, 1)
    assert works.tick(NOON) == []
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert works.tick(NOON)


def test_many_ticks_at_once_start_one_job(reported):
    ward = Ward(monitor="running")
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(automation(ward, reported).tick(NOON)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(ward.started) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_the_start_of_a_job_it_is_tried_again(reported, when):
    """Before the process exists, or after, but before its number is written down."""

    class Deadly(Ward):
        def start(self, notebook, parameters):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        automation(Deadly(), reported).tick(NOON)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    ward = Ward(monitor="busy" if when == "after" else "done")
    works = automation(ward, reported)
    assert (
        not works.tick(NOON + MINUTE)
        and reported.kinds == ["failed"]
        and "start" in reported[0].text
    )
    assert works.tick(NOON + 6 * MINUTE)
    works.tick(NOON + 7 * MINUTE)
    assert (
        reported.kinds == ["failed", "recovered" if when == "before" else "failed"][: len(reported)]
    )


# Jobs


def notebook(path, code):
    """A tiny pipeline."""
    cells = [nbformat.v4.new_code_cell('study: str = ""  # name'), nbformat.v4.new_code_cell(code)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return str(path)


PARENT = """
import contextlib, os, signal, sys
from datetime import datetime
import pandas as pd
from lm.serve.automation import parse_automation
from lm.serve.scheduler import Scheduler

class Ward(contextlib.nullcontext):
    status = lambda self: {"champion": 1, "counts": {}}
    table = lambda self, name, last: pd.DataFrame()

ward = Ward()
ward.enter_result = ward
rules = parse_automation(f"[[rule]]\\nrun = {sys.argv[1]!r}\\nevery_minutes = 60")
assert Scheduler("monica", rules, lambda: ward, send=print).tick(datetime(2026, 3, 1, 12, 0))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_job_outlives_its_starter_and_is_resumed(tmp_path, reported):
    code = "import time\nfrom lm.jobs.notebook_runner import pipeline_record\n"
    code += "time.sleep(1)\npipeline_record(study=study)"
    path = notebook(tmp_path / "tiny.ipynb", code)
    text = [sys.executable, "-c", PARENT, path]
    assert subprocess.run(text, check=False).returncode == -signal.SIGKILL
    rules = parse_automation(f"[[rule]]\nrun = {path!r}\nevery_minutes = 60")
    works = Scheduler("monica", rules, Ward, send=reported)
    assert works.busy(NOON) and not works.tick(NOON + 61 * MINUTE)
    eventually(lambda: not works.busy(NOON))
    assert reported == [] and works.status().failing == {}
    assert len(list((settings().runs / "monica").glob("tiny-*.ipynb"))) == 1


@pytest.fixture
def quick(monkeypatch):
    """`lm run` replaced by a process that ends at once: with a record, or with a mistake."""
    spawn, how = lm.jobs.jobs._spawn, {"code": "print('{\"record\": {}}')"}

    def fast(command, log, word=""):
        return spawn([sys.executable, "-c", how["code"]], log, word)

    monkeypatch.setattr(lm.jobs.jobs, "_spawn", fast)
    return how


def until_over(works, now=NOON):
    eventually(lambda: not works.busy(now))


def test_what_is_seen_is_what_the_machine_has_stored(home):
    with Machine("monica", home) as machine:
        assert view_machine(machine) == (0, None, 0, "", None)
        verdict = {"as_of": NOON, "action": "retrain", "reason": "no model serves", "version": None}
        machine.record_verdict(verdict)
        assert view_machine(machine) == (0, None, 1, "retrain", None)
        machine.record_verdict(verdict | {"action": "nothing", "version": 3})
        assert view_machine(machine) == (0, None, 2, "nothing", 3)
        with background(machine) as url, Client(url) as client:
            assert view_machine(client) == (0, None, 2, "nothing", 3)


@pytest.mark.parametrize("served", [True, False], ids=["service", "process"])
def test_jobs_run_in_the_service_or_beside_it(home, reported, quick, served):
    with contextlib.ExitStack() as stack:
        if served:
            machine = stack.enter_context(Machine("monica", home))
            url = stack.enter_context(background(machine))
            works = Scheduler("monica", parse_automation(EVERY), lambda: Client(url), send=reported)
        else:
            works = Scheduler("monica", parse_automation(EVERY), send=reported)
        assert works.tick(NOON)
        assert works.status().job.runner == ("service" if served else "process")
        until_over(works)
        assert reported == []
        quick["code"] = "raise SystemExit('lm: patient m12 is unknown')"
        assert works.tick(NOON + 60 * MINUTE)
        until_over(works, NOON + 60 * MINUTE)
        assert reported.kinds == ["failed"]


def test_a_job_that_went_with_its_service_is_tried_again(home, reported, quick):
    quick["code"] = "import time; time.sleep(3600)"
    with Machine("monica", home) as machine, background(machine) as url:
        works = Scheduler("monica", parse_automation(EVERY), lambda: Client(url), send=reported)
        assert works.tick(NOON) and works.busy(NOON)
    assert works.busy(NOON)  # Without an answer: it may still run
    works = Scheduler("monica", parse_automation(EVERY), send=reported)
    assert not works.busy(NOON) and reported.kinds == ["failed"]


def test_watch_once_works_until_nothing_is_due(reported):
    ward = Ward()

    def monitoring_run(job):
        if job.startswith("monitor") and not ward.verdicts:
            ward.verdicts.append((1, "retrain", 1))
        return {"state": "done", "log": ""}

    ward.report = monitoring_run
    how = {"open_machine": lambda: ward, "runner": ward, "send": reported}
    rules = parse_automation(EVERY + VERDICT)
    assert run_scheduler("monica", once=True, poll=0, automation=rules, **how) == 0
    assert [run for run, _ in ward.started] == ["monitor", "retrain"]
    ward = Ward(monitor="failed")
    other = parse_automation(EVERY.replace("60", "61"))
    how |= {"open_machine": lambda: ward, "runner": ward, "automation": other}
    shutil.rmtree(settings().study_home("monica"))
    assert run_scheduler("monica", once=True, poll=0, **how) == 1 and len(ward.started) == 1
    stop = threading.Event()
    stop.set()
    assert run_scheduler("monica", stop=stop, **how) == 1 and len(ward.started) == 1


# Alerts


class Hook(http.server.BaseHTTPRequestHandler):
    """Takes what is posted; answers as the server says."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.got.append((self.path, json.loads(self.rfile.read(length))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        pass


class Mail(socketserver.StreamRequestHandler):
    """As much SMTP as a client needs; refuses absent@."""

    def handle(self):
        self.wfile.write(b"220 ready\r\n")
        while line := self.rfile.readline().decode().strip():
            word = line[:4].upper()
            answer = b"250 ok"
            if word == "DATA":
                self.wfile.write(b"354 go on\r\n")
                body = list(iter(lambda: self.rfile.readline().decode().rstrip("\r\n"), "."))
                self.server.got.append("\n".join(body))
            elif word == "RCPT" and "absent@" in line:
                answer = b"550 unknown"
            elif word == "QUIT":
                answer = b"221 bye"
            self.wfile.write(answer + b"\r\n")


@contextlib.contextmanager
def sink(kind, handler):
    """A server on this computer that keeps what it gets."""
    kind.allow_reuse_address = True
    with kind(("127.0.0.1", 0), handler) as server:
        server.got, server.status = [], 204
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def sinks(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with (
        sink(http.server.ThreadingHTTPServer, Hook) as hook,
        sink(socketserver.ThreadingTCPServer, Mail) as mail,
    ):
        yield hook, mail


ALERT = Alert("monica", "failed", "monitor", "2026-03-01T12:00", "monitor of monica: it failed.")


def channels(hook, mail, to="ward@clinic.example"):
    """Rules with both sinks."""
    return parse_automation(
        f'[alerts]\nwebhook = "http://127.0.0.1:{hook.server_address[1]}/secret"\n'
        f'[alerts.email]\nserver = "127.0.0.1"\nport = {mail.server_address[1]}\n'
        f'from = "lm@clinic.example"\nto = ["{to}"]\n'
    )


def test_alerts_reach_log_webhook_and_mail(sinks, caplog):
    hook, mail = sinks
    assert send_alert(ALERT, channels(hook, mail).alerts) == []
    assert hook.got == [("/secret", ALERT._asdict())]
    assert "Subject: monica: monitor failed" in mail.got[0] and ALERT.text in mail.got[0]
    assert "To: ward@clinic.example" in mail.got[0]
    assert ALERT.text in caplog.text and "secret" not in caplog.text


def test_a_channel_that_fails_does_not_stop_the_others(sinks, caplog, monkeypatch):
    hook, mail = sinks
    to = channels(hook, mail, to="absent@clinic.example").alerts
    hook.status = 500
    assert send_alert(ALERT, to) == ["webhook", "e-mail"]
    assert ALERT.text in caplog.text and "HTTPError" in caplog.text
    hook.status = 204
    assert send_alert(ALERT, to) == ["e-mail"] and len(hook.got) == 2
    to = channels(hook, mail).alerts
    monkeypatch.setenv("LM_HOOK", "file:///etc/secret")
    for address in ("http://127.0.0.1:1/secret", "env:LM_NOT_SET", "env:LM_HOOK"):
        broken = parse_automation(f'[alerts]\nwebhook = "{address}"').alerts
        assert send_alert(ALERT, broken) == ["webhook"]
        both = msgspec.structs.replace(to, webhook=address)
        assert send_alert(ALERT, both) == ["webhook"]
    assert len(mail.got) == 3 and "secret" not in caplog.text
    monkeypatch.setattr(alert_module._LOG, "log", lambda *_: 1 / 0)
    assert send_alert(ALERT, to) == ["log"]
    assert len(mail.got) == 4 and len(hook.got) == 3


def test_a_failing_job_is_reported_by_all_channels_without_its_text(sinks, caplog):
    hook, mail = sinks
    ward = Ward(monitor="failed")
    every = parse_automation(EVERY).rules
    settings_of_both = msgspec.structs.replace(channels(hook, mail), rules=every)
    works = Scheduler("monica", settings_of_both, lambda: ward, ward)
    works.tick(NOON)
    works.tick(NOON + MINUTE)
    ((_, posted),) = hook.got
    assert posted["kind"] == "failed" and "12:06" in posted["text"] and len(mail.got) == 1
    for text in (posted["text"], mail.got[0], caplog.text):
        assert "monitor of monica: it failed" in text and "m12" not in text and "340" not in text


# Cron and systemd


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Paths with what cron, the shell and systemd each take for something else."""
    for name in ("HOME", "REPORTS"):
        monkeypatch.setenv(f"LM_{name}", str(tmp_path / f"50 % of 'a\" $HOME {name}"))
    return tmp_path


@pytest.mark.slow
def test_the_line_for_cron_runs_as_printed(odd):
    head, line = crontab("monica", arguments=("status", "monica")).splitlines()
    assert head.startswith("# monica") and line.startswith("*/5 * * * * umask 077 && mkdir -p ")
    command = line.split(maxsplit=5)[5]
    assert "%" not in command.replace(r"\%", "")
    bare = ["env", "-i", f"HOME={odd}", "PATH=/usr/bin:/bin", "/bin/sh", "-c"]
    done = subprocess.run([*bare, command.replace(r"\%", "%")], cwd="/", capture_output=True)
    log = settings().runs / "monica" / "automation.log"
    assert done.returncode == 0, log.read_text() if log.exists() else done.stderr
    assert done.stdout == done.stderr == b"" and '"records": 0' in log.read_text()
    assert (settings().home / "monica").is_dir()


def test_the_line_says_when_and_what():
    assert crontab("monica").splitlines()[1].count("-m lm.cli.cli scheduler monica --once >> ") == 1
    for every, minute in ((1, "* "), (60, "0 "), (15, "*/15 ")):
        line = crontab("monica", parse_automation(f"look_every_minutes = {every}")).splitlines()[1]
        assert line.startswith(f"{minute}* * * * ")
    with pytest.raises(LMError, match="unknown"):
        crontab("absent")


@pytest.mark.parametrize("every", [1, 5, 60])
def test_systemd_accepts_the_units(odd, every):
    units = systemd_units("monica", parse_automation(f"look_every_minutes = {every}"))
    for name, text in units.items():
        (odd / name).write_text(text)
    service = units["lm-monica.service"]
    assert f"WorkingDirectory={find_root()}" in service and "Type=oneshot" in service
    assert "50 %% of 'a\\\" $HOME HOME" in service
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    message = ["systemd-analyze", "verify", *(str(odd / name) for name in units)]
    done = subprocess.run(message, capture_output=True, text=True, check=False)
    results = [line for line in (done.stdout + done.stderr).splitlines() if "lm-monica" in line]
    assert done.returncode == 0 and results == [], done.stderr
    times = units["lm-monica.timer"].partition("OnCalendar=")[2].splitlines()[0]
    asked = ["systemd-analyze", "calendar", "--iterations=3", times]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_path_with_a_line_break_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_HOME", str(tmp_path / "a\nb"))
    with pytest.raises(LMError, match="not printable"):
        crontab("monica")

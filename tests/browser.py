"""A service with real patients, Voila beside it, and a headless Chromium that opens its pages."""

import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lm.core.settings import find_root
from lm.core.study import read_rows
from lm.machine.machine import Machine
from lm.serve.app import background
from lm.ui.widgets import addresses, voila_command

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on the path: install one to test the dashboards"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # No other host is reachable
SERVED = 300
MOVES = "document.querySelector('.lm') && !document.querySelector('.lm-still')"  # Widgets stand


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine that learned from monica's first two years and has served 300 patients since.

    Version 2, which a person promoted, serves now."""
    home = tmp_path_factory.mktemp("home")
    before = {name: os.environ.get(name) for name in ("LM_HOME", "LM_REPORTS")}
    os.environ |= {"LM_HOME": str(home), "LM_REPORTS": str(home / "reports")}
    with Machine("monica") as machine:
        rows, first = read_rows(machine.study), machine.study.first_model
        arrive(machine, rows[rows["arrived"] < first], first)
        machine.update(machine.monitor(first))
        arrive(machine, rows[rows["arrived"] >= first].head(SERVED))
        second = machine.registry.load(1).recalibrated(-0.1)
        version = machine.registry.register(second, {}, {}, machine.snapshot(), "a test")
        machine.promote(version, "a test", machine.plan.approvers[0])
        yield machine
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def arrive(machine, rows, until=None):
    """Patients in one batch, and the outcomes that were known when the last of them came."""
    machine.receive_many(
        rows[["record_id", "arrived", *machine.study.feature_names]], on_arrival=True
    )
    machine.add_outcomes(rows[rows["known_at"] <= (until or rows["arrived"].max())])


@pytest.fixture(autouse=True)
def home(machine):
    """Not an empty machine for each test: all of them look at this one."""
    return machine.store.folder.parent


class Places(dict):
    """Name of a page -> its address; `log` is what Voila and its kernels have said."""


@contextmanager
def serving(study="monica", ahead=False):
    """Voila, for a service that runs; `ahead`: with kernels that wait, as people have it."""
    command, found = voila_command(), Places()
    found.log = Path(os.environ["LM_HOME"], f"voila-{time.time_ns()}.log")
    found |= addresses(command, study)
    how = {"cwd": find_root(), "env": os.environ | {"LM_AHEAD": str(int(ahead))}}
    with found.log.open("w") as out:
        voila = subprocess.Popen(command, stdout=out, stderr=out, **how)
    try:
        root = found["clinician"].split("/voila/")[0]
        for _ in range(240):
            try:
                urllib.request.urlopen(root, timeout=5).close()
                break
            except urllib.error.HTTPError:  # It asks for its token
                break
            except OSError:
                assert voila.poll() is None, found.log.read_text()
                time.sleep(0.25)
        yield found
    finally:
        voila.terminate()
        voila.wait(20)


@pytest.fixture(scope="module")
def pages(machine):
    """Addresses of the dashboards; service and Voila run for the whole module."""
    with background(machine), serving(machine.study.name) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def chromium():
    """One browser for all pages of a module: each page has cookies and a cache of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browsing.browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield
        browsing.browser.close()


@contextmanager
def browsing(address, size=(1366, 768), ready=".lm h1"):
    """A page that is ready; fails on an error in its console or a request to another host."""
    errors, strangers = [], []

    def watch(request):
        if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            strangers.append(request.url)

    viewport = {"width": size[0], "height": size[1]}
    with browsing.browser.new_context(viewport=viewport) as context:
        page = context.new_page()
        page.set_default_timeout(90_000)  # Nothing waits so long where the cores are free
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", watch)
        sent = page.goto(address).text()
        assert re.search(r'class="lm-still".+<h1>\w', sent, re.DOTALL), "no words without scripts"
        page.wait_for_function(MOVES)
        page.wait_for_selector(ready)
        yield page
    assert strangers == [] and errors == []


def opened(address, size=(1366, 768), ready=".lm .js-plotly-plot .main-svg"):
    """A page whose first chart is drawn, or whatever else says that it is ready."""
    return browsing(address, size, ready)


def kernels():
    """Ids of the kernels that Voila runs."""
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    found = [re.search(r"voila_.*kernel-(.+)\.json", word) for words in commands for word in words]
    return {match[1] for match in found if match}

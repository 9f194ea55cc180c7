"""Both dashboards in a headless Chromium, on a service with real patients."""

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

from lm.api import background
from lm.machine import Machine
from lm.panels import addresses, voila_command
from lm.settings import find_root
from lm.study import read_rows

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on the path: install one to test the dashboards"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # No other host is reachable
SERVED = 300


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
        machine.update(machine.look(first))
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
    machine.outcomes(rows[rows["known_at"] <= (until or rows["arrived"].max())])


@pytest.fixture(autouse=True)
def home(machine):
    """Not an empty machine for each test: all of them look at this one."""
    return machine.store.folder.parent


class Places(dict):
    """Name of a page -> its address; `log` is what Voila and its kernels have said."""


@contextmanager
def serving():
    """Voila, for a service that runs."""
    command, found = voila_command(), Places()
    found.log = Path(os.environ["LM_HOME"], f"voila-{time.time_ns()}.log")
    found |= addresses(command, "monica")
    with found.log.open("w") as out:
        voila = subprocess.Popen(command, stdout=out, stderr=out, cwd=find_root())
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
    with background(machine), serving() as found:
        yield found


@contextmanager
def browsing(address, size=(1366, 768), ready=".lm h1", **how):
    """A page that is ready; fails on an error in its console or a request to another host."""
    from playwright.sync_api import sync_playwright

    errors, strangers = [], []

    def watch(request):
        if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            strangers.append(request.url)

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **how)
        page.set_default_timeout(30_000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", watch)
        page.goto(address)
        page.wait_for_selector(ready)
        yield page
        browser.close()
    assert strangers == [] and errors == []


def opened(address, size=(1366, 768), ready=".lm .js-plotly-plot .main-svg"):
    """A page whose first chart is drawn, or whatever else says that it is ready."""
    return browsing(address, size, ready)


def fact(page, name):
    """A number in the status line."""
    return page.locator(".lm-facts div", has_text=name).locator("b").inner_text()


def test_data_scientist_sends_patients_and_looks(machine, pages):
    counts = machine.status()["counts"]
    with opened(pages["data_scientist"]) as page:
        assert fact(page, "patients") == f"{counts['records']:,}"
        assert fact(page, "champion") == f"version {machine.status()['champion']}"
        page.get_by_role("button", name="Send one patient").click()
        page.get_by_role("status").filter(has_text="Sent 1 patient;").wait_for()
        assert fact(page, "patients") == f"{counts['records'] + 1:,}"
        assert machine.status()["counts"]["records"] == counts["records"] + 1
        rows = read_rows(machine.study)
        assert machine.table("records", last=1)["record_id"].item() in set(rows["record_id"])

        page.locator("input[type=number]").fill("20")
        page.locator("input[type=number]").press("Tab")
        page.get_by_role("button", name="Send", exact=True).click()
        page.get_by_role("status").filter(has_text="Sent 20 patients;").wait_for()
        assert machine.status()["counts"]["records"] == counts["records"] + 21

        page.get_by_role("button", name="Events").click()
        page.get_by_role("cell", name="▲ first model").wait_for()
        page.get_by_role("button", name="Models").click()
        page.get_by_role("cell", name=re.compile(r"\bchampion$")).wait_for()
        page.get_by_role("button", name="Drift").click()
        page.locator(".lm .ytick", has_text="age at onset").wait_for()
        page.get_by_role("button", name="Performance").click()
        page.locator(".lm .annotation", has_text="Brier score").wait_for()


def test_data_scientist_looks_retrains_and_rolls_back(machine, pages):
    verdicts, updates = len(machine.table("verdicts")), len(machine.table("updates"))
    with opened(pages["data_scientist"]) as page:
        page.get_by_role("button", name="Run monitor").click()
        page.locator(".progress").first.wait_for()
        said = told(page, "The monitor looked: ")
        assert len(machine.table("verdicts")) == verdicts + 1
        assert machine.table("verdicts")["reason"].iloc[-1] in said

        page.get_by_role("button", name="Retrain").click()
        said = told(page, "No update: version 2 stays. ")
        kept = machine.table("updates").iloc[-1]
        assert len(machine.table("updates")) == updates + 1
        assert kept["action"] in ("keep", "wait") and kept["reason"] in said

        page.get_by_role("button", name="Roll back to version 1").click()
        page.get_by_role("alert").filter(has_text="a roll-back needs a reason").wait_for()
        page.get_by_placeholder("reason for a roll-back").fill("a test")
        page.get_by_role("button", name="Roll back to version 1").click()
        told(page, "Version 1 serves again instead of 2.")
        assert machine.status()["champion"] == 1 and fact(page, "champion") == "version 1"
        page.get_by_role("cell", name="rolled back").wait_for()
        page.get_by_placeholder("reason for a roll-back").fill("once more")
        page.get_by_role("button", name="Roll back", exact=True).click()
        page.get_by_role("alert").filter(has_text="no earlier version").wait_for()

        page.get_by_role("button", name="Send one patient").click()
        told(page, "Sent 1 patient;")
        assert machine.table("predictions", last=1)["version"].item() == 1


def told(page, words):
    """What the page says once it says `words`; a job may take its time."""
    page.get_by_role("status").filter(has_text=words).wait_for(timeout=120_000)
    return page.get_by_role("status").inner_text()


def test_leaving_the_page_ends_its_kernel(pages):
    with opened(pages["clinician"]) as page:
        told = "JSON.parse(document.getElementById('jupyter-config-data').textContent).kernelId"
        mine = page.evaluate(told)
        assert mine in kernels()
        page.goto("about:blank")
        until = time.monotonic() + 30
        while mine in kernels() and time.monotonic() < until:
            time.sleep(0.5)
        assert mine not in kernels()


def kernels():
    """Ids of the kernels that Voila runs."""
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    found = [re.search(r"voila_.*kernel-(.+)\.json", word) for words in commands for word in words]
    return {match[1] for match in found if match}

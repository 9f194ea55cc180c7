"""Dashboards in a headless Chromium, on a service with real patients."""

import os
import re
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lm.api import background
from lm.clinician import reasons_of
from lm.machine import Machine
from lm.panels import addresses, voila_command
from lm.settings import find_root
from lm.study import percent, percent_range, read_rows

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


@pytest.fixture(scope="module")
def pages(machine):
    """Addresses of the dashboards; service and Voila run for the whole module."""
    with background(machine):
        command = voila_command()
        log = Path(os.environ["LM_HOME"], "voila.log")
        with log.open("w") as out:
            voila = subprocess.Popen(command, stdout=out, stderr=out, cwd=find_root())
        try:
            found = addresses(command, machine.study.name)
            root = found["clinician"].split("/voila/")[0]
            for _ in range(120):
                try:
                    urllib.request.urlopen(root, timeout=5).close()
                    break
                except OSError:
                    assert voila.poll() is None, log.read_text()
                    time.sleep(0.25)
            yield found
        finally:
            voila.terminate()
            voila.wait(20)


@contextmanager
def opened(address, size=(1366, 768)):
    """A page that is ready; fails on an error in its console or a request to another host."""
    from playwright.sync_api import sync_playwright

    errors, strangers = [], []

    def watch(request):
        if not request.url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            strangers.append(request.url)

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(30_000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", watch)
        page.goto(address)
        page.wait_for_selector(".lm .js-plotly-plot .main-svg")
        yield page
        folder = os.environ.get("LM_SCREENSHOTS")
        if folder and page.url == address:
            name = re.search(r"render/(\w+)", address)[1]
            page.screenshot(path=os.path.join(folder, f"{name}_{size[0]}.png"))
        browser.close()
    assert strangers == [] and errors == []


def test_clinician_reads_a_risk_and_records_decisions(machine, pages):
    latest = machine.table("predictions", last=20)
    chosen, other = latest.iloc[4], latest.iloc[11]["record_id"]
    name, answer = chosen["record_id"], machine.explain(chosen["record_id"])
    with opened(pages["clinician"]) as page:
        page.get_by_placeholder("search a record or a date").fill(name)
        page.locator(".lm select option", has_text=name).wait_for(state="attached")
        page.locator(".lm .widget-select select").select_option(index=0)
        page.get_by_role("heading", name=name).wait_for()
        page.locator(".lm-sentence", has_text=reasons_of(answer["sentence"])).wait_for()
        assert page.locator(".lm-risk strong").inner_text() == percent(answer["risk"])
        interval = percent_range(answer["low"], answer["high"])
        assert f"95 % interval {interval}" in page.locator(".lm-risk").inner_text()
        final = f"({percent(answer['risk'])})"
        page.locator(".textpoint text", has_text=final).last.wait_for()
        printed = page.locator(".bartext").all_text_contents()
        ends = page.locator(".textpoint text").all_text_contents()
        start, end = (float(t.strip().split()[0].replace("−", "-")) for t in ends)
        total = start + sum(float(t.replace("−", "-")) for t in printed)
        assert round(total, 2) == end == round(answer["log_odds"], 2)

        decide(page, "your name is needed", failed=True)
        page.get_by_placeholder("your name").fill("Dr Curie")
        decide(page, "choose first: agree, override or unsure", failed=True)
        page.get_by_role("button", name="Override").click()
        decide(page, "an override needs a reason", failed=True)
        page.get_by_placeholder("needed for an override").fill("transferred <b>today</b>")
        decide(page, "Stored: Dr Curie overrides")
        page.get_by_role("button", name="Unsure").click()
        decide(page, "Stored: Dr Curie is unsure")
        assert "transferred <b>today</b>" in page.locator(".lm").first.inner_text()

        page.get_by_placeholder("search a record or a date").fill("")
        page.locator(".lm select option", has_text=other).wait_for(state="attached")
        page.get_by_role("button", name="Agree").click()  # Meant for the first patient
        label = page.locator(".lm .widget-select option", has_text=other).text_content()
        page.locator(".lm .widget-select select").select_option(label=label)
        page.get_by_role("heading", name=other).wait_for()
        decide(page, "choose first", failed=True)
        page.get_by_role("button", name="Agree").click()
        decide(page, f"Stored: Dr Curie agrees, {other}.")
    stored = machine.table("decisions")
    assert stored["record_id"].tolist() == [name, name, other]
    assert stored["action"].tolist() == ["override", "unsure", "agree"]
    assert stored["reason"].fillna("").tolist() == ["transferred <b>today</b>", "", ""]


def decide(page, words, failed=False):
    """Press the button and wait for what the page answers."""
    page.get_by_role("button", name="Record decision").click()
    page.get_by_role("alert" if failed else "status").filter(has_text=words).wait_for()


def test_leaving_the_page_ends_its_kernel(pages):
    others = set(kernels())
    with opened(pages["clinician"]) as page:
        mine = set(kernels()) - others
        assert mine
        page.goto("about:blank")
        until = time.monotonic() + 20
        while mine & set(kernels()) and time.monotonic() < until:
            time.sleep(0.5)
        assert not mine & set(kernels())


def kernels():
    """Process ids of the kernels that Voila runs."""
    commands = ((p.pid, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    return [pid for pid, words in commands if any("voila_" in w and "kernel-" in w for w in words)]

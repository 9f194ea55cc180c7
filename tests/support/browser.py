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

from lm.core.settings import find_root
from lm.ui.server import page_addresses, voila_command
from support.waiting import PATIENCE

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # No other host is reachable
SERVED = 300
MOVES = "document.querySelector('.lm') && !document.querySelector('.lm-still')"  # Widgets stand
SETTLED = "document.getAnimations().every(one => !(one instanceof CSSTransition))"  # Colours


def arrive(machine, rows, until=None):
    """Patients in one batch, and the outcomes that were known when the last of them came."""
    machine.receive_many(
        rows[["record_id", "arrived", *machine.study.feature_names]], on_arrival=True
    )
    machine.add_outcomes(rows[rows["known_at"] <= (until or rows["arrived"].max())])


class Places(dict):
    """Name of a page -> its address; `log` is the output of Voila and its kernels."""


@contextmanager
def serving(study="monica", ahead=False):
    """Voila, for a service that runs; `ahead`: with kernels that wait, as people have it."""
    command, addresses = voila_command(), Places()
    addresses.log = Path(os.environ["LM_HOME"], f"voila-{time.time_ns()}.log")
    addresses |= page_addresses(command, study)
    how = {"cwd": find_root(), "env": os.environ | {"LM_AHEAD": str(int(ahead))}}
    with addresses.log.open("w") as out:
        voila = subprocess.Popen(command, stdout=out, stderr=out, **how)
    try:
        root = addresses["clinician"].split("/voila/")[0]
        for _ in range(4 * PATIENCE):
            try:
                urllib.request.urlopen(root, timeout=PATIENCE).close()
                break
            except urllib.error.HTTPError:  # It asks for its token
                break
            except OSError:
                assert voila.poll() is None, addresses.log.read_text()
                time.sleep(0.25)
        yield addresses
    finally:
        voila.terminate()
        voila.wait(PATIENCE)


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
        page.set_default_timeout(1000 * PATIENCE)
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
    ids = [re.search(r"voila_.*kernel-(.+)\.json", part) for line in commands for part in line]
    return {match[1] for match in ids if match}

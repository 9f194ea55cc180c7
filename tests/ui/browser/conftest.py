"""A service with real patients, Voila beside it, and a headless Chromium for each module."""

import os

import pytest
from support.browser import BROWSER, FLAGS, SERVED, arrive, browsing, serving

from lm.core.study_rows import read_rows
from lm.machine.machine import Machine
from lm.serve.app import background


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine trained on monica's first two years that has served 300 patients since.

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


@pytest.fixture(autouse=True)
def home(machine):
    """Not an empty machine for each test: all of them look at this one."""
    return machine.store.folder.parent


@pytest.fixture(scope="module")
def pages(machine):
    """Addresses of the dashboards; service and Voila run for the whole module."""
    with background(machine), serving(machine.study.name) as result:
        yield result


@pytest.fixture(scope="module", autouse=True)
def chromium():
    """One browser for all pages of a module: each page has cookies and a cache of its own."""
    if BROWSER is None:
        pytest.skip("no Chromium on the path: install one to test the dashboards")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browsing.browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield
        browsing.browser.close()

"""What holds for every page in a browser: there for all, by day and by night, and it heals."""

import os
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from support.browser import SETTLED, browsing, kernels, opened, serving
from support.waiting import eventually

from lm.core.study_rows import read_rows
from lm.machine.queries import PAGES
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client

SERIOUS = {"serious", "critical"}
CHART = ".lm .js-plotly-plot .main-svg"
DRAWN = {"patients": ".lm-row:visible", "clinician": CHART, "data_scientist": CHART}  # Last of all
SIZES = {"desk": (1366, 768), "tablet": (820, 1180)}


class Ward:
    """A service that can go and come back, with Voila beside it."""

    def __init__(self, desk):
        self.machine, self.service = desk, None

    def start(self):
        self.service = background(self.machine)
        self.url = self.service.__enter__()

    def stop(self):
        self.service.__exit__(None, None, None)


@pytest.fixture(scope="module")
def ward(machine):
    """The service on its first port."""
    ward = Ward(machine)
    ward.start()
    yield ward
    ward.stop()


@pytest.fixture(scope="module")
def pages(ward):
    """Addresses of the pages, and the log of Voila and its kernels."""
    with serving(ahead=True) as result:
        yield result


def barriers(page, scheme):
    """What hinders a user, by the rules of axe: those that are serious or worse."""
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(SETTLED)
    return [
        f"{scheme}, {wrong['id']}: {wrong['help']} {[n['html'][:160] for n in wrong['nodes'][:3]]}"
        for wrong in Axe().run(page).response["violations"]
        if wrong["impact"] in SERIOUS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_there_for_everybody(pages, name):
    with browsing(pages[name]) as page:
        assert page.locator(".lm h1").count() == 1 and page.locator("[role=main]").count() == 1
        page.wait_for_selector(DRAWN[name])
        wrong = [line for scheme in ("dark", "light") for line in barriers(page, scheme)]
        assert not wrong, "\n".join(wrong)
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")
            if folder := os.environ.get("LM_SCREENSHOTS"):
                page.screenshot(path=Path(folder) / f"{name}_{size}.png", full_page=True)
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.tagName"))
        assert reached & {"INPUT", "BUTTON", "SELECT"}


@pytest.mark.slow
def test_a_lost_service_is_stated_and_the_page_goes_on_when_it_is_back(ward, pages):
    with browsing(pages["clinician"]) as page:
        ward.stop()
        page.get_by_text("Reconnecting:").wait_for()
        ward.start()  # On another port
        page.get_by_text("Reconnecting:").wait_for(state="detached")
        known = set(ward.machine.table("records")["record_id"])
        rows = read_rows(ward.machine.study)
        row = rows[~rows["record_id"].isin(known)].iloc[0]
        row = row[["record_id", "arrived", *ward.machine.study.feature_names]].dropna().to_dict()
        ward.machine.receive(row)
        page.get_by_text(row["record_id"]).first.wait_for(state="attached")


@pytest.mark.slow
def test_others_sign_in_and_a_clinician_does_not_see_the_data_scientists_page(ward, monkeypatch):
    tokens = Tokens(ward.machine.store.folder)
    monkeypatch.setenv("LM_DASHBOARD_TOKEN", "shared-by-the-ward")
    care = tokens.create("Dr Curie", "clinician")
    science = tokens.create("Ada", "data scientist")
    with Client(ward.url, token=care) as client:
        assert client.page("clinician") == {"name": "Dr Curie", "role": "clinician"}
    with serving() as result:
        address = result["data_scientist"] + "&token=shared-by-the-ward"
        with browsing(address, ready=".lm input[type=password]") as page:
            sign_in(page, "a guess")
            page.get_by_role("alert").filter(has_text="token").wait_for()
            sign_in(page, care)
            page.get_by_role("alert").filter(has_text="data scientist, admin").wait_for()
            assert page.get_by_role("button", name="Roll back").count() == 0
            sign_in(page, science)
            page.get_by_role("button", name="Ada, data scientist: change").wait_for()
            assert science not in page.content()


def sign_in(page, token):
    """Type a token and press the button."""
    page.locator(".lm input[type=password]").fill(token)
    page.get_by_role("button", name="Sign in").click()


def test_leaving_the_page_ends_its_kernel(pages):
    with opened(pages["clinician"]) as page:
        text = "JSON.parse(document.getElementById('jupyter-config-data').textContent).kernelId"
        mine = page.evaluate(text)
        assert mine in kernels()
        page.goto("about:blank")
        eventually(lambda: mine not in kernels(), 0.5)


def test_neither_pages_nor_kernels_have_complained(pages):
    log = pages.log.read_text()
    assert "Traceback" not in log and "[ERROR" not in log, log[-3000:]

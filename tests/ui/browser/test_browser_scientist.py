"""The data scientist's page in a browser, and the walk from a drift to a roll-back."""

import os
import re
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise

import pandas as pd
import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from support.browser import opened
from support.desk import NASTY
from support.waiting import eventually

from lm.data.source import outcomes
from lm.machine.machine import Machine
from lm.ui.scientist_actions import SyntheticStream, noted_streams, synthetic_rows

KNOWN, MET = 1000, 600  # Synthetic training patients, and those since
ROLLOUTS = (  # What is chosen, its kind, the preview, and what the page says of it then
    ("a canary", "canary", "A share of the patients gets version 2", "5 % of the patients get"),
    ("the champion alone", "champion", *["All patients get the champion."] * 2),
)
PROMISED = 75  # Patients after which the monitor finds other patients, as the README says


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine trained on 1,000 synthetic patients; a second version is in a rollout."""
    folder = tmp_path_factory.mktemp("home")
    before = {name: os.environ.get(name) for name in ("LM_HOME", "LM_REPORTS")}
    os.environ |= {"LM_HOME": str(folder), "LM_REPORTS": str(folder / "reports")}
    with Machine("rotterdam") as machine:
        one = SyntheticStream("base", "1980-01-01")
        machine.note("attempt", {"what": "imitate"} | asdict(one))
        rows = synthetic_rows(machine.study, one)[: KNOWN + MET]
        first, since = rows["arrived"].iloc[KNOWN - 1], rows["arrived"].iloc[-1]
        for part, until in ((rows[:KNOWN], first), (rows[KNOWN:], since)):
            names = ["record_id", "arrived", *machine.study.feature_names]
            machine.receive_many(part[names], source=one.source, on_arrival=True)
            result = outcomes(machine.study, rows)
            machine.add_outcomes(result[result["known_at"] <= until])
            if until == first:
                machine.update(machine.monitor(first))
        machine.monitor()
        second = machine.registry.load(1).recalibrated(-0.4)
        version = machine.registry.register(second, {}, {}, machine.snapshot(), f"less {NASTY}")
        machine.registry.set_alias("challenger", version)
        yield machine
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def fact(page, name):
    """A number in the status line."""
    return page.locator(".lm-facts div", has_text=name).locator("b").inner_text()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def reported(page, text):
    """What the page says once it says `text`; work under way may take its time, at any speed."""
    result = page.locator(".lm-message", has_text=text)
    doing = page.locator(".lm-quiet[role=status]")
    while not result.count():
        with suppress(PlaywrightTimeout):
            result.wait_for()
            break
        results = page.locator(".lm-message").all_inner_texts()
        done = "".join(doing.all_inner_texts())
        assert done and "paused" not in done, (text, results)
        assert int((re.findall(r"(\d+) patients? so far", done) or [0])[0]) < MET, (text, done)
    return result.inner_text()


def heading(page, text):
    return page.get_by_role("heading", name=text, exact=True)


@pytest.mark.slow
def test_every_tab_shows_what_the_service_says(machine, pages):
    with opened(pages["data_scientist"]) as page:
        counts = machine.status()["counts"]
        assert fact(page, "patients") == f"{counts['records']:,}"
        assert fact(page, "challenger") == "version 2"
        page.get_by_role("cell", name="▲ first model").wait_for()

        press(page, "Performance")
        page.locator(".xtitle", has_text="mean risk of the group").wait_for()
        page.locator(".xtitle", has_text="decision threshold").wait_for()
        page.locator("summary", has_text="as a table").first.click()
        known = machine.known()
        served = known[known["version"].notna() & known["y"].notna()]
        shown = page.locator(".lm-chart").first.locator("tbody tr td:last-child")
        groups = [text.split(" of ") for text in shown.all_inner_texts()]
        assert sum(int(group[1]) for group in groups) == len(served)
        assert sum(int(group[0]) for group in groups) == served["y"].sum()

        press(page, "Drift")
        page.get_by_label("Feature shown").select_option(label="age at surgery")
        page.locator(".xtitle", has_text="age at surgery, years").wait_for()
        page.get_by_label("Columns").select_option(label="years")
        heading(page, "Behind one cell").wait_for()

        press(page, "Monitor")
        page.locator(".lm-verdict", has_text="monitored").wait_for()
        page.locator(".annotation", has_text=re.compile("^more events than predicted")).wait_for()
        page.locator(".annotation", has_text="limit").first.wait_for()

        press(page, "Models")
        page.get_by_role("cell", name="challenger", exact=True).first.wait_for()
        snapshot = machine.models().set_index("version").loc[1, "snapshot"]
        page.get_by_role("cell", name=snapshot).wait_for()
        assert page.locator("script", has_text="alert(1)").count() == 0
        page.get_by_role("cell", name=f"less {NASTY}").first.wait_for()

        press(page, "Control")
        page.get_by_text("Now: All patients get the champion.").wait_for()
        for policy, kind, preview, result in ROLLOUTS:
            page.get_by_label("Policy").select_option(label=policy)
            page.get_by_text(f"Once set: {preview}").wait_for()
            press(page, "Set policy")
            reported(page, "needs a reason")
            page.get_by_label("Reason").fill("a test")
            page.get_by_label("Signed by").fill(machine.plan.approvers[0])
            press(page, "Set policy")
            reported(page, f"From the next patient on: {result}")
            assert machine.rollout()["policy"]["kind"] == kind
            page.get_by_text(f"Now: {result}").wait_for()
        press(page, "Verify the audit log")
        assert reported(page, "Intact: every stored row and every entry").startswith("Intact")
        press(page, "Performance")
        heading(page, "Calibration").wait_for()


@pytest.mark.slow
def test_a_drift_is_injected_detected_judged_and_answered(machine, pages):
    had = machine.status()["counts"]["records"]
    with opened(pages["data_scientist"]) as page:
        page.get_by_label("Source").select_option(label="synthetic patients")
        page.get_by_label("How many").fill("3")
        page.get_by_label("How many").press("Tab")
        press(page, "Send 3")
        reported(page, "Sent 3 patients;")
        assert machine.status()["counts"]["records"] == had + 3
        press(page, "Send one")
        reported(page, "Sent 1 patient;")

        page.get_by_label("What changes").select_option(label="covariate shift: a number is higher")
        page.get_by_label("How much").fill("1")
        press(page, "Inject")
        reported(page, "The next synthetic patients will have")
        page.get_by_label("Monitor every").fill("25")
        page.get_by_label("Monitor every").press("Tab")
        page.get_by_label("Speed").select_option(label="as fast as possible")
        press(page, "Start")
        result = reported(page, "Found after")
        took = int(re.search(r"Found after (\d+) patients", result)[1])
        assert took <= PROMISED and "age has shifted" in result, result
        assert machine.table("verdicts")["reason"].iloc[-1] in result
        press(page, "Resume")
        press(page, "Pause")
        press(page, "Stop")
        reported(page, "the clock is")
        sources = machine.table("records")["source"].map(noted_streams(machine.table("audit")))
        kinds = [one.kind for one in sources]
        assert kinds[: had + 4] == ["none"] * (had + 4)
        assert len(kinds) >= had + 4 + took and set(kinds[had + 4 :]) == {"covariate"}

        press(page, "Monitor")
        page.locator(".annotation", has_text="age at surgery").filter(has_text="▲").wait_for()

        press(page, "Run monitor")
        page.get_by_role("status").filter(has_text="The monitoring notebook runs").wait_for()
        press(page, "Cancel")
        reported(page, "The monitoring notebook was cancelled")

        press(page, "Models")
        heading(page, "Flipped decisions").wait_for()
        flips = page.get_by_text(re.compile("Decisions flip for .* with version 2, challenger"))
        flips.wait_for()
        pair = [machine.risks(version)["risk"] for version in (1, 2)]
        recent = machine.known()["arrived"]
        recent = recent > recent.max() - pd.Timedelta(days=730)
        crossed = pd.concat(
            [(pair[0] >= cut) != (pair[1] >= cut) for cut in machine.study.thresholds], axis=1
        ).any(axis=1)
        expected = f"Decisions flip for {crossed[recent].sum()} patients of"
        assert flips.inner_text().startswith(expected)

        press(page, "Promote version 2")
        reported(page, "a promotion needs a reason")
        page.get_by_label("Reason").fill("fewer false alarms")
        page.get_by_label("Signed by").fill("stranger")
        press(page, "Promote version 2")
        reported(page, "may not decide")
        page.get_by_label("Signed by").fill(machine.plan.approvers[0])
        press(page, "Promote version 2")
        reported(page, "Version 2 is in service now instead of 1.")
        assert machine.status()["champion"] == 2
        page.locator(".lm-facts b", has_text="version 2").wait_for()
        page.get_by_label("Reason").fill("a test")
        press(page, "Roll back to version 1")
        reported(page, "Version 1 is in service again instead of 2.")
        who = machine.plan.approvers[0]
        assert machine.table("updates")["reason"].iloc[-1] == f"a test ({who})"
        steps = machine.table("updates")["to_version"].dropna().astype(int).tolist()
        assert steps[-2:] == [2, 1] and all(a != b for a, b in pairwise(steps))

        updates, records = len(machine.table("updates")), machine.status()["counts"]["records"]
        page.set_viewport_size({"width": 820, "height": 1180})
        assert page.evaluate("document.documentElement.scrollWidth") <= 820
        press(page, "Retrain")
        page.get_by_role("status").filter(has_text="The update notebook runs").wait_for()
        press(page, "Send one")  # It need not wait; which of the two messages is last is open
        eventually(lambda: machine.status()["counts"]["records"] == records + 1)
        eventually(lambda: len(machine.table("updates")) == updates + 1)
        results = "No update|in service now|needs approval|nothing|Sent 1 patient;"
        done = reported(page, re.compile(results))
        assert "Sent" in done or machine.table("updates")["reason"].iloc[-1] in done

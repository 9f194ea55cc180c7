"""The clinician's page in a headless Chromium: every control, compared with the machine."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from support.browser import SERVED, SETTLED, browsing, opened

from lm.core.study_rows import read_rows
from lm.core.wording import percent, percent_range
from lm.serve.auth import Tokens
from lm.ui.clinician_state import CLINICIAN_TABS
from lm.ui.clinician_tables import count_text, reason_sentences

SHOWN = {  # View: a part of it
    "Why this risk": lambda page: page.get_by_text("Raises the risk:"),
    "What if": lambda page: page.get_by_text("It is not the effect of a treatment"),
    "Similar patients": lambda page: page.get_by_role("region", name="Similar patients"),
    "What has changed": lambda page: page.get_by_label("Record", exact=True),
    "About the model": lambda page: page.get_by_role("heading", name="Limitations"),
}


def choose(page, name):
    """Search a patient and open the line that is found."""
    page.get_by_label("Search").fill(name)
    text = "name => { const list = document.querySelector('.lm-list select');"
    text += " return list.length == 1 && list[0].text.startsWith(name); }"
    page.wait_for_function(text, arg=name)
    page.get_by_label("Patients, newest first").select_option(index=0)
    page.get_by_role("heading", name=f"Patient {name}").wait_for()


def decide(page, text, failed=False):
    """Press the button and wait for what the page answers."""
    page.get_by_role("button", name="Record decision").click()
    page.get_by_role("alert" if failed else "status").filter(has_text=text).wait_for()


def later(machine, n):
    """The next `n` of monica's patients who have not come yet."""
    rows = read_rows(machine.study)
    rows = rows[rows["arrived"] >= machine.study.first_model].iloc[SERVED:]
    rows = rows[~rows["record_id"].map(machine.has)].head(n)
    return rows[["record_id", "arrived", *machine.study.feature_names]].to_dict("records")


def view(page, name):
    """Open one of the five views."""
    page.get_by_role("button", name=name).click()


def test_five_minutes_and_no_manual(machine, pages):
    """Find a patient, understand the risk, see why, record an override."""
    chosen = machine.table("predictions", last=20).iloc[4]
    name, answer = chosen["record_id"], machine.explain(chosen["record_id"])
    steps = ["Find a patient", "Read the risk", "See why", "Your decision"]
    with opened(pages["clinician"]) as page:
        headings = page.get_by_role("heading", level=2).all_inner_texts()
        shown = [step for result in headings for step in steps if step in result]
        assert shown == steps  # The page's order is the order of the walk

        choose(page, name)
        risk = page.locator(".lm-risk").first
        assert percent(answer["risk"]) == risk.locator("strong").inner_text()
        interval = percent_range(answer["low"], answer["high"])
        assert f"95 % interval {interval}" in risk.inner_text()
        picture = page.get_by_role("img", name="Of 100 patients like this").first
        assert f"about {count_text(answer['risk'])} have" in picture.get_attribute("aria-label")
        people = picture.locator("path").evaluate_all(
            "all => all.map(p => p.getAttribute('d').split('M').length / 2 - 0.5)"
        )
        assert sum(people) == 100

        for text in reason_sentences(machine.study, answer).values():
            page.get_by_text(text).wait_for()
        final = f"({percent(answer['risk'])})"
        page.locator(".textpoint text", has_text=final).last.wait_for()
        printed = page.locator(".bartext").all_text_contents()
        ends = page.locator(".textpoint text").all_text_contents()
        start, end = (float(t.strip().split()[0].replace("−", "-")) for t in ends)
        total = start + sum(float(t.replace("−", "-")) for t in printed)
        assert round(total, 2) == end == round(answer["log_odds"], 2)
        page.get_by_text("as a table").click()
        assert page.locator(".lm-table td").first.is_visible()

        page.get_by_role("button", name="Override").click()
        page.get_by_label("Reason").fill("transferred <b>today</b>")
        decide(page, "your name is missing", failed=True)
        page.get_by_label("Name").fill("Dr Curie")
        decide(page, "Stored: Dr Curie overrides")
        listed = page.get_by_label("Patients, newest first")
        listed.locator("option", has_text="override").wait_for(state="attached")
        assert "transferred <b>today</b>" in page.locator(".lm").first.inner_text()

        later = machine.table("predictions", last=9)["record_id"].tolist()
        for one, left in zip(later, (".lm-table[open]", ".lm-table:not([open])"), strict=False):
            page.evaluate("document.querySelector('.lm-table').id = 'before'")
            choose(page, one)
            page.locator(f"{left}:not(#before)").wait_for(state="attached")  # As it was left
            page.get_by_text("as a table").click()
    stored = machine.table("decisions", record_id=name)
    assert stored["action"].tolist() == ["override"]
    assert stored["reason"].tolist() == ["transferred <b>today</b>"]
    assert stored["clinician"].tolist() == ["Dr Curie"]


def test_every_view_says_what_the_service_says(machine, pages):
    name = machine.table("predictions", last=20)["record_id"].iloc[7]
    answer, records = machine.explain(name), machine.status()["counts"]["records"]
    with opened(pages["clinician"]) as page:
        choose(page, name)
        view(page, "What if")
        page.get_by_text("It is not the effect of a treatment").wait_for()
        page.get_by_label("Previous myocardial infarction").select_option("yes")
        counterfactual = answer["features"] | {"premi": "y"}
        result = machine.score([counterfactual], version=answer["version"])["risk"].item()
        after = f"{percent(answer['risk'])} → {percent(result)}"
        if answer["features"]["premi"] != "y":
            page.locator(".lm-tried strong", has_text=after).wait_for()
        handle = page.locator(".lm-trial .noUi-handle").first
        handle.focus()
        for _ in range(12):
            page.keyboard.press("ArrowRight")
        age = answer["features"]["age"]
        page.get_by_text(f"instead of {age:g} years").wait_for()
        result = machine.score([counterfactual | {"age": age + 12}], version=answer["version"])[
            "risk"
        ].item()
        after = f"{percent(answer['risk'])} → {percent(result)}"
        page.locator(".lm-tried strong", has_text=after).wait_for()
        page.get_by_role("button", name="Back to this patient's values").click()
        page.locator(".lm-tried", has_text="with this patient's values").wait_for()

        view(page, "Similar patients")
        result = machine.similar(name)
        page.get_by_text(result["sentence"]).wait_for()
        table = page.get_by_role("region", name="Similar patients")
        near = table.locator("tbody tr td:first-child").all_text_contents()
        assert near == [row["record_id"] for row in result["nearest"]]

        view(page, "What has changed")
        page.get_by_text(machine.explain_change(name)["sentence"]).wait_for()
        earlier = machine.table("predictions", last=100)["record_id"].iloc[0]
        page.get_by_label("Record", exact=True).fill(earlier)
        page.keyboard.press("Tab")
        page.get_by_text(machine.explain_change(name, since=earlier)["sentence"]).wait_for()

        view(page, "About the model")
        page.get_by_text(f"Version {answer['version']} (").wait_for()
        for use in machine.study.not_for:
            assert page.locator("li", has_text=use).is_visible()
    assert machine.status()["counts"]["records"] == records  # A what-if is not stored


@pytest.mark.slow
def test_news_comes_by_itself_and_nothing_moves(machine, pages):
    name = machine.table("predictions", last=50)["record_id"].iloc[5]
    with opened(pages["clinician"]) as page:
        choose(page, name)
        page.get_by_label("Search").fill("")
        listed = page.get_by_label("Patients, newest first")
        page.wait_for_function("s => document.querySelector(s).length > 20", arg=".lm-list select")
        page.get_by_label("Reason").fill("half a sen")
        listed.evaluate("list => { list.scrollTop = 200; }")
        lines = listed.locator("option").all_text_contents()
        spot = page.get_by_role("heading", name="Your decision").bounding_box()
        (row,) = later(machine, 1)
        machine.receive(row, now=row["arrived"])
        came = page.get_by_label("Later arrivals").locator("option", has_text=row["record_id"])
        came.wait_for(state="attached")
        assert listed.locator("option").all_text_contents() == lines
        assert listed.evaluate("list => list.scrollTop") == 200
        assert page.get_by_role("heading", name="Your decision").bounding_box() == spot
        assert page.get_by_label("Reason").input_value() == "half a sen"
        assert page.get_by_role("heading", name=f"Patient {name}").is_visible()

        machine.monitor(machine.status()["clock"])
        page.get_by_text(re.compile("has not run on version 2 yet")).wait_for(state="detached")
        machine.rollback(1, "a test")
        page.get_by_role("status").filter(has_text="Model version 1 predicts since").wait_for()
        assert page.get_by_label("Reason").input_value() == "half a sen"
        page.get_by_label("Later arrivals").select_option(index=0)
        page.get_by_role("heading", name=f"Patient {row['record_id']}").wait_for()
        machine.promote(2, "a test", "quality manager")
        page.get_by_role("status").filter(has_text="Model version 2 predicts since").wait_for()


@pytest.mark.slow
def test_no_view_has_a_barrier_or_scrolls_sideways(pages):
    with opened(pages["clinician"]) as page:
        for name in CLINICIAN_TABS[::-1]:
            view(page, name)
            SHOWN[name](page).first.wait_for()
            page.wait_for_function(SETTLED)
            wrong = [
                f"{name}: {result['id']} {[n['html'][:160] for n in result['nodes'][:3]]}"
                for result in Axe().run(page).response["violations"]
                if result["impact"] in ("serious", "critical")
            ]
            assert not wrong, "\n".join(wrong)
            for width, height in ((820, 1180), (1366, 768)):
                page.set_viewport_size({"width": width, "height": height})
                assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_clinician_signs_with_their_own_name(machine, pages, monkeypatch):
    token = Tokens(machine.store.folder).create("Dr House", "clinician")
    name = machine.table("predictions", last=40)["record_id"].iloc[1]
    with browsing(pages["clinician"]) as page:
        page.get_by_role("button", name=re.compile("admin: change$")).click()
        page.locator(".lm input[type=password]").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_text("You sign as Dr House").wait_for()
        assert not page.get_by_label("Name", exact=True).is_visible()
        choose(page, name)
        page.get_by_role("button", name="Agree").click()
        decide(page, f"Stored: Dr House agrees, {name}.")
    assert machine.table("decisions", record_id=name)["clinician"].tolist() == ["Dr House"]

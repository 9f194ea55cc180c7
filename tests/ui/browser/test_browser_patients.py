"""The page of patients' data in a headless Chromium: every control, compared with the machine."""

import re

import pandas as pd
from support.browser import SERVED, opened
from support.waiting import eventually

from lm.core.study_rows import read_rows
from lm.core.wording import percent


def later(machine, n):
    """The next `n` of monica's patients who have not come yet."""
    rows = read_rows(machine.study)
    rows = rows[rows["arrived"] >= machine.study.first_model].iloc[SERVED:]
    rows = rows[~rows["record_id"].map(machine.has)].head(n)
    return rows[["record_id", "arrived", *machine.study.feature_names]]


def listed(page):
    """First lines of the rows that are seen."""
    rows = page.locator(".lm-row:visible").all_text_contents()
    return [row.split("\n")[0] for row in rows if row]


def newest(machine, n):
    """Records, newest first, as the queue has them."""
    known = machine.known().sort_values(["known_at", "arrived"], kind="stable")
    return known["record_id"].tolist()[::-1][:n]


def test_queue_patient_and_arrivals(machine, pages):
    with opened_page(pages) as page:
        eventually(lambda: listed(page) == newest(machine, 9))
        counts = machine.status()["counts"]
        page.get_by_role("button", name=f"all {counts['records']:,}").wait_for()
        name = listed(page)[2]
        page.locator(".lm-row", has_text=name).click()
        page.get_by_role("heading", name=name).wait_for()
        result, seen = machine.explain(name), machine.training_summary()
        eventually(lambda: page.locator(".lm-strip").count() == len(machine.study.features))
        shown = page.locator(".lm-patients").inner_text()
        assert f"Risk {percent(result['risk'])} (95 % interval" in shown
        assert f"Beside the {seen['n']:,} training patients of version {seen['version']}" in shown
        points = seen["features"]["age"]["percentiles"]
        lower = sum(p < result["features"]["age"] for p in points[1:-1])
        higher = sum(p > result["features"]["age"] for p in points[1:-1])
        side = f"higher than {lower}" if lower > higher else f"lower than {higher}"
        assert max(lower, higher) < 50 or f"{side} of 100" in shown

        before, (row,) = listed(page), later(machine, 1).to_dict("records")
        machine.receive(row, now=row["arrived"])
        news = page.get_by_role("button", name=f"▲ 1 new, show: {row['record_id']}")
        news.wait_for()
        assert listed(page) == before
        page.get_by_role("heading", name=name).wait_for()
        news.click()
        eventually(lambda: listed(page)[0] == row["record_id"])

        page.get_by_role("button", name="older").click()
        page.get_by_text(re.compile("10 to 18 of")).wait_for()
        eventually(lambda: listed(page) == newest(machine, 18)[9:])
        page.get_by_role("button", name="newer", exact=False).last.click()
        page.get_by_role("textbox", name="Search").fill(name)
        page.get_by_text(re.compile("1 to 1 of 1")).wait_for()
        eventually(lambda: listed(page) == [name])
        machine.add_decision(name, "Dr Curie", "agree")
        page.locator(".lm-row", has_text="✓ seen").wait_for()
        page.get_by_role("textbox", name="Search").fill("")
        page.get_by_role("button", name="seen 1").click()
        page.get_by_text(re.compile("1 to 1 of 1")).wait_for()
        eventually(lambda: listed(page) == [name])


def test_a_patient_is_entered_refused_and_corrected(machine, pages):
    (row,) = later(machine, 1).to_dict("records")
    clock = machine.status()["clock"]
    with opened_page(pages) as page:
        page.get_by_role("button", name="Enter or correct").click()
        age = page.get_by_label("age at onset, years")
        age.fill("340")
        age.press("Tab")
        page.get_by_role("alert").filter(has_text="✕ 18 to 110 years").wait_for()
        page.get_by_label("record").fill("ward <b>1</b>")
        page.get_by_role("button", name="Send this patient").click()
        broken = "The record is not sent. Correct these fields: age"
        page.get_by_role("alert").filter(has_text=broken).wait_for()
        assert not machine.has("ward <b>1</b>")
        age.fill("63")
        page.get_by_label("smoking").select_option(label="current")
        page.get_by_text("of 100 have this").first.wait_for()
        page.get_by_role("button", name="Send this patient").click()
        page.get_by_role("status").filter(has_text="Stored as ward <b>1</b>.").wait_for()
        result = machine.explain("ward <b>1</b>")
        assert result["features"]["age"] == 63 and result["features"]["smstat"] == "c"
        assert machine.status()["clock"] == clock
        page.get_by_text(result["sentence"]).wait_for()
        page.get_by_role("button", name="Open this patient").click()
        page.get_by_role("heading", name="ward <b>1</b>", exact=True).wait_for()
        assert "○" in page.locator(".lm-unusual").inner_text()  # What was left empty is missing

        page.get_by_role("button", name="Correct these values").click()
        page.get_by_text("Records are never overwritten").wait_for()
        assert page.get_by_label("record").input_value() == "ward <b>1</b>-2"
        age.fill("64")
        page.get_by_role("button", name="Send this patient").click()
        page.get_by_role("status").filter(has_text="Stored as ward <b>1</b>-2.").wait_for()
        assert machine.explain("ward <b>1</b>")["features"]["age"] == 63
        assert machine.explain("ward <b>1</b>-2")["features"]["age"] == 64
        age.fill("70")
        page.get_by_role("button", name="Clear the form").click()
        page.wait_for_function("document.querySelector('.lm-form').innerText.includes('years')")
        eventually(lambda: age.input_value() == "")
    assert row["record_id"] not in machine.table("records", last=3)["record_id"].tolist()


def test_a_file_gets_a_result_per_row(machine, pages, tmp_path):
    rows = later(machine, 12).astype({"age": "object"}).reset_index(drop=True)
    rows.loc[4, "age"] = "forty"
    (tmp_path / "ward.csv").write_text(rows.to_csv(index=False))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with opened_page(pages) as page:
        page.get_by_role("button", name="Send a file").click()
        choose(page, tmp_path / "notes.csv")
        page.get_by_role("alert").filter(has_text="notes.csv lacks the columns").wait_for()
        drop(page, tmp_path / "ward.csv")
        page.get_by_role("heading", name="ward.csv: 11 rows accepted, 1 rejected").wait_for()
        cells = page.locator(".lm-scroll tbody tr").all_inner_texts()
        assert len(cells) == 12 and "✕ rejected" in cells[0] and "age = 'forty'" in cells[0]
        for name, text in zip(rows["record_id"].drop(4), cells[1:], strict=True):
            assert name in text and f"risk {percent(machine.explain(name)['risk'])}" in text
        with page.expect_download() as saved:
            page.get_by_role("link", name="Download all as CSV").click()
        table = pd.read_csv(saved.value.path())
        assert table["record_id"].tolist() == rows["record_id"].tolist()

        page.get_by_role("button", name="✕ rejected").click()
        name = rows["record_id"][4]
        page.locator(".lm-row", has_text=name).first.click()
        page.get_by_role("heading", name=f"{name}: rejected").wait_for()
        assert "forty" in page.locator(".lm-patients").inner_text()
        page.get_by_role("button", name="Correct these values").click()
        page.get_by_role("alert").filter(has_text="✕ a number, 18 to 110 years").wait_for()


def opened_page(pages, size=(1366, 768)):
    """The page, ready."""
    return opened(pages["patients"], size, ready=".lm-row:visible")


def choose(page, path):
    """Give the page a file."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a file").click()
    chooser.value.set_files(path)


def drop(page, path):
    """Drop a file on the card that takes one."""
    script = """([name, text]) => {
        const files = new DataTransfer();
        files.items.add(new File([text], name));
        return files;
    }"""
    files = page.evaluate_handle(script, [path.name, path.read_text()])
    page.dispatch_event(".jp-OutputArea .lm-drop", "drop", {"dataTransfer": files})

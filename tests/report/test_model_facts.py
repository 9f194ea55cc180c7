"""The reports of a version: one page, the same numbers everywhere, nothing invented."""

import copy
import json
import re
import shutil
import subprocess
from base64 import b64encode
from dataclasses import dataclass, replace
from hashlib import sha256
from html import unescape

import msgspec
import numpy as np
import pandas as pd
import pytest
from support.paths import ROOT

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.model.metrics import MEASURES, by_period, by_subgroups, performance
from lm.model.predict import fit, predict
from lm.monitor.sketch import column_layout
from lm.report.canvas import ml_canvas
from lm.report.facts_schema import ModelFacts
from lm.report.model_facts import _evidence, champion_periods, fitted_as, model_facts
from lm.report.owner_answers import CANVAS_FIELDS, checklist_items, read_answers
from lm.report.render import canvas_html, facts_html, tripod_html, write_reports
from lm.report.tripod import tripod_checklist
from lm.update.ladder import trainable

LONG = "a long and winding sentence that goes on " * 20
OWNERS = ("2", "3c", "6a", "6c", "8b", "8c", "17", "18a", "18b", "18c", "18d", "19", "25", "27c")
EVIL = "<script>alert('x')</script>"
OWN = re.compile(r"<script>.*?</script>", re.DOTALL)  # What sets the type of a page of one sheet
FONTS = {  # Style that a reader's machine may force on a page
    "its own": "",
    "sans": 'font-family: "DejaVu Sans" !important;',
    "serif": 'font-family: "DejaVu Serif", serif !important;',
    "mono": 'font-family: "DejaVu Sans Mono", monospace !important;',
    "wide and high": "letter-spacing: .05em; line-height: 1.6 !important;",
}
SMALLEST = 0.55  # Type of the fullest page in the widest font, of the usual


def known_at(study, rows, model, as_of):
    """The store's as-of query, with `model` as champion from the first day on."""
    moment = pd.Timestamp(as_of)
    known = rows[rows.arrived <= moment].drop(columns=["known_at"])
    served = known.arrived > study.first_model
    known = known.assign(known_at=known.arrived, version=served.astype("Int64").where(served))
    known = known.join(predict(model, known).where(served)).assign(lost=False, source="ward")
    known["matured"] = known.arrived + study.horizon <= moment
    return known.assign(y=known.y.where(known.matured))


def steps(*rows):
    """Updates as the store has them: as_of, action, from, to, reason, evidence."""
    names = ["as_of", "action", "from_version", "to_version", "reason", "evidence"]
    table = pd.DataFrame(rows, columns=names).assign(as_of=lambda t: pd.to_datetime(t.as_of))
    return table.astype({"from_version": "Int64", "to_version": "Int64"})


@pytest.fixture(scope="module")
def world():
    study = load_study("monica")
    rows = read_rows(study)
    model = fit(study, rows[rows.arrived + study.horizon <= study.first_model])
    known = known_at(study, rows, model, "1990-01-01")
    snapshot = known_at(study, rows, model, "1987-01-01")
    tags = {"fingerprint": model.fingerprint(), "snapshot.id": "ab" * 32, "lm": "0.1.0"}
    tags |= {"snapshot.as_of": "1987-01-01", "package.numpy": "2.4", "reason": "first"}
    registered = {"params": {"learner": "logistic", "seed": "0"}, "tags": tags, "metrics": {}}
    updates = steps(("1987-01-01", "first", None, 1, "first model", "{}"))
    names = ["as_of", "action", "reason", "version", "evidence"]
    verdicts = pd.DataFrame([], columns=names)
    return study, 1, model, registered, known, updates, verdicts, snapshot


@pytest.fixture(scope="module")
def page(world):
    return model_facts(*world)


@pytest.fixture(scope="module")
def full(page):
    """Facts of a study with more and longer of everything than a page can hold."""
    full = copy.deepcopy(page)
    shown = full["performance"]
    full["study"] |= dict.fromkeys(("title", "question", "citation", "source", "users"), LONG)
    full["study"] |= {"licence": LONG, "not_for": [LONG] * 8, "outcome": LONG}
    full["features"] = [f | {"label": LONG, "labels": [LONG] * 4} for f in full["features"] * 3]
    shown["periods"] = shown["periods"][:1] * 20
    shown["subgroups"] = [shown["subgroups"][0] | {"label": LONG, "value": LONG}] * 20
    full["limits"] = [{"topic": "Small groups", "text": LONG}] * 6
    step = {"when": "2001-01-01", "what": "recalibrate in the large", "from_version": 118}
    step |= {"to_version": 119, "why": LONG, "approved": LONG}
    full["history"] = {"steps": [step] * 12, "keep_decisions": 1000}
    return full


@pytest.fixture(scope="module")
def crowded(world, page):
    """A canvas with more and longer of everything than a page can hold."""
    board = ml_canvas(world[0], {"min_outcomes": 100, "margin": 0.002}, page)
    return board | {"fields": [field | {"lines": [LONG] * 20} for field in board["fields"]]}


def printed(html, folder):
    """Pages that a browser prints of a document, and the type that it chose for it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium")
    (folder / "page.html").write_text(html, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={folder / 'profile'}", "--no-pdf-header-footer"]
    target, address = folder / "page.pdf", f"file://{folder / 'page.html'}"
    how = {"capture_output": True, "timeout": 120, "check": True}
    subprocess.run([browser, *options, f"--print-to-pdf={target}", address], **how)
    shown = subprocess.run([browser, *options, "--dump-dom", address], **how).stdout.decode()
    kind = float(re.search(r"<html[^>]*--type: ([0-9.]+)", shown)[1])
    return len(re.findall(rb"/Type\s*/Page[^s]", target.read_bytes())), kind


def seen(html):
    """The text of a page as a reader sees it."""
    text = re.sub(r"<style.*?</style>|<[^>]*>", " ", OWN.sub(" ", html), flags=re.DOTALL)
    return " ".join(unescape(text).split())


@pytest.mark.slow
@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize("what", ["page", "full", "canvas", "crowded"])
def test_the_page_and_the_canvas_are_one_sheet_each_in_any_font(
    page, full, crowded, world, tmp_path, what, font
):
    if what in ("page", "canvas") and font in ("sans", "serif"):
        pytest.skip("the fuller pages cover it")
    board = crowded if what == "crowded" else ml_canvas(world[0], None, page)
    shown = {"page": page, "full": full}.get(what)
    html = facts_html(shown) if shown else canvas_html(board)
    html = html.replace("</style>", f"body, body * {{ {FONTS[font]} }}</style>")
    sheets, kind = printed(html, tmp_path)
    assert sheets == 1
    assert kind >= (SMALLEST if what in ("full", "crowded") else 0.8)


def test_what_finds_no_room_is_counted(full, page):
    assert f"{len(full['features']) - 12} more in the JSON" in seen(facts_html(full))
    assert "more in the JSON" not in seen(facts_html(page))


def test_the_facts_have_the_declared_fields_and_types(page):
    assert msgspec.convert(json.loads(json.dumps(page)), ModelFacts, strict=True) == page
    with pytest.raises(msgspec.ValidationError, match="missing required field `gate`"):
        msgspec.convert({k: v for k, v in page.items() if k != "gate"}, ModelFacts)


def test_numbers_are_those_of_performance(world, page):
    study, known = world[0], world[4]
    mine = known[known.version.eq(1).fillna(False) & known.matured & known.y.notna()]
    measured, shown = performance(mine.y, mine.risk), page["performance"]
    assert shown["kind"] == "served" and shown["matured"] == len(mine)
    for name in MEASURES:
        ends = [shown["overall"][f"{name}{end}"] for end in ("", "_low", "_high")]
        assert ends == list(measured[name])
    periods, groups = by_period(study, mine), by_subgroups(study, mine)
    assert [row["oe"] for row in shown["periods"]] == periods.oe.tolist()
    assert [row["auroc_high"] for row in shown["subgroups"]] == groups.auroc_high.tolist()
    assert sum(group["patients"] for group in shown["curve"]) == len(mine)


def test_the_page_shows_what_the_json_says(page):
    text, row, t = seen(facts_html(page)), page["performance"]["overall"], page["training"]
    for name, digits in (("oe", 2), ("slope", 2), ("auroc", 2), ("brier", 3)):
        value, low, high = (f"{row[name + end]:.{digits}f}" for end in ("", "_low", "_high"))
        assert f"{value} ({low} to {high})" in text
    for group in page["performance"]["subgroups"]:
        assert f"{group['label']}: {group['value']} {group['patients']:,}" in text
    for known in (f"{t['patients']:,}, {t['events']}", t["snapshot"][:12], t["first"], t["last"]):
        assert known in text
    for limit in page["limits"]:
        assert limit["text"] in text
    assert page["lineage"]["fingerprint"][:12] in text and "first model" in text


def test_training_data_are_those_that_training_takes(world, page):
    trained = trainable(world[7])
    assert page["training"]["patients"] == len(trained)
    assert page["training"]["events"] == trained.y.sum()
    ages = [page["features"][1]["training"][k] for k in ("low", "median", "high")]
    assert ages == trained.age.quantile([0.05, 0.5, 0.95]).tolist()


def test_a_version_without_matured_outcomes_shows_apparent_numbers_and_names_them_so(world):
    study, _, model, registered, known, updates, verdicts, snapshot = world
    none = known.assign(version=pd.array([pd.NA] * len(known), dtype="Int64"))
    page = model_facts(study, 1, model, registered, none, updates, verdicts, snapshot)
    trained = trainable(snapshot)
    same = performance(trained.y, model.predict_proba(trained)[:, 1])
    assert page["performance"]["overall"]["auroc"] == same["auroc"].value
    assert page["performance"]["kind"] == "apparent" and "optimistic" in seen(facts_html(page))
    item = {row["item"]: row for row in tripod_checklist(study, page)}["23a"]
    assert not item["answered"] and "apparent" in item["answer"].lower()


def test_without_snapshot_or_patients_the_reports_name_what_is_not_known(world):
    study, _, model, registered, known, updates, verdicts, _ = world
    page = model_facts(study, 1, model, registered, known[:0], updates[:0], verdicts, None)
    assert page["performance"]["kind"] == "none" and page["training"]["patients"] is None
    text = seen(facts_html(page)) + seen(tripod_html(tripod_checklist(study, page), page))
    assert "not known" in text and "nan" not in text.lower().split()
    metrics = {"apparent_patients": 900.0, "apparent_events": 170.0, "apparent_auroc": 0.7}
    registered = registered | {"metrics": metrics}
    page = model_facts(study, 1, model, registered, known[:0], updates, verdicts, None)
    assert page["performance"]["kind"] == "apparent" and "0.70" in seen(facts_html(page))


def test_one_outcome_only_gives_dashes_and_no_nan(world):
    study, _, model, registered, known, updates, verdicts, snapshot = world
    healthy = known.assign(y=known.y.where(known.y.isna(), 0.0))
    page = model_facts(study, 1, model, registered, healthy, updates, verdicts, snapshot)
    assert page["performance"]["overall"]["auroc"] is None
    text = seen(facts_html(page))
    assert "both outcomes are needed" in text and "No event occurred among" in text
    json.dumps(page, allow_nan=False)


def test_data_never_become_markup(world, page):
    study, _, model, registered, known, _, verdicts, snapshot = world
    evil = replace(study, title=EVIL, question=EVIL, not_for=(EVIL,), source=EVIL, citation=EVIL)
    first = replace(study.features[0], description=f"sex: f {EVIL}", owner=EVIL)
    evil = replace(evil, features=(first, *study.features[1:]))
    done = steps(("1987-01-01", "first", None, 1, EVIL, json.dumps({"approved_by": EVIL})))
    known = known.assign(source=EVIL)
    answers = {"tripod": {"3b": EVIL}}
    made = model_facts(evil, 1, model, registered, known, done, verdicts, snapshot, answers)
    items = tripod_checklist(evil, made, {"tripod": {"17": EVIL}})
    board = ml_canvas(evil, {"approvers": [EVIL]}, made, answers={"canvas": {"decisions": EVIL}})
    for html in (facts_html(made), tripod_html(items, made), canvas_html(board)):
        assert "<script" not in OWN.sub("", html, 1) and "&lt;script&gt;" in html
        assert EVIL not in html


def test_the_reports_need_nothing_from_outside(world, page):
    items = tripod_checklist(world[0], page)
    for html in (facts_html(page), tripod_html(items, page), canvas_html(ml_canvas(world[0]))):
        assert not re.search(r"<script\s|<link|<img|@import|url\(|src=|href=|fetch", html)
        assert "default-src 'none'" in html


def test_no_script_may_run_but_the_one_that_sets_the_type(world, page):
    for html in (facts_html(page), canvas_html(ml_canvas(world[0]))):
        (script,) = OWN.findall(html)
        digest = sha256(script.removeprefix("<script>").removesuffix("</script>").encode()).digest()
        allowed = re.search(r"script-src ([^;\"]+)", html)[1]
        assert allowed == f"'sha256-{b64encode(digest).decode()}'"
    assert "script-src" not in tripod_html(tripod_checklist(world[0], page), page)


def luminance(colour):
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("name", ["ink", "quiet", "blue"])
def test_text_has_the_contrast_that_wcag_asks_for(page, name):
    colour = re.search(rf"--{name}: (#[0-9a-f]{{6}})", facts_html(page))[1]
    assert 1.05 / (luminance(colour) + 0.05) >= 4.5


def test_every_item_of_tripod_is_there_once_with_an_honest_flag(world, page):
    items = tripod_checklist(world[0], page)
    numbers = [row["item"] for row in items]
    assert numbers == [row["item"] for row in checklist_items()] and len(set(numbers)) == 52
    assert {int(re.match(r"\d+", item)[0]) for item in numbers} == set(range(1, 28))
    for row in items:
        assert row["answered"] == (bool(row["answer"]) and not row["left"])
        assert bool(row["answer"]) == bool(row["source"])
    by_item = {row["item"]: row for row in items}
    assert all(not by_item[item]["answered"] and not by_item[item]["answer"] for item in OWNERS)
    text = seen(tripod_html(items, page))
    assert all(row["asks"] in text for row in items)
    assert text.count("To be answered by the study’s owner") == sum(bool(r["left"]) for r in items)


def test_the_owner_closes_what_is_open(world, page, tmp_path):
    study = replace(world[0], folder=tmp_path)
    assert read_answers(study) == {"tripod": {}, "canvas": {}}
    text = '[tripod]\n17 = "Committee of the ward, 7/85."\n3b = "Physicians on duty."\n'
    (tmp_path / "answers.toml").write_text(text + '[canvas]\ndecisions = "Who is watched."\n')
    answers = read_answers(study)
    items = {row["item"]: row for row in tripod_checklist(study, page)}
    assert items["17"]["answer"] == "Committee of the ward, 7/85." and items["17"]["answered"]
    assert items["3b"]["answered"] and items["3b"]["source"].endswith("owner")
    made = model_facts(study, *world[1:], answers)
    assert "Physicians on duty." in seen(facts_html(made))
    board = {field["field"]: field for field in ml_canvas(study)["fields"]}
    assert board["decisions"]["lines"][0] == "Who is watched." and not board["decisions"]["left"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('[tripod]\n28 = "x"', "tripod: 28 is unknown"),
        ("[tripod]\n17 = 3", "tripod.17 = 3 must be text"),
        ('[tripod]\n17 = " "', "tripod.17 = ' ' must be text"),
        ('[model]\na = "x"', "model is unknown"),
        ("tripod = ", "cannot be read"),
    ],
)
def test_wrong_answers_are_refused_in_one_sentence(world, tmp_path, text, word):
    (tmp_path / "answers.toml").write_text(text)
    with pytest.raises(LMError, match=word):
        read_answers(replace(world[0], folder=tmp_path))


def test_history_gate_and_origin_follow_the_updates(world):
    study, _, model, registered, known, _, verdicts, snapshot = world
    check = {"name": "compatibility", "passed": True, "value": 0.98, "bound": 0.9, "sentence": "ok"}
    lost = {"rung": "refit", "passed": False, "checks": [check | {"passed": False}]}
    won = {"rung": "recalibrate", "passed": True, "checks": [check]}
    evidence = {"gates": [lost, won], "approved_by": "Dr Roe"}
    updates = steps(
        ("1987-01-01", "first", None, 1, "first model", "{}"),
        ("1988-01-01", "keep", 1, None, "no better", "{}"),
        ("1989-01-01", "recalibrate in the large", 1, 2, "too high", json.dumps(evidence)),
        ("1989-06-01", "rollback", 2, 1, "as it was", "{}"),
    )
    moved = model.recalibrated(-0.2)
    registered = registered | {"tags": registered["tags"] | {"fingerprint": moved.fingerprint()}}
    page = model_facts(study, 2, moved, registered, known, updates, verdicts, snapshot)
    assert [check["name"] for check in page["gate"]] == ["compatibility"] and page["gate"][0][
        "passed"
    ]
    approved = [step["approved"] for step in page["history"]["steps"]]
    assert approved == ["automatic", "Dr Roe", "by hand, no name stored"]
    assert page["history"]["keep_decisions"] == 1 and not page["champion"]
    assert page["served"] == [["1989-01-01", "1989-06-01"]]
    assert page["training"]["fitted_as"] == 1 and page["training"]["recalibrated"]
    assert "Coefficients are those of version 1" in seen(facts_html(page))
    assert [end for _, end in champion_periods(1, updates)][-1] is None
    rounds = updates.assign(from_version=[2, 1, 1, 2], action="recalibrate")
    assert fitted_as(1, rounds) in (1, 2)


def test_a_run_without_a_scan_is_no_evidence_of_stability(world):
    study, _, model, registered, known, updates, _, snapshot = world
    scanned = {"alarms": [], "drift": [{"feature": "hichol", "moved": True}]}
    alarm = {"alarms": [{"chart": "less often where hichol is y", "began": "1989-05-10"}]}
    rows = [("1988-01-01", "nothing", "calm", 1, json.dumps(scanned))]
    rows += [("1989-01-01", "recalibrate", "too high", 1, json.dumps(alarm))]
    verdicts = pd.DataFrame(rows, columns=["as_of", "action", "reason", "version", "evidence"])
    verdicts["as_of"] = pd.to_datetime(verdicts.as_of)
    last = model_facts(study, 1, model, registered, known, updates, verdicts, snapshot)["monitor"]
    assert last["moved"] == ["history of high cholesterol"] and last["monitoring_runs"] == 2
    assert last["alarms"] == [
        "less often where history of high cholesterol is yes, since about 1989-05-10"
    ]
    verdicts = verdicts[1:]
    quick = model_facts(study, 1, model, registered, known, updates, verdicts, snapshot)
    assert quick["monitor"]["moved"] is None
    assert _evidence({"evidence": None}) == {} and _evidence({"evidence": {"a": 1}}) == {"a": 1}


def test_every_scanned_column_has_a_label_the_predicted_risk_too(world):
    study, _, model, registered, known, updates, _, snapshot = world
    watched = column_layout(study, known[known["risk"].notna()])
    names = [column.name for column in watched]
    assert {"risk", *study.feature_names} <= set(names)
    scanned = {"alarms": [], "drift": [{"feature": name, "moved": True} for name in names]}
    row = ("1989-01-01", "look at the data", "moved", 1, json.dumps(scanned))
    verdicts = pd.DataFrame([row], columns=["as_of", "action", "reason", "version", "evidence"])
    verdicts["as_of"] = pd.to_datetime(verdicts.as_of)
    page = model_facts(study, 1, model, registered, known, updates, verdicts, snapshot)
    assert page["monitor"]["moved"][names.index("risk")] == "predicted risk"
    assert len(page["monitor"]["moved"]) == len(names)
    assert "Shifted since training: " in seen(facts_html(page))


def test_another_model_than_the_registered_one_is_refused(world):
    study, _, model, registered, *rest = world
    with pytest.raises(LMError, match="not the model that was registered"):
        model_facts(study, 1, model.recalibrated(0.1), registered, *rest)


def test_the_canvas_has_its_fields_and_shows_any_plan(world):
    @dataclass(frozen=True)
    class Plan:
        where: str = "plan.toml"
        automatic: tuple = ("first", "recalibrate")
        oe: tuple = (0.8, 1.25)
        approvers: tuple = ()

    board = ml_canvas(world[0], Plan(), budget=0.5)
    lines = {field["field"]: field["lines"] for field in board["fields"]}
    assert tuple(lines) == CANVAS_FIELDS and "oe: 0.8 to 1.25" in lines["offline evaluation"]
    assert "automatic: first, recalibrate" in lines["building models"]
    assert "approvers: none" in lines["live monitoring"]
    assert any(line.startswith("Budget: 0.5 false alarms") for line in lines["live monitoring"])
    assert "No change-control plan" in seen(canvas_html(ml_canvas(world[0])))


def test_a_horizon_of_hours_is_passed_in_hours(world):
    study = replace(world[0], horizon_days=0.5)
    page = model_facts(study, *world[1:])
    text = json.dumps([page, tripod_checklist(study, page), ml_canvas(study)])
    assert text.count("12 hours") >= 3 and "0.5 days" not in text


def test_reports_are_written_under_the_name_of_their_version(world, page, tmp_path):
    items, board = tripod_checklist(world[0], page), ml_canvas(world[0])
    paths = write_reports(tmp_path / "new", page, items, board)
    names = ["facts-v1.html", "facts-v1.json", "tripod-v1.html", "canvas.html"]
    assert [path.name for path in paths.values()] == names
    assert json.loads(paths["json"].read_text(encoding="utf-8")) == page
    again = write_reports(tmp_path / "twice", page, items, board)
    for kind, path in paths.items():
        assert path.read_bytes() == again[kind].read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(LMError, match="cannot be written"):
        write_reports(tmp_path / "file", page, items, board)


def test_assets_travel_with_the_package():
    root = ROOT
    names = {"document.html.j2", "facts.html.j2", "curve.svg.j2", "tripod.html.j2"}
    names |= {"canvas.html.j2", "sheet.html.j2", "fit.js", "tripod.toml"}
    assert names <= {path.name for path in (root / "lm" / "assets").iterdir()}

"""The page of patients' data without a browser: on a machine, and on a client of it."""

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.times import parse_time
from lm.core.validation import RejectedRecord, check_row, row_faults
from lm.core.wording import percent
from lm.data.records import UnknownRecord
from lm.data.source import outcomes, stream
from lm.machine.machine import Machine
from lm.machine.queries import training_data
from lm.model.predict import fit
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client
from lm.serve.routes import PERMISSIONS
from lm.ui import patients_page as page
from lm.ui.arrivals import Arrivals
from lm.ui.charts.reference_ranges import compare_with_training, strip_html, strip_positions
from lm.ui.formatting import record_status_html
from lm.ui.patients_actions import (
    FILE_BYTES,
    PART_ROWS,
    EntryForm,
    FileUpload,
    field_label,
    next_name,
)
from lm.ui.patients_state import PATIENT_TABS, PatientsState
from lm.ui.scientist_page import champion_html
from lm.ui.scientist_state import DataScientistState
from lm.update.ladder import trainable

NASTY = "<script>alert(1)</script>"
STUDY = replace(load_study("monica"), person="nr")
ROWS = read_rows(STUDY)
HISTORY = ROWS[ROWS["arrived"] < STUDY.first_model]
LATER = ROWS[ROWS["arrived"] >= STUDY.first_model].reset_index(drop=True)
MODEL = fit(STUDY, HISTORY[HISTORY["known_at"] < STUDY.first_model])
COLUMNS = ["record_id", "arrived", *STUDY.feature_names]
LABELLED = 260  # Of the 300 patients of the history


def inputs(i, **change):
    """The i-th later patient as a client would send them."""
    return LATER.loc[i, COLUMNS].to_dict() | {"nr": ""} | change


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a history, one version and six patients since."""
    folder = tmp_path_factory.mktemp("made")
    with Machine(STUDY, folder) as machine:
        machine.receive_many(HISTORY[COLUMNS].head(300), on_arrival=True)
        machine.add_outcomes(HISTORY.head(LABELLED))
        snap = machine.snapshot(STUDY.first_model)
        machine.registry.register(MODEL, {}, {}, snap, "for the test")
        first = {"as_of": STUDY.first_model, "action": "first", "reason": "first model"}
        machine.adopt(first | {"from_version": None, "to_version": 1})
        for i in range(6):
            arrive(machine, i)
    return folder


@pytest.fixture
def machine(made, tmp_path):
    """A machine of one's own, as `made` says."""
    shutil.copytree(made, tmp_path / "home")
    with Machine(STUDY, tmp_path / "home") as machine:
        yield machine


@pytest.fixture
def served(machine):
    """The machine behind a service: machine, address, tokens."""
    with background(machine) as url:
        yield machine, url, Tokens(machine.store.folder)


def arrive(machine, i, **change):
    """One of the later patients comes on their own day."""
    row = inputs(i, **change)
    return machine.receive(row, now=row["arrived"])


def text(widget, plain=True):
    """All HTML below a widget, with the plain text of descriptions if wanted."""
    if isinstance(widget, widgets.HTML):
        return widget.value
    inner = " ".join(text(child, plain) for child in getattr(widget, "children", ()))
    return f"{getattr(widget, 'description', '') if plain else ''} {inner}"


def button(widget, name):
    """The button below a widget whose description begins with `name`."""
    if isinstance(widget, widgets.Button) and widget.description.startswith(name):
        return widget
    result = (button(child, name) for child in getattr(widget, "children", ()))
    return next((one for one in result if one is not None), None)


# ---------------------------------------------------------------------------- rules, persons


def test_faults_are_what_check_row_would_refuse_one_after_the_other():
    rng, bad = np.random.default_rng(3), ["", "x", "340", None, float("inf"), True, "n"]
    for _ in range(200):
        row = inputs(int(rng.integers(len(LATER))))
        for name in rng.choice([*COLUMNS, "nr"], rng.integers(0, 4), replace=False):
            row[name] = bad[rng.integers(len(bad))]
        result = row_faults(STUDY, row)
        try:
            check_row(STUDY, row)
            assert result == {}
        except RejectedRecord as error:
            assert next(iter(result.items())) == (error.field, error.rule)


@pytest.mark.parametrize("key", ["'age'", "'record_id'", "'Risk'", "7", "'a\"b'", "' nr'"])
def test_a_person_column_must_be_a_column_of_its_own(tmp_path, key):
    parent = STUDY.folder
    (tmp_path / "study.toml").write_text(f'extends = "{parent}"\nperson = {key}\n')
    with pytest.raises(LMError, match="person"):
        load_study(tmp_path)
    (tmp_path / "study.toml").write_text(f'extends = "{parent}"\nperson = "nr"\n')
    assert load_study(tmp_path).person == "nr"


def test_visits_of_one_person_are_detected_however_they_came(served):
    machine, url, tokens = served
    arrive(machine, 10, nr=12)
    arrive(machine, 11, nr=" 12 ")
    many = pd.DataFrame([inputs(12, nr=12.0), inputs(13, nr=13.0), inputs(14, nr=None)])
    machine.receive_many(many, on_arrival=True)
    names = LATER["record_id"]
    mine = machine.visits(names[12])
    assert mine["record_id"].tolist() == [*names[10:12], names[12]]
    assert mine["risk"].notna().all() and mine["arrived"].is_monotonic_increasing
    assert machine.visits(names[13])["record_id"].tolist() == [names[13]]
    assert machine.visits(names[14])["record_id"].tolist() == [names[14]]  # Without a person
    machine.add_outcome(names[10], 1, known_at=inputs(10)["arrived"])
    assert machine.visits(names[12])["y"].iloc[0] == 1
    with Client(url, token=tokens.create("C", "clinician")) as client:
        pd.testing.assert_frame_equal(client.visits(names[11]), machine.visits(names[11]))
        with pytest.raises(UnknownRecord, match="'absent/7' is unknown"):
            client.visits("absent/7")
    with pytest.raises(RejectedRecord, match=r"nr = .* breaks the rule: a name or whole number"):
        arrive(machine, 15, nr=[12])


def test_a_studys_own_rows_keep_their_person_until_the_visits(tmp_path):
    toml = f'extends = "{STUDY.folder}"\nperson = "nr"\nrows = "rows.csv"\n'
    (tmp_path / "study.toml").write_text(toml)
    table = pd.read_csv(STUDY.rows, dtype=str).head(40)
    table["nr"] = [f"n{i // 2}" if i > 1 else "" for i in range(40)]
    table.to_csv(tmp_path / "rows.csv", index=False)
    study = load_study(tmp_path)
    rows = read_rows(study)
    assert rows["nr"].isna().sum() == 2 and rows["nr"].nunique() == 19
    events = [event.row for event in stream(study, rows) if event.kind == "record"]
    named = rows["nr"].astype(object).where(rows["nr"].notna(), None)
    assert [event["nr"] for event in events] == named.tolist()
    with Machine(study, tmp_path / "home") as machine:
        machine.receive_many(rows.head(20), on_arrival=True)
        for event in events[20:]:
            machine.receive(event, now=event["arrived"])
        for name, mine in rows.groupby("nr")["record_id"]:
            seen = [machine.visits(one)["record_id"].tolist() for one in mine]
            assert seen == [mine.tolist()] * 2, name
        assert len(machine.visits(rows.loc[rows["nr"].isna(), "record_id"].iloc[0])) == 1
    table.drop(columns="nr").to_csv(tmp_path / "rows.csv", index=False)
    assert "nr" not in read_rows(study)  # Persons may become known later


def test_a_study_without_a_person_shows_each_record_alone(tmp_path):
    with Machine("monica", tmp_path) as machine:
        for i in (0, 1):
            arrive(machine, i, nr="12")
        assert len(machine.visits(LATER["record_id"][0])) == 1
        state = PatientsState(machine)
        panel = page.patients(machine, state=state)
        assert state.visits == [] and "names no column for the person" in text(panel)


# ------------------------------------------------------------------------------ what was learned


def test_learned_sums_up_the_training_patients_of_the_champion(served):
    machine, url, tokens = served
    seen = machine.training_summary()
    known = trainable(machine.known(STUDY.first_model))
    assert (seen["version"], seen["n"]) == (1, len(known)) and len(known) == LABELLED
    assert (
        training_data(machine, 1)["record_id"].tolist()
        == HISTORY["record_id"].head(LABELLED).tolist()
    )
    ages = sorted(known["age"])
    points = seen["features"]["age"]["percentiles"]
    assert [points[0], points[50], points[100]] == [ages[0], ages[LABELLED // 2 - 1], ages[-1]]
    shares = seen["features"]["smstat"]["shares"]
    rest = known["smstat"].dropna()
    assert shares == pytest.approx({w: (rest == w).mean() for w in ("n", "x", "c")})
    assert seen["features"]["smstat"]["missing"] == pytest.approx(known["smstat"].isna().mean())
    arrive(machine, 20, age=104.0)
    assert machine.training_summary() == seen
    with Client(url, token=tokens.create("C", "clinician")) as client:
        assert client.training_summary() == seen
    machine.add_outcome(inputs(20)["record_id"], 0, LATER["known_at"][20])
    machine.add_outcomes(
        outcomes(STUDY, HISTORY.iloc[LABELLED:])
    )  # Else too few labels are known there
    later = machine.snapshot(LATER["known_at"][20])
    second = machine.registry.register(MODEL, {}, {}, later, "again")
    machine.promote(second, "a test", machine.plan.approvers[0])
    assert machine.training_summary()["n"] == 300 + 1  # Six who came before have no outcome yet
    assert machine.training_summary()["features"]["age"]["percentiles"][100] == 104.0


def test_a_recalibrated_version_has_the_training_patients_of_its_coefficients(machine):
    snap, seen = machine.snapshot(), machine.training_summary()
    made = {"from_version": 1, "since": None, "as_of": str(snap["as_of"]), "recipe": {}}
    params = {"action": "recalibrate", "made": json.dumps(made)}
    moved = machine.registry.load(1).recalibrated(0.3)
    version = machine.registry.register(moved, {}, params, snap, "moved")
    machine.promote(version, "a test", machine.plan.approvers[0])
    assert (
        machine.training_summary()["n"] == seen["n"]
        and machine.training_summary()["version"] == version
    )
    shown = machine.facts(version)["training"]
    assert shown["patients"] == seen["n"] == machine.facts(1)["training"]["patients"]
    assert (shown["fitted_as"], shown["recalibrated"]) == (1, True)


def test_learned_before_the_first_model(tmp_path):
    with Machine(STUDY, tmp_path) as machine:
        arrive(machine, 0)
        assert machine.training_summary() == {
            "version": None,
            "as_of": None,
            "n": 0,
            "features": {},
        }
        panel = page.patients(machine, STUDY)
        assert "No model is in service yet" in text(panel) and "no risk" in text(panel)


def test_a_feature_that_no_patient_had_is_compared_with_no_patient():
    age = STUDY.feature("age")
    empty = {"missing": 1.0, "percentiles": []}
    assert (
        compare_with_training(age, 60, empty).place == "unknown"
        and strip_html(age, 60, empty) == ""
    )
    one = strip_positions(age, 60.0, [60.0] * 101)
    assert set(one.values()) == {2.0}


@pytest.mark.parametrize("seed", range(5))
def test_categories_and_strip_agree_with_the_patients(seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.gamma(2, 20, 400))
    points = np.percentile(values, np.arange(101), method="inverted_cdf").tolist()
    seen, feature = {"missing": 0.0, "percentiles": points}, load_study("rotterdam").feature("pgr")
    for value in [*rng.choice(values, 20), values.max() + 1]:
        result, at = (
            compare_with_training(feature, value, seen, 400),
            strip_positions(feature, value, points),
        )
        assert min(at.values()) >= 2 and max(at.values()) <= 98
        if match := re.search(r"(higher|lower) than (\d+) of 100", result.text):
            side = values < value if match[1] == "higher" else values > value
            assert 100 * side.mean() == pytest.approx(int(match[2]), abs=1.5)
        elif result.place == "above":
            assert value > values.max() and at["mark"] == 98


# ------------------------------------------------------------------------------------- the queue


class Late:
    """A client for which something comes after every status."""

    def __init__(self, machine, then):
        self.machine, self.then = machine, then

    def status(self):
        now = self.machine.status()
        self.then()
        return now

    def __getattr__(self, name):
        return getattr(self.machine, name)


def same(queue, machine):
    """Whether a queue has what one would have that reads everything now."""
    whole = Arrivals()
    whole.read(machine, machine.status()["counts"])
    columns = ["record_id", "arrived", "risk", "version", "y", "decision"]
    left, right = (
        q.rows[columns]
        .astype({"decision": str, "version": float, "y": float})
        .reset_index(drop=True)
        for q in (queue, whole)
    )
    pd.testing.assert_frame_equal(left, right)


@pytest.mark.parametrize("burst", [1, 30])
def test_reading_what_is_new_gives_what_reading_all_gives(machine, burst):
    after = iter(range(10, 500))

    def more():
        for _ in range(burst):
            arrive(machine, next(after))

    queue, client = Arrivals(), Late(machine, more)
    for step in range(4):
        queue.read(client, client.status()["counts"])
        name = LATER["record_id"][step]
        machine.add_decision(name, "Dr Curie", "agree")
        machine.add_outcome(name, step % 2, known_at=LATER["arrived"][step] + STUDY.horizon)
    queue.read(machine, machine.status()["counts"])
    same(queue, machine)
    assert list(queue.statuses()[300:304]) == ["outcome known"] * 4
    day = LATER["arrived"][9]
    machine.add_outcome(LATER["record_id"][1], None, day, followed_until=day)  # It was a mistake
    queue.read(machine, machine.status()["counts"])
    same(queue, machine)
    assert queue.statuses()[301] == "seen"


def test_the_list_stands_still_while_patients_come(machine):
    state = PatientsState(machine, STUDY)
    form = EntryForm(state)
    state.turn(9)
    state.choose(LATER["record_id"][2])
    form.put("age", "61")
    before, shown, heard = state.to_dict(), list(state.listed), []
    entry = form.entry
    state.observe(lambda change: heard.append(change["name"]))
    for i in range(6, 10):
        arrive(machine, i)
    machine.add_decision(LATER["record_id"][2], "Dr Curie", "agree")
    state.tick()
    assert state.to_dict() == before and form.entry == entry
    assert [key for key, _ in state.listed] == [key for key, _ in shown]
    assert state.news == LATER["record_id"][6:10].tolist() and state.counts["new"] == 309 - LABELLED
    assert not {"record_id", "tab", "top", "entry", "rules", "found", "training"} & set(heard)
    assert "▲ 4 new, show: " in page.news_text(state.news)
    state.search()
    assert state.listed[0][0] == LATER["record_id"][9] and state.news == []
    assert state.match_count == 310


def test_times_are_those_of_the_studys_zone(machine):
    study, late = replace(STUDY, time_zone="Europe/Berlin"), pd.Timestamp("1987-01-20T23:30:00")
    machine.receive(inputs(9, record_id="late", arrived=late), now=late)
    state = PatientsState(machine, study)
    panel = page.patients(machine, study, state)
    form = panel.form
    assert dict(state.listed)["late"].endswith(f"21 Jan 1987 · {percent(state.patient['risk'])}")
    shown = text(panel)
    assert "arrived 21 Jan 1987, 00:30" in shown and "times in Europe/Berlin" in shown
    state.query = "21 Jan 1987"
    assert [name for name, _ in state.listed] == ["late"]
    form.correct()
    assert parse_time(form.entry["arrived"], study.time_zone) == late and not form.rules
    shown = record_status_html({"record_id": "a", "counts_as": "b", "withdrawn_by": None})
    assert "Superseded: b corrects this record" in shown
    gone = {"record_id": "a", "counts_as": None, "withdrawn_by": NASTY}
    assert "Withdrawn by &lt;script" in record_status_html(gone)
    assert (
        record_status_html({"record_id": "a"})
        == record_status_html(gone | {"withdrawn_by": None})
        == ""
    )


def test_search_filter_and_pages(machine):
    machine.add_decision(LATER["record_id"][0], "Dr Curie", "unsure")
    machine.add_outcome(LATER["record_id"][1], 0, known_at=LATER["arrived"][1] + STUDY.horizon)
    state = PatientsState(machine, STUDY)
    assert state.counts == {"all": 306, "new": 304 - LABELLED, "seen": 1} | {
        "outcome known": 1 + LABELLED
    }
    state.show = "seen"
    assert [key for key, _ in state.listed] == [LATER["record_id"][0]]
    state.show = "outcome known"
    assert state.listed[0][1].split("\n")[1].startswith("■ outcome known · ")
    state.show, state.query = "all", LATER["record_id"][3].upper()
    assert [key for key, _ in state.listed] == [LATER["record_id"][3]]
    state.query = "jan 1987"
    days = pd.concat([HISTORY.head(300), LATER.head(6)])["arrived"].dt.strftime("%b %Y")
    assert state.match_count == (days == "Jan 1987").sum() > 0
    state.query = "("
    assert state.match_count == 0 and state.listed == []
    state.query = ""
    for _ in range(60):
        state.turn(9)
    assert state.top == 297 and len(state.listed) == 9
    state.turn(-999)
    assert state.top == 0


def test_a_decision_shows_without_moving_a_filtered_list(machine):
    state = PatientsState(machine, STUDY)
    state.show = "new"
    first = state.listed[0][0]
    machine.add_decision(first, "Dr Curie", "agree")
    state.tick()
    assert state.listed[0][0] == first and "✓ seen" in state.listed[0][1]


# ------------------------------------------------------------------------------------------ roles


def test_each_role_sees_what_its_token_may(served):
    machine, url, tokens = served
    with pytest.raises(RejectedRecord):
        arrive(machine, 7, age=340)
    people = {role: tokens.create(role.title(), role) for role in ("clinician", "data scientist")}
    for role, token in people.items():
        with Client(url, token=token) as client:
            panel = page.patients(client, STUDY)
            state = panel.state
            state.person = client.page("patients")
            state.tab = "Send a file"
            assert ("rejected" in state.counts) is (role == "data scientist")
            assert ("one patient at a time" in text(panel)) is (role == "clinician")
            assert not state.failed and state.patient["record_id"]
    kinds = machine.table("audit")["kind"].tolist()
    assert "refused" not in kinds  # Nothing was asked that the middleware had to refuse
    for route in ("/v1/training-summary", "/v1/visits/{record_id:path}"):
        assert PERMISSIONS["GET", route] == PERMISSIONS["GET", "/v1/patients"] - {"job"}
    viewer = tokens.create("V", "viewer")
    with Client(url, token=viewer) as client, pytest.raises(LMError):
        client.training_summary()


def test_the_refused_rows_may_be_looked_at_before_there_are_any(machine):
    state = PatientsState(machine, STUDY)
    state.person, state.show = machine.page("patients"), "rejected"
    assert state.match_count == 0 and state.listed == []
    with pytest.raises(RejectedRecord):
        arrive(machine, 7, age=340)
    state.tick()
    assert state.listed[0][1].split("\n")[0] == LATER["record_id"][7]
    with pytest.raises(RejectedRecord):
        machine.receive({"age": 4})
    state.tick()
    assert state.news == ["no record name"] and state.match_count == 1
    state.search()
    assert [row[1].split("\n")[0] for row in state.listed] == [
        "no record name",
        LATER["record_id"][7],
    ]
    state.choose(state.listed[0][0])
    panel = page.patients(machine, state=state)
    form = panel.form
    form.correct()
    assert state.tab == "Enter or correct" and "4" in text(panel)


def test_a_refused_row_is_listed_opened_and_corrected(machine):
    with pytest.raises(RejectedRecord):
        arrive(machine, 7, age=340, smstat=NASTY)
    state = PatientsState(machine, STUDY)
    assert "rejected" not in state.counts
    state.person = machine.page("patients")
    state.show = "rejected"
    assert state.counts["rejected"] == 1
    state.choose(state.listed[0][0])
    panel = page.patients(machine, state=state)
    form = panel.form
    assert "340" in text(panel) and NASTY not in text(panel)
    form.correct()
    assert state.tab == "Enter or correct" and form.entry["record_id"] == LATER["record_id"][7]
    assert set(form.rules) == {"age"} and form.entry["smstat"] == ""
    form.put("age", "54")
    form.send()
    assert not state.failed and machine.explain(LATER["record_id"][7])["features"]["age"] == 54


# --------------------------------------------------------------------------------------- the form


def fill_in(form, i, **change):
    """Type a patient into the form."""
    for name, value in inputs(i, **change).items():
        form.put(name, "" if value is None or value != value else str(value))


def test_the_form_says_the_machines_own_rule_and_sends_nothing(machine):
    state = PatientsState(machine, STUDY)
    form = EntryForm(state)
    assert form.rules == {} and form.entry["record_id"] == "entered-1"
    form.put("age", "17")
    assert form.rules == {"age": "18 to 110 years"}
    form.put("arrived", "soon")
    form.send()
    assert state.failed and "arrived, age at onset, years" in state.message
    with pytest.raises(RejectedRecord) as refused:
        machine.receive(inputs(8, age="17"))
    assert form.rules["age"] == refused.value.rule
    assert machine.status()["counts"]["records"] == 306
    fill_in(form, 8)
    assert form.rules == {}
    form.send()
    name = LATER["record_id"][8]
    assert not state.failed and state.message == f"Stored as {name}."
    assert form.answer["risk"] == machine.explain(name)["risk"]
    stored = machine.table("records", record_id=name)
    assert stored["source"].item() == "form" and stored["arrived"].item() == LATER["arrived"][8]
    assert form.entry["record_id"] == "entered-1" and form.rules == {}


def test_the_machines_clock_does_not_jump_to_today(machine):
    state = PatientsState(machine, STUDY)
    form = EntryForm(state)
    clock = machine.status()["clock"]
    assert parse_time(form.entry["arrived"]) == pd.Timestamp(clock)
    fill_in(form, 8, record_id="late", arrived="1986-02-03")
    form.send()
    assert machine.status()["clock"] == clock
    fill_in(form, 8, record_id="next", arrived="1987-06-07")
    form.send()
    assert machine.status()["clock"].startswith("1987-06-07")
    assert "replayed: its clock stands at 7 Jun 1987" in page.form_head_html(form)
    fill_in(form, 9, record_id="typo", arrived="2142-06-07")
    form.send()
    assert state.failed and "2142-06-07" in state.message and "later than now" in state.message
    assert machine.status()["clock"].startswith("1987-06-07") and not machine.has("typo")


def test_a_correction_is_a_new_record_beside_the_old_one(machine):
    arrive(machine, 6, nr="p7")
    state = PatientsState(machine, STUDY)
    name = LATER["record_id"][6]
    before = machine.explain(name)
    panel = page.patients(machine, state=state)
    form = panel.form
    form.correct()
    assert "never overwritten" in text(panel) and f"{name}-2" in text(panel)
    assert form.entry["nr"] == "p7" and form.rules == {}
    form.put("record_id", name)
    assert "never overwritten" in form.rules["record_id"]
    form.send()
    assert state.failed
    form.put("record_id", f"{name}-2")
    form.put("age", "70")
    form.send()
    assert not state.failed
    assert machine.explain(name) == before | {"counts_as": f"{name}-2"}
    assert machine.table("records", record_id=f"{name}-2")["corrects"].tolist() == [name]
    assert (machine.known()["record_id"] == f"{name}-2").sum() == 1
    counted = machine.status()
    assert counted["superseded"] == 1 and counted["counts"]["records"] == len(machine.known()) + 1
    shown = champion_html(DataScientistState(machine))
    assert f"<span>patients</span><b>{len(machine.known())}</b>" in shown
    assert name not in set(machine.known()["record_id"])
    state.search()
    listed = [key for key, _ in state.listed]
    assert f"{name}-2" in listed and name not in listed
    state.choose(name)
    assert f"Superseded: {name}-2 corrects this record" in page._patient_head_html(state)
    assert machine.visits(name)["record_id"].tolist() == [f"{name}-2"]
    state.tick()
    state.record_id = f"{name}-2"
    state.tab = "Patient"
    assert "only visit so far" in text(panel) and "Superseded" not in text(panel)
    assert next_name(name, {name, f"{name}-2"}) == f"{name}-3"


def test_a_name_that_another_process_took_meanwhile_is_not_sent(machine):
    state = PatientsState(machine, STUDY)
    form = EntryForm(state)
    fill_in(form, 8)
    arrive(machine, 8)
    form.send()
    assert state.failed and "is taken" in state.message
    assert machine.status()["counts"]["rejects"] == 0


def test_every_field_of_the_form_is_linked(machine):
    panel = page.patients(machine, STUDY)
    panel.state.tab = "Enter or correct"
    fields = {}

    def collect(widget):
        if isinstance(widget, (widgets.Text, widgets.Dropdown)):
            fields[widget.description] = widget
        for child in getattr(widget, "children", ()):
            collect(child)

    collect(panel)
    fields["age at onset, years"].value = "340"
    assert "✕ 18 to 110 years" in text(panel)
    fields["age at onset, years"].value = "69.5"
    assert "higher than" in text(panel) and "✕ 18" not in text(panel)
    fields["smoking"].value = "c"
    assert panel.form.entry["smstat"] == "c"
    button(panel, "Clear the form").click()
    assert fields["smoking"].value == "" == fields["age at onset, years"].value
    assert set(fields) - {"Search"} == {field_label(STUDY, n) for n in panel.form.fields()}


# ----------------------------------------------------------------------------------------- a file


def csv(rows):
    """Rows as a file's bytes."""
    return pd.DataFrame(rows).to_csv(index=False).encode()


def run(state, upload):
    """Look at the service until the file is through."""
    for _ in range(50):
        state.tick()
        if not upload.more:
            return
    raise AssertionError("the file does not end")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_each_row_of_a_file_gets_its_own_result(served, kind):
    machine, url, tokens = served
    rows = pd.DataFrame([inputs(i, nr=i) for i in range(10, 20)])
    rows.loc[3, "smstat"] = NASTY
    rows.loc[5, "record_id"] = rows.loc[4, "record_id"]
    rows.loc[7, "record_id"] = LATER["record_id"][0]  # Stored, with other values
    with Client(url, token=tokens.create("A", "data scientist")) as client:
        panel = page.patients(client, STUDY)
        upload = panel.upload
        state = panel.state
        state.person = client.page("patients")
        state.tab = "Send a file"
        content = csv(rows) if kind == "csv" else rows.to_parquet()
        upload.start(f"ward.{kind}", content)
        assert upload.more and not state.failed and len(machine.table("records")) == 306
        run(state, upload)
        state.tick()
        first = 2 if kind == "csv" else 1  # The head is line 1 of a CSV file
        refused = [row["row"] - first for row in upload.results if row["error"]]
        assert refused == [3, 5, 7]
        assert (upload.batch["accepted"], upload.batch["rejected"]) == (7, 3)
        for row in upload.results:
            if not row["error"]:
                assert row["risk"] == machine.explain(row["record_id"])["risk"]
        assert state.counts["all"] == 313 and state.counts["rejected"] == 3
        assert len(state.news) == 7 and machine.status()["clock"] < "1988"
        shown = text(panel)
        assert "7 rows accepted, 3 rejected" in shown and NASTY not in shown
        table = base64.b64decode(re.search('base64,(.*?)"', shown)[1]).decode()
        assert table.count("\n") == 11
    stored = machine.table("records", last=1)
    assert json.loads(stored["received"].item())["nr"] == "19"
    assert stored["source"].item() == f"ward.{kind}"


def test_a_long_file_goes_in_parts_and_can_be_stopped(machine):
    state = PatientsState(machine, STUDY)
    upload = FileUpload(state)
    rows = LATER[COLUMNS].iloc[10:710]
    upload.start("long.csv", csv(rows))
    state.tick()
    assert upload.batch["done"] == PART_ROWS and upload.more
    state.query = "m"  # The page is used meanwhile
    state.tick()
    upload.stop()
    state.tick()
    assert upload.batch["done"] == 2 * PART_ROWS and "to go" in page.results_html(
        upload.batch, upload.results, upload.more
    )
    assert machine.status()["counts"]["records"] == 306 + 2 * PART_ROWS
    upload.start("long.csv", csv(rows))  # Once more: what is stored is answered, nothing is doubled
    run(state, upload)
    assert upload.batch["accepted"] == 700 and machine.status()["counts"]["records"] == 1006


def test_a_service_that_goes_away_stops_a_file_with_a_sentence(machine):
    class Gone:
        lost = False

        def receive_many(self, *args, **how):
            raise LMError("the service does not answer")

        def __getattr__(self, name):
            return getattr(machine, name)

    state = PatientsState(Gone(), STUDY)
    upload = FileUpload(state)
    upload.start("w.csv", csv([inputs(10)]))
    state.tick()
    assert state.failed and not upload.more
    assert state.message == "Stopped after 0 of 1 rows: the service does not answer"


def big_parquet(tmp_path):
    """A few bytes that claim many rows."""
    path = tmp_path / "big.parquet"
    pd.DataFrame({name: ["x"] * 100_000 for name in COLUMNS}).to_parquet(path)
    return path.read_bytes()


def test_bad_files_get_one_sentence(machine, tmp_path):
    state = PatientsState(machine, STUDY)
    upload = FileUpload(state)
    many = csv(pd.concat([LATER[COLUMNS]] * 3))
    bad = [("a.xlsx", b"PK"), ("a.csv", b""), ("a.csv", b"\xff\xfe"), ("a.parquet", b"PAR1")]
    bad += [("a.csv", b"record_id\nm1"), ("a.csv", b"x" * (FILE_BYTES + 1)), ("many.csv", many)]
    bad += [("big.parquet", big_parquet(tmp_path)), ("", b""), ("../../etc/x\0.csv", b"a")]
    bad += [("a.csv", ",".join(COLUMNS).encode()), ("<b>" * 90 + ".csv", b"1")]
    results = []
    for name, content in bad:
        upload.start(name, content)
        assert state.failed and upload.batch == {} and not upload.more, name
        results.append(state.message)
    assert not any("\n" in one or "Error" in one or "file." in one for one in results), results
    assert all("more than 5000 rows: send it in parts" in results[i] for i in (6, 7))
    assert machine.status()["counts"]["rejects"] == 0


# -------------------------------------------------------------------------------------- the panel


def test_every_tab_draws_empty_and_full(machine, tmp_path):
    with Machine(STUDY, tmp_path / "other") as empty:
        for one in (empty, machine):
            panel = page.patients(one, STUDY)
            for tab in PATIENT_TABS:
                panel.state.tab = tab
                panel.state.tick()
                assert panel.state.message == "" and text(panel)
        first = page.patients(empty, STUDY)
        assert "POST /v1/records" in text(first) and "lm trigger monica" in text(first)
        arrive(empty, 0)
        first.state.tick()
        assert first.state.record_id == LATER["record_id"][0]  # The first one opens by itself
        assert "No patient yet" not in text(first)


def test_text_from_data_stays_text(machine):
    arrive(machine, 8, record_id=NASTY, nr=NASTY)
    arrive(machine, 9, nr=NASTY)
    panel = page.patients(machine, STUDY)
    state = panel.state
    for key, _ in state.listed[:2]:
        state.choose(key)
        assert NASTY not in text(panel, plain=False) and len(state.visits) == 2
    state.choose(NASTY)
    for act in (panel.form.correct, panel.form.send):
        act()
        assert NASTY not in text(panel, plain=False)


def test_a_lost_service_shows_and_heals(machine):
    class Shaky:
        lost = False

        def status(self):
            if self.lost:
                raise LMError("the service does not answer")
            return machine.status()

        def __getattr__(self, name):
            return getattr(machine, name)

    client = Shaky()
    panel = page.patients(client, STUDY)
    panel.form.put("age", "61")
    client.lost = True
    panel.state.tick()
    assert "Reconnecting" in text(panel) and panel.form.entry["age"] == "61"
    client.lost = False
    arrive(machine, 9)
    panel.state.tick()
    assert "Reconnecting" not in text(panel) and len(panel.state.news) == 1


def test_saved_state_comes_back_and_strange_state_is_refused(machine):
    state = PatientsState(machine, STUDY)
    state.query, state.tab = "m1", "Send a file"
    saved = json.loads(json.dumps(state.to_dict()))
    assert PatientsState(machine, STUDY).from_dict(saved).to_dict() == saved
    with pytest.raises(LMError, match="tab"):
        PatientsState(machine, STUDY).from_dict({"tab": "elsewhere"})


def test_the_pages_kernel_stays_light():
    code = "import sys, lm.ui.patients_page; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "sklearn",
        "mlflow",
        "shap",
        "evidently",
        "scipy",
        "duckdb",
        "lm.machine.machine",
        "lm.data.source",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

"""The clinician's page and its parts, without a browser."""

import asyncio
import json
import subprocess
import sys
import time

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
from support.desk import NASTY, Desk, buttons, html_of
from support.waiting import eventually_async

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.wording import OOD_LEVEL, percent
from lm.ui import clinician_tables as tables
from lm.ui import clinician_what_if as what_if
from lm.ui.clinician_page import clinician
from lm.ui.clinician_state import (
    CLINICIAN_TABS,
    PATIENT_FILTERS,
    ClinicianState,
    store_decision,
)
from lm.ui.formatting import format_day


class Ward(Desk):
    """The same patients, with all that a clinician asks for; counts what is asked."""

    def __init__(self, study, n=400):
        super().__init__(study, n)
        self.asked = []

    def status(self):
        result = super().status()
        result["counts"] |= {
            "verdicts": len(self.verdicts),
            "outcomes": len(self.stored_outcomes()),
        }
        return result | {"since": "1987-01-01"}

    def stored_outcomes(self):
        rows = self.rows[self.rows.y.notna() & self.rows.record_id.isin(self.outcomes_)]
        return rows[["record_id", "y"]]

    def known(self, as_of=None):
        self.asked.append("known")
        known = super().known()
        early = known.y.where(known.record_id.isin(self.outcomes_))
        return known.assign(y_early=early, known_at=known.arrived)

    def table(self, name, as_of=None, last=None, record_id=None):
        self.asked.append(name)
        if name in ("records", "predictions"):
            rows = super().known()
        else:
            rows = self.stored_outcomes() if name == "outcomes" else super().table(name)
        rows = rows.assign(seq=range(1, len(rows) + 1))
        return rows if last is None else rows[-last:]

    def visits(self, record_id):
        return self.rows[self.rows.record_id == record_id]

    def explain(self, record_id):
        self.asked.append("explain")
        return super().explain(record_id) | {"unlike": 0.5, "lost": False, "average_risk": 0.15}

    def score(self, rows, version=None, explain=False):
        self._check()
        self.asked.append("score")
        risk = 1 / (1 + np.exp(-self.log_odds(pd.DataFrame(rows))))
        return pd.DataFrame(
            {"version": 1, "risk": risk, "low": risk / 2, "high": risk, "unlike": 1}
        )

    def similar(self, record_id, k=20):
        self._check()
        row = self.rows.iloc[0].to_dict() | {"gower_distance": 0.1}
        results = {"patients": 1, "events": int(row["y"]), "sentence": "Of all 1."}
        return results | {"nearest": [row | {"arrived": str(row["arrived"])}]}

    def explain_change(self, record_id, since=None, version=None):
        self._check()
        text = f"since {since}, version {version} {NASTY}"
        return {"sentence": text, "risk_before": None}

    def facts(self, version):
        raise LMError(f"model version {version} is unknown")


@pytest.fixture(scope="module")
def study():
    return load_study("monica")


@pytest.fixture
def desk(study):
    return Ward(study)


def find(panel, kind, text=""):
    """The widgets of a kind whose description holds some words."""
    results, todo = [], [panel]
    while todo:
        widget = todo.pop()
        todo += getattr(widget, "children", ())
        if isinstance(widget, kind) and text in getattr(widget, "description", ""):
            results.append(widget)
    return results


# ------------------------------------------------------------------------------ find, open, decide


def test_newest_patient_first_and_open(desk):
    state = ClinicianState(desk)
    assert state.record_id == desk.rows.record_id.iloc[-1] == state.choices[0][1]
    assert state.match_count == 400 and len(state.choices) == 200


def test_search_finds_by_name_and_date_and_keeps_the_open_patient(desk):
    state = ClinicianState(desk)
    opened = state.record_id
    target = desk.rows.record_id.iloc[7]
    state.query = target.upper()
    assert [name for _, name in state.choices] == [target] and state.record_id == opened
    state.query = format_day(desk.rows.arrived.iloc[7])
    assert target in [name for _, name in state.choices]
    state.query = "[("
    assert state.choices == [] and not state.failed


def test_list_of_the_panel_does_not_choose_by_itself(desk):
    panel = clinician(desk)
    opened = panel.state.record_id
    panel.state.query = desk.rows.record_id.iloc[3]
    assert panel.state.record_id == opened
    panel.state.query = ""
    assert panel.state.record_id == opened


def test_decision_is_stored_and_read_back(desk):
    state = ClinicianState(desk)
    store_decision(state)
    assert state.failed and "name" in state.message and not desk.decisions
    state.clinician = " Dr Curie "
    store_decision(state)
    assert state.failed and "no decision is chosen" in state.message and not desk.decisions
    state.action = "override"
    store_decision(state)
    assert state.failed and "reason" in state.message and not desk.decisions
    state.reason = "goes home today"
    store_decision(state)
    assert desk.decisions[0][:4] == (state.record_id, "Dr Curie", "override", "goes home today")
    assert not state.failed and "goes home today" in state.message
    assert (state.action, state.reason) == (None, "")
    state.show = "no decision yet"
    assert state.match_count == 399


def test_what_was_meant_for_one_patient_is_not_carried_to_the_next(desk):
    panel = clinician(desk)
    panel.state.action, panel.state.reason = "override", "goes home today"
    panel.state.choose(desk.rows.record_id.iloc[2])
    assert (panel.state.action, panel.state.reason) == (None, "")
    assert panel.state.patient["record_id"] == desk.rows.record_id.iloc[2]


def test_lost_service_is_a_sentence_and_heals(desk):
    state = ClinicianState(desk)
    state.clinician, state.action, desk.lost = "Dr Curie", "agree", True
    store_decision(state)
    assert state.failed and "does not answer" in state.message and not state.busy
    desk.lost = False
    store_decision(state)
    assert not state.failed


def test_bug_is_a_sentence_too(desk):
    state = ClinicianState(desk)
    state.clinician, state.action, desk.add_decision = "Dr Curie", "agree", lambda *_: 1 / 0
    store_decision(state)
    assert state.failed and "ZeroDivisionError" in state.message


def test_before_the_first_patient_the_page_teaches(desk):
    desk.rows = desk.rows[:0]
    panel = clinician(desk)
    assert "No patient yet" in html_of(panel)


def test_patient_without_a_prediction_is_shown(desk):
    asked = desk.explain
    blank = dict.fromkeys(("version", "risk", "low", "high", "log_odds", "base"))
    desk.explain = lambda r: asked(r) | blank | {"contributions": {}, "sentence": "No model yet."}
    assert "No model yet." in html_of(clinician(desk))


def test_text_from_data_stays_text(desk):
    desk.rows.loc[399, "record_id"] = NASTY
    desk.rows["sex"] = desk.rows["sex"].astype("object")
    desk.rows.loc[399, "sex"] = NASTY
    panel = clinician(desk)
    panel.state.clinician, panel.state.action = NASTY, "unsure"
    store_decision(panel.state)
    assert NASTY in panel.state.message
    shown = html_of(panel)
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    figure, _ = tables.waterfall_with_table(desk.study_, panel.state.patient)
    labels = figure.layout.yaxis.ticktext
    assert not any("<" in label for label in labels)


def test_filters_show_whom_they_say(desk, study):
    state = ClinicianState(desk)
    desk.add_decision(desk.rows.record_id.iloc[5], "Dr Curie", "unsure")
    state.tick()
    state.show = PATIENT_FILTERS[1]
    assert state.match_count == 399
    state.show = PATIENT_FILTERS[2]
    assert state.match_count == desk.stored_outcomes().shape[0]
    state.query = desk.rows.record_id.iloc[5]
    assert state.choices[0][0].endswith(" · unsure")


def test_state_survives_json(desk):
    state = ClinicianState(desk)
    state.query, state.action, state.reason, state.tab = "m1", "unsure", "é", "What if"
    again = ClinicianState(desk).from_dict(json.loads(json.dumps(state.to_dict())))
    assert again.to_dict() == state.to_dict()
    for bad in ({"colour": 1}, {"message": "x"}):
        with pytest.raises(LMError, match="no such choice"):
            again.from_dict(bad)
    with pytest.raises(LMError, match="is not allowed"):
        again.from_dict({"tab": "Nowhere"})


@pytest.mark.parametrize(
    "person, name",
    [
        ({"name": "Dr House", "role": "clinician"}, "Dr House"),
        ({"name": "local", "role": "admin"}, "Dr Curie"),
        ({"name": "Root", "role": "admin"}, "Root"),
        ({}, "Dr Curie"),
        ({"name": "Ada", "role": "data scientist"}, None),
    ],
)
def test_a_clinician_signs_with_the_name_of_their_token(desk, person, name):
    panel = clinician(desk)
    state = panel.state
    state.person = person
    state.clinician, state.action = "Dr Curie", "agree"
    asked = find(panel, widgets.Text, "Name")[0]
    assert (asked.layout.display != "none") is (name == "Dr Curie")
    buttons(panel)["Record decision"].click()
    assert [row[1] for row in desk.decisions] == ([name] if name else [])
    assert state.failed is (name is None)
    if name == "Dr House":
        assert "You sign as Dr House" in html_of(panel)
    if name is None:
        assert "only a clinician decides" in html_of(panel)


# ------------------------------------------------------------------------------------------- live


def newcomer(desk, name="n1", **more):
    row = desk.rows.iloc[-1].to_dict() | {"record_id": name, "y": np.nan} | more
    desk.rows = pd.concat([desk.rows, pd.DataFrame([row])], ignore_index=True)


def test_who_comes_appears_and_nothing_that_is_read_or_typed_moves(desk):
    panel = clinician(desk)
    state = panel.state
    state.choose(desk.rows.record_id.iloc[30])
    state.query, state.reason, state.action, state.tab = (
        "m",
        "half a sen",
        "override",
        CLINICIAN_TABS[2],
    )
    before, drawn, choices = state.to_dict(), html_of(panel), state.choices
    tree = [id(widget) for widget in find(panel, widgets.Widget)]
    newcomer(desk, arrived=desk.rows.arrived.max() + pd.Timedelta(days=1))
    state.tick()
    assert [name for _, name in state.later] == ["n1"] and not state.failed
    assert (state.to_dict(), state.choices) == (before, choices)
    assert html_of(panel).replace("1 patient since; a search adds them", "X") == drawn.replace(
        "No patient arrived since the search", "X"
    )
    assert [id(widget) for widget in find(panel, widgets.Widget)] == tree
    state.query = ""
    assert state.choices[0][1] == "n1" and state.later == []


def test_a_message_stays_while_the_service_goes_on(desk):
    state = ClinicianState(desk)
    state.clinician, state.action = "Dr Curie", "agree"
    store_decision(state)
    result = state.message
    newcomer(desk)
    state.tick()
    assert state.message == result and result.startswith("Stored: Dr Curie agrees")


def test_a_busy_service_is_asked_for_what_is_new_only(desk):
    state = ClinicianState(desk)
    desk.asked.clear()
    state.tick()
    assert desk.asked == []  # No news, no question but the status
    for i in range(30):
        newcomer(desk, f"n{i}")
    state.tick()
    assert desk.asked == ["records", "predictions"] and len(state.arrivals.rows) == 430
    for i in range(200):
        newcomer(desk, f"k{i}")
    desk.table, table = lambda name, **how: table(name, **how | {"last": 20}), desk.table
    state.tick()  # Rows are amiss: the list is read as a whole
    assert "known" in desk.asked and len(state.arrivals.rows) == 630
    assert set(state.arrivals.rows.record_id) == set(desk.rows.record_id)


def test_decisions_and_outcomes_of_others_reach_the_list_and_the_patient(desk):
    state = ClinicianState(desk)
    name = state.record_id
    desk.add_decision(name, "Dr House", "override", "a hunch")
    state.tick()
    assert state.choices[0][0].endswith("override")
    assert state.patient["decisions"][0]["clinician"] == "Dr House"
    desk.outcomes_.discard(desk.rows.record_id.iloc[-1])
    again = ClinicianState(desk)
    n = again.judged()
    desk.outcomes_.add(desk.rows.record_id.iloc[-1])
    again.tick()
    assert again.judged() == n + 1


def test_a_new_version_is_announced_in_text(desk):
    panel = clinician(desk)
    assert "predicts since" not in html_of(panel)
    desk.champion = 2
    panel.state.tick()
    result = panel.state.news
    assert result.startswith(
        "Model version 2 predicts since 1 Jan 1987. Version 1 predicted before."
    )
    assert result in html_of(panel)


# -------------------------------------------------------------------------------------- the doubts


def test_the_monitors_doubts_stand_beside_the_risk(desk):
    panel = clinician(desk)
    assert "Caution" not in html_of(panel)  # It looked, and found nothing
    desk.verdicts.append((desk.rows.arrived.max(), "retrain", f"slope {NASTY}", 1))
    panel.state.tick()
    assert "recommends to retrain the model (version 1)" in html_of(panel)
    assert "Caution" in html_of(panel) and "<script>" not in html_of(panel)
    desk.verdicts.append((desk.rows.arrived.max(), "retrain", "about another", 2))
    desk.verdicts.append((desk.rows.arrived.max(), "nothing", "all is well again", 1))
    panel.state.tick()
    assert "recommends" not in html_of(panel)


def test_no_run_was_made_and_no_outcome_is_known(desk):
    desk.verdicts, desk.outcomes_ = [], set()
    result = html_of(clinician(desk))
    assert "has not run on version 1 yet" in result and "its performance is unknown" in result


def test_a_patient_out_of_distribution_is_named(desk, study):
    asked = desk.explain
    odd = f"Risk. This patient is unlike the training patients (above all: {NASTY})."
    desk.explain = lambda r: asked(r) | {"unlike": OOD_LEVEL / 2, "sentence": odd}
    assert "Caution.</b> This patient is unlike" in html_of(clinician(desk))


# ---------------------------------------------------------------------------------- the five views


def test_what_if_asks_the_version_that_answered_and_stores_nothing(desk):
    panel = clinician(desk)
    state = panel.state
    state.tab = "What if"
    assert "not the effect of a treatment" in html_of(panel)
    age = find(panel, widgets.FloatSlider, "Age")[0]
    assert (age.min, age.max, age.value) == (18, 110, state.patient["features"]["age"])
    age.value = 100.0
    expected = percent(1 / (1 + np.exp(-desk.log_odds({"age": 100.0}))))
    assert f"→ {expected}" in html_of(panel) and len(desk.rows) == 400
    find(panel, widgets.Dropdown, "Diabetes")[0].value = None
    assert state.what_if.inputs == {"age": 100.0, "diabetes": None} and "instead of no" in html_of(
        panel
    )
    buttons(panel)["Back to this patient's values"].click()
    assert state.what_if.inputs == {} and "with this patient's values" in html_of(panel)
    desk.lost = True
    age.value = 30.0
    assert "does not answer" in html_of(panel)
    desk.lost = False
    state.choose(desk.rows.record_id.iloc[0])
    assert state.what_if.inputs == {} and state.what_if.prediction == {}


def test_who_drags_does_not_flood_the_service(desk):
    state = ClinicianState(desk)

    risk = 1 / (1 + np.exp(-desk.log_odds({"age": 79.5})))

    async def drag():
        for age in range(60, 160):
            state.what_if.set_input("age", age / 2)
            await asyncio.sleep(0.005)
        await eventually_async(lambda: np.isclose(state.what_if.prediction.get("risk", 0), risk))

    began = time.monotonic()
    asyncio.run(drag())
    most = 2 + (time.monotonic() - began) / what_if.PAUSE
    assert 1 <= desk.asked.count("score") <= most and state.what_if.inputs == {"age": 79.5}


def test_a_number_that_is_missing_can_be_entered_and_taken_back(desk):
    missing = load_study("rotterdam").feature("pgr")
    state = ClinicianState(desk)
    state.patient = state.patient | {"features": state.patient["features"] | {"pgr": None}}
    box, back, _ = what_if._input_row(state.what_if, missing, {})
    slider, unknown, _ = box.children
    assert unknown.value and slider.disabled and state.what_if.inputs == {}
    unknown.value = False
    assert state.what_if.inputs == {"pgr": slider.value} and not slider.disabled
    back()
    assert state.what_if.inputs == {} and unknown.value


@pytest.mark.parametrize("tab", CLINICIAN_TABS)
def test_every_view_draws_full_empty_and_lost(desk, tab):
    panel = clinician(desk)
    panel.state.tab = tab
    assert not panel.state.failed and "<script>" not in html_of(panel)
    desk.lost = True
    panel.state.tab = CLINICIAN_TABS[0] if tab != CLINICIAN_TABS[0] else CLINICIAN_TABS[1]
    panel.state.tab = tab
    if tab in CLINICIAN_TABS[2:]:
        assert "does not answer" in html_of(panel) or "unknown" in html_of(panel)
    desk.lost, desk.rows = False, desk.rows[:0]
    assert "No patient yet" in html_of(clinician(desk))


def test_changes_are_reported_since_the_model_the_one_now_and_an_earlier_visit(desk):
    desk.champion = 2
    panel = clinician(desk)
    panel.state.tab = "What has changed"
    result = html_of(panel)
    assert "since None, version None" in result and "since None, version 2" in result
    find(panel, widgets.Text, "Record")[0].value = "m0001"
    assert "since m0001, version None" in html_of(panel)
    first, last = desk.rows.record_id.iloc[[0, -1]]
    desk.visits = lambda r: desk.rows[desk.rows.record_id.isin([first, last])]
    panel.state.tab = CLINICIAN_TABS[0]
    panel.state.tab = "What has changed"
    (choice,) = find(panel, widgets.Dropdown, "Visit")
    assert choice.value == first and f"since {first}" in html_of(panel)


# ---------------------------------------------------------------------------------- the hundred


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_are_a_hundred(seed):
    low, risk, high = np.sort(np.random.default_rng(seed).beta(0.5, 1.5, 3))
    groups = tables.groups_of_100(risk, low, high)
    assert sum(groups.values()) == 100 and min(groups.values()) >= 0
    assert groups["sure"] + groups["likely"] == int(100 * risk + 0.5)
    assert 100 - groups["none"] == int(100 * high + 0.5)


def test_the_picture_says_in_text_what_it_shows(study):
    shown = tables.hundred_html(study, 0.004, 0.0, 0.02)
    assert 'role="img"' in shown and "about fewer than 1 have" not in shown
    assert "fewer than 1" in shown and "death within 28 days" in shown


def test_the_page_needs_no_estimator():
    code = "import sys, lm.ui.clinician_page; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "sklearn",
        "mlflow",
        "shap",
        "evidently",
        "scipy.stats",
        "duckdb",
        "lm.machine.machine",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

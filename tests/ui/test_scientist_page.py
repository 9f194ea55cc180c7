"""The data scientist's page without a browser: state, actions, tables, pieces."""

import json
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from support.desk import NASTY, Desk, buttons, html_of

from lm.core.errors import LMError
from lm.core.evidence import ChartSet, ControlCharts, Evidence, performance_frame
from lm.core.settings import find_root
from lm.core.study import load_study
from lm.data.source import stream
from lm.monitor.summary import measure_drift_map, performance_history
from lm.ui import scientist_actions as actions
from lm.ui import scientist_page, scientist_panels, scientist_tables
from lm.ui.charts import model as model_charts
from lm.ui.charts import monitoring as monitoring_charts
from lm.ui.charts import performance as performance_charts
from lm.ui.scientist_page import data_scientist
from lm.ui.scientist_state import SCIENTIST_TABS, DataScientistState
from lm.ui.widgets import draw_when_shown
from lm.update.change_control import plan_text
from lm.update.rollout import Rollout
from lm.update.versions import compare_versions

STORE = {
    "rejects": ["kind", "record_id", "field", "value", "rule", "source", "received", "received_at"],
    "predictions": ["record_id", "predicted_at", "version", "why"],
    "sketches": ["seq", "version", "kind", "budget", "content"],
    "audit": ["seq", "at", "kind", "actor", "rows", "content", "hash"],
}


class Bench(Desk):
    """The desk of `test_panels` with the rest of what a service keeps and does."""

    def __init__(self, study, n=400):
        super().__init__(study, n)
        self.rows["source"], self.asked, self.proposals, self.notes = "replay", [], [], []
        self.policy, self.charts = Rollout().to_dict(), ChartSet()
        self.updates = [(*row, "{}", i) for i, row in enumerate(self.updates)]
        self.verdicts = [(*row, "{}") for row in self.verdicts]
        self.next_verdict = {"evidence": {}, "action": "nothing", "reason": "nothing has moved"}

    def table(self, name, as_of=None, last=None, record_id=None):
        if name == "updates":
            columns = ["as_of", "action", "reason", "from_version", "to_version", "evidence", "seq"]
            return pd.DataFrame(self.updates, columns=columns)
        if name == "verdicts":
            columns = ["as_of", "action", "reason", "version", "evidence"]
            frame = pd.DataFrame(self.verdicts, columns=columns)
            return frame if last is None else frame[-last:]
        if name == "settings":
            return pd.DataFrame({"seq": [1], "plan": [plan_text(self.study_)], "study": ["{}"]})
        if name == "audit":
            when = pd.Timestamp("1988-01-01")
            rows = [(3, when, "verdicts", NASTY, 1, "{}", "ab" * 32)]
            rows += [
                (4, when, "attempt", "Ada", None, json.dumps(c), "cd" * 32) for c in self.notes
            ]
            return pd.DataFrame(rows, columns=STORE[name])
        if name == "predictions":
            known = self.known()
            return known.assign(predicted_at=known["arrived"], why="champion")[STORE[name]]
        if name in STORE:
            return pd.DataFrame(columns=STORE[name])
        return super().table(name, as_of, last, record_id)

    def known(self, as_of=None):
        known = super().known()
        return known.assign(known_at=known["arrived"], matured=known["y"].notna())

    def models(self):
        more = {"family": "logistic", "snapshot": "cd" * 32, "fingerprint": "ef" * 32}
        more |= {"rows": 400, "run": "12" * 16, "commit": ""}
        frame = super().models().assign(**more)
        return frame.assign(aliases=["champion", "challenger"])

    def pending_approvals(self):
        columns = ["seq", "as_of", "action", "version", "reason"]
        return pd.DataFrame(self.proposals, columns=columns)

    def rollout(self):
        return {"policy": self.policy, "failed": 0}

    def set_rollout(self, policy, reason, by):
        self.asked.append(("rollout", reason, by))
        self.policy = Rollout.from_dict(policy).to_dict()
        return self.rollout()

    def review_rollout(self):
        return self.rollout() | {"action": "stay", "reason": "stay: few outcomes"}

    def verify(self):
        return []

    def evidence(self, number=0):
        known = self.known()
        swaps = self.table("updates").dropna(subset="to_version")
        return Evidence(
            verdict=len(self.verdicts),
            as_of=datetime(1988, 1, 1),
            version=1,
            charts=self.charts,
            performance=performance_history(self.study_, known),
            drift_map=measure_drift_map(self.study_, known, swaps),
        )

    def compare_versions(self, version, other, days=730):
        risks = {v: self.risks(v) for v in (version, other)}
        return compare_versions(self.study_, self.known(), risks, days)

    def note(self, kind, content, actor=""):
        self.notes.append(content)

    def receive(self, row, now=None, source=""):
        return super().receive(row | {"source": source}, now, source)

    def monitor(self):
        self.asked.append(("look", len(self.rows)))
        return self.next_verdict

    def cancel(self, job):
        self.jobs[job] = None

    def job(self, job):
        if job in self.jobs and self.jobs[job] is None:
            return {"job": job, "state": "cancelled"}
        answer = super().job(job)
        if job == "monitor" and answer["state"] == "done":
            self.verdicts[-1] = (*self.verdicts[-1], "{}")
        return answer | {"progress": {"cells": 8, "done": 3, "section": f"Look {NASTY}"}}

    def promote(self, version, reason, by):
        self.asked.append(("promote", version, reason, by))
        self.champion = version

    def approve(self, name, reason, number):
        self.asked.append(("approve", name, reason, number))
        self.proposals = []

    def reject(self, name, reason, number):
        self.asked.append(("reject", name, reason, number))
        self.proposals = []


@pytest.fixture(scope="module")
def study():
    return load_study("monica")


@pytest.fixture
def desk(study):
    return Bench(study)


def working(client):
    """The state of a page, with the steps that the page takes at each poll."""
    state = DataScientistState(client)
    state.steps += [lambda: actions.job_step(state), lambda: actions.flow_step(state)]
    return state


def alerts(panel):
    return [result for result in html_of(panel).split("\n") if 'role="alert"' in result]


# ------------------------------------------------------------------------------------------ state


def test_state_survives_json(desk):
    state = working(desk)
    state.n, state.tab, state.drift, state.size = 7, "Drift", "covariate", 0.5
    again = DataScientistState(desk).from_dict(json.loads(json.dumps(state.to_dict())))
    assert again.to_dict() == state.to_dict()
    for bad in ({"colour": 1}, {"message": "x"}, {"doing": "x"}):
        with pytest.raises(LMError, match="no such choice"):
            again.from_dict(bad)


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": "many"}, {"tab": "Nowhere"}, {"drift": "dust"}])
def test_state_refuses_what_cannot_be(desk, bad):
    with pytest.raises(LMError, match="is not allowed"):
        DataScientistState(desk).from_dict(bad)


def test_page_is_there_without_the_heavy_libraries():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import lm.ui.scientist_page\n"
        "heavy = ['sklearn', 'scipy', 'mlflow', 'shap', 'duckdb', 'lm.machine.machine']\n"
        "print([m for m in heavy if m in sys.modules])\n"
        "import json, pandas as pd\n"
        "from types import SimpleNamespace as S\n"
        "empty = pd.DataFrame(columns=['to_version', 'action', 'from_version', 'as_of', 'reason',"
        " 'version', 'evidence', 'seq', 'plan'])\n"
        "desk = S(status=lambda: {'study': 'monica', 'champion': None, 'counts': {}},"
        " table=lambda *a, **k: empty, pending_approvals=lambda: empty)\n"
        "link = lm.ui.widgets.draw_when_shown.hold()\n"  # As under Voila, while loading
        "panel = lm.ui.scientist_page.data_scientist(desk)\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    run = {"capture_output": True, "text": True, "check": True, "cwd": find_root()}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


# ---------------------------------------------------------------------------------------- sending


@pytest.mark.slow
def test_send_brings_the_next_patients_in_order(desk, study, monkeypatch):
    monkeypatch.setattr(actions, "STEP_SECONDS", 60.0)
    state = working(desk)
    had = set(desk.rows.record_id)
    coming = [e.row["record_id"] for e in stream(study) if e.kind == "record"]
    expected = [name for name in coming if name not in had][:3]
    actions.send_patients(state, 3)
    assert list(desk.rows.record_id[400:]) == expected and state.flow is None
    assert state.message.startswith("Sent 3 patients") and not state.doing
    assert state.status["counts"]["records"] == 403


def test_many_patients_come_over_several_steps(desk, monkeypatch):
    monkeypatch.setattr(actions, "STEP_SECONDS", 0.0)
    state = working(desk)
    actions.send_patients(state, 4)
    assert len(desk.rows) == 400 and state.flow is not None  # Nothing waited for
    monkeypatch.setattr(actions, "STEP_SECONDS", 60.0)
    state.tick()
    assert len(desk.rows) == 404 and state.flow is None


def test_pace_pause_and_stop(desk, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(actions, "time", SimpleNamespace(monotonic=lambda: now[0]))
    state = working(desk)
    state.stream, state.speed = "synthetic patients", "5 a second"
    actions.send_patients(state)
    counts = [len(desk.rows)]
    for _ in range(3):
        now[0] += 1.0
        state.work()
        counts.append(len(desk.rows))
    assert np.diff(counts).tolist() == [5, 5, 5]
    actions.pause_flow(state)
    now[0] += 10
    state.work()
    assert len(desk.rows) == counts[-1] and "paused" in state.doing
    actions.pause_flow(state)
    state.work()
    assert len(desk.rows) == counts[-1] + 5  # The rest is not made up for
    actions.send_patients(state, 1)
    assert state.failed and "patients are being sent" in state.message
    actions.stop_flow(state)
    assert state.flow is None and state.message.startswith("Sent 25 patients")
    actions.stop_flow(state)
    assert state.failed and "no patients are being sent" in state.message


def test_synthetic_patients_say_so_and_another_page_brings_their_outcomes(desk, study):
    state = working(desk)
    actions.choose_drift(state, "covariate")
    state.size = 1.5
    actions.send_patients(state, 120)
    while state.flow is not None:
        state.work()
    new = desk.rows[400:]
    (one,) = actions.noted_streams(desk.table("audit")).values()
    assert set(new["source"]) == {one.source} and one.size == 1.5
    assert new["arrived"].min() > desk.rows["arrived"][:400].max()
    assert new["age"].mean() > desk.rows["age"][:400].mean() + 4
    later = DataScientistState(desk)
    later.stream = "synthetic patients"
    due = {e.row["record_id"] for e in actions.upcoming_events(later)[0] if e.kind == "outcome"}
    waiting = set(new["record_id"]) - desk.outcomes_
    assert waiting <= due


def test_study_s_own_patients_do_not_come_before_synthetic_ones(desk):
    state = working(desk)
    state.stream = "synthetic patients"
    actions.send_patients(state, 1)
    state.stream = "the study's own patients"
    actions.send_patients(state, 1)
    assert state.failed and "choose synthetic patients" in state.message


def test_injected_drift_begins_with_the_next_patient(desk):
    state = working(desk)
    state.stream = "synthetic patients"
    actions.send_patients(state)
    before = len(desk.rows)
    actions.choose_drift(state, "missing")
    state.target = "smstat"
    state.size = 1.0
    actions.inject_drift(state)
    assert state.message == "From the next patient on: missing values (smstat)."
    state.work()
    assert len(desk.rows) > before and desk.rows["smstat"][before:].isna().all()
    actions.choose_drift(state, "unit")
    state.size = -1.0
    actions.inject_drift(state)
    assert state.failed and "size above 0" in state.message


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in actions.DRIFT_LABELS if kind != "none"])
def test_every_kind_of_drift_can_be_chosen(desk, kind):
    state = working(desk)
    actions.choose_drift(state, kind)
    events, source = actions.upcoming_events(state)
    assert desk.notes[0]["kind"] == kind and source == f"imitated {desk.notes[0]['name']}"
    assert next(iter(events)).when is not None


def test_watching_stops_where_the_monitor_finds_something_new(desk):
    state = working(desk)
    state.stream, state.interval, state.speed = "synthetic patients", 10, "as fast as possible"
    desk.next_verdict = {
        "evidence": {"drift": [{"feature": "age", "moved": False}]},
        "reason": "quiet",
    }
    actions.send_patients(state)
    state.flow.sent = 10
    state.work()
    assert desk.asked[-1][0] == "look" and not state.paused
    desk.next_verdict = {
        "evidence": {"drift": [{"feature": "age", "moved": True}]},
        "reason": "age moved",
    }
    state.flow.sent = state.flow.monitored + 10
    state.work()
    assert (
        state.paused
        and "Found after 20 patients: age has shifted. Verdict: age moved." in state.message
    )
    state.flow.sent = state.flow.monitored + 10
    actions.pause_flow(state)
    state.work()
    assert not state.paused  # Known by now


# ------------------------------------------------------------------------------------------- jobs


def test_job_shows_its_progress_and_never_waits(desk):
    panel = data_scientist(desk)
    state = panel.state
    actions.start_notebook(state, "monitor")
    assert state.job is not None and state.progress == 3 / 8 and "3 of 8 cells" in state.doing
    assert "<script>" not in html_of(panel)
    actions.start_notebook(state, "retrain")
    assert state.failed and "is running" in state.message
    state.tick()
    assert state.job is None and state.message == "Monitored: recalibrate. O:E 0.71."


def test_failed_job_shows_its_last_line(desk):
    state = working(desk)
    actions.start_notebook(state, "retrain")
    state.tick()
    assert state.failed and state.message.endswith("LMError: no verdict to act on")


def test_job_can_be_cancelled(desk):
    state = working(desk)
    actions.cancel_notebook(state)
    assert state.failed and "no notebook is running" in state.message
    actions.start_notebook(state, "monitor")
    actions.cancel_notebook(state)
    assert state.job is None and "was cancelled" in state.message and not state.failed


def test_without_a_service_the_monitor_button_says_so(desk):
    bare = SimpleNamespace(status=desk.status, table=desk.table, known=desk.known)
    state = working(bare)
    actions.start_notebook(state, "monitor")
    assert state.failed and "lm serve monica" in state.message


@pytest.mark.parametrize(
    "action, version, result",
    [
        ("keep", None, "No update: version 1 stays. no challenger is better."),
        ("refit", 2, "Version 2 is in service now (refitted). no challenger is better."),
        ("wait", None, "The update needs approval: no challenger is better. Approve or reject"),
    ],
)
def test_update_is_reported_as_a_sentence(desk, action, version, result):
    row = pd.Series({"action": action, "to_version": version, "reason": "no challenger is better"})
    assert actions.result_text(DataScientistState(desk), row, "updates").startswith(result)


# -------------------------------------------------------------------------------------- decisions


def test_roll_back_needs_a_reason(desk):
    state = working(desk)
    actions.roll_back(state)
    assert "needs a reason" in state.message
    state.reason = "calibration"
    actions.roll_back(state)
    assert state.failed and "no earlier version" in state.message


@pytest.mark.parametrize(
    ("policy", "wanted", "result"),
    [
        ("the champion alone", {"kind": "champion", "share": 0}, "All patients get the champion."),
        ("a shadow", {"kind": "shadow", "challenger": 2}, "predicts beside it, unseen"),
        ("a canary", {"kind": "canary", "share": 0.05}, "5 % of the patients get version 2"),
        ("an A/B test", {"kind": "ab", "share": 0.3, "planned": 400}, "30 % of the patients"),
        ("a bandit", {"kind": "bandit", "challenger": 2}, "the better model gets more"),
    ],
)
def test_every_policy_can_be_set_and_says_what_it_will_do(desk, policy, wanted, result):
    state = working(desk)
    state.other, state.policy, state.share, state.planned = 2, policy, 30, 400
    assert result.split(" get ")[-1] in actions.rollout_preview(state)
    actions.set_rollout(state)
    assert "needs a reason" in state.message and not desk.asked
    state.reason = "a trial"
    actions.set_rollout(state)
    assert desk.asked[-1][:2] == ("rollout", "a trial") and state.reason == ""
    assert wanted.items() <= desk.policy.items()
    assert state.message.startswith("From the next patient on: ") and result in state.message


def test_trial_needs_another_version(desk, monkeypatch):
    state = working(desk)
    monkeypatch.setattr(DataScientistState, "compared", None)
    state.policy, state.reason = "a canary", "a trial"
    assert "Not possible: there is no second version" in actions.rollout_preview(state)
    actions.set_rollout(state)
    assert state.failed and "there is no second version" in state.message and not desk.asked


def test_review_says_what_the_outcomes_say(desk):
    state = working(desk)
    actions.review_rollout(state)
    assert state.message == "Review of the rollout: stay: few outcomes."


def test_the_signed_in_person_signs(desk):
    panel = data_scientist(desk)
    state = panel.state
    state.person = {"name": "Ada", "role": "data scientist"}
    state.signer, state.reason, state.other = "quality manager", "better", 2
    actions.promote_version(state, state.compared)
    assert desk.asked[-1] == ("promote", 2, "better", "Ada") and state.reason == ""
    state.person = {"name": "local", "role": "admin"}
    state.signer, state.reason = "quality manager", "worse"
    actions.promote_version(state, 1)
    assert desk.asked[-1][-1] == "quality manager"


@pytest.mark.parametrize("button, action", [("Approve", "approve"), ("Reject", "reject")])
def test_what_waits_is_approved_or_rejected_with_a_reason(desk, button, action):
    desk.proposals = [(7, pd.Timestamp("1988-01-01"), "refit", 2, f"waits {NASTY}")]
    panel = data_scientist(desk)
    panel.state.tab = "Control"
    assert NASTY not in html_of(panel) and "waits &lt;script&gt;" in html_of(panel)
    buttons(panel)[button].click()
    assert "needs a reason" in panel.state.message
    panel.state.reason, panel.state.signer = "tried", "quality manager"
    buttons(panel)[button].click()
    assert desk.asked[-1] == (action, "quality manager", "tried", 7)
    assert buttons(panel)[button].layout.display == "none"


def test_audit_log_is_verified_in_text(desk):
    state = working(desk)
    actions.verify_audit_log(state)
    assert state.checked.startswith("Intact: every stored row") and not state.failed
    desk.verify = lambda: ["row 3 of outcomes was changed"]
    actions.verify_audit_log(state)
    assert state.failed and state.checked == "1 fault: row 3 of outcomes was changed"


# ----------------------------------------------------------------------------------------- tables


def test_performance_is_that_of_the_served_patients(desk):
    state = working(desk)
    _, chart = scientist_panels.performance_parts(state)
    known = desk.known().dropna(subset="y")
    oe = known.y.sum() / known.risk.sum()
    stored = performance_frame(desk.evidence().performance.served)
    assert set(chart.table["Model"]) == {"model in service"}  # Version 1 served all along
    assert np.isclose((stored.oe * stored.patients).sum() / stored.patients.sum(), oe, atol=0.05)
    shown = [float(text.split()[0]) for text in chart.table["O:E ratio"]]
    assert np.allclose(shown, stored.oe, atol=0.0005)
    desk.updates.append((pd.Timestamp("1988-01-01"), "promote", "p", 1, 2, "{}", 1))
    desk.champion = 2
    state.refresh()
    _, chart, _ = scientist_panels.comparison_parts(state)
    assert chart.table["model"].tolist() == ["version 1", "version 2, champion"]


def test_no_model_is_judged_on_patients_on_whom_it_was_fitted(desk):
    desk.updates.append((pd.Timestamp("1988-01-01"), "promote", "p", 1, 2, "{}", 1))
    desk.champion, risks = 2, desk.risks
    state = working(desk)
    state.years = "all years"
    judged = state.read.comparison(2, 1, 100_000).judged
    until = desk.rows["arrived"].quantile(0.5)
    fitted = desk.rows["arrived"] <= until
    desk.risks = lambda version: risks(version).assign(trained_on=fitted & (version == 2))
    state.refresh()
    result = state.read.comparison(2, 1, 100_000)
    assert result.left_out > 0 and result.judged == judged - result.left_out
    text, measures, _ = scientist_panels.comparison_parts(state)
    value, low, high = result.measures[2]["brier"]
    table = measures.table.set_index("model")["brier"]
    assert table["version 2, champion"] == f"{value:.3f} ({low:.3f} to {high:.3f})"
    assert f"{result.judged:,} patients" in text and f"{result.left_out:,} patients of a tr" in text
    desk.risks = lambda version: risks(version).assign(trained_on=True)
    state.refresh()
    (text,) = scientist_panels.comparison_parts(state)
    assert "there is no comparison yet" in text


def test_estimates_stand_beside_what_came_true(desk):
    results = {"first": "1987-02-01T00:00:00", "last": "1987-03-01T00:00:00", "patients": 60}
    results |= {"oe": [0.9, 0.7, 1.1]}
    desk.verdicts.append(
        (desk.rows.arrived.max(), "nothing", "r", 1, json.dumps({"estimate": results}))
    )
    _, chart = scientist_panels.performance_parts(DataScientistState(desk))
    traces = chart.figure.data
    rings = [trace for trace in traces if str(trace.marker.symbol) == "diamond-open"]
    assert [list(ring.y) for ring in rings] == [[0.9], [], []]
    estimated = chart.table["Model"] == "estimated"
    assert chart.table.loc[estimated, "Brier score"].tolist() == ["–"]


@pytest.mark.slow
def test_map_of_drift_opens_to_two_distributions(desk):
    late = desk.rows.arrived > "1987-08-01"
    desk.rows.loc[late, "age"] = desk.rows.loc[late, "age"] + 20
    desk.updates.append((pd.Timestamp("1987-08-01"), "promote", "p", 1, 2, "{}", 1))
    panel = data_scientist(desk)
    state = panel.state
    grid = desk.evidence().drift_map.frame("halves")
    assert grid.loc[grid["moved"], "feature"].unique().tolist() == ["age"] == [grid["feature"][0]]
    state.tab = "Drift"
    assert not alerts(panel)
    assert "under version 2 (from 1 Aug 1987 on)" in html_of(panel)
    figure = panel.drawer.tabs["Drift"][0].inner.children[2].children[0]
    prepare = scientist_panels.cell_opener(state)
    seen = {}
    prepare(SimpleNamespace(data=[SimpleNamespace(on_click=lambda f: seen.update(f=f))]))
    points = SimpleNamespace(xs=["1987 H2"], point_inds=[[3, 0]])
    seen["f"](figure.data[0], points, None)
    assert (state.feature, state.period) == (grid["feature"].unique()[3], "1987 H2")
    boxes = [
        box for box in _dropdowns(panel) if box.description in ("Feature shown", "Period shown")
    ]
    assert {state.feature, state.period} <= {box.value for box in boxes}
    assert all("<" not in name for name in figure.data[0].y)


def _dropdowns(panel):
    results, todo = [], [panel]
    while todo:
        widget = todo.pop()
        todo += getattr(widget, "children", ())
        results += [widget] if hasattr(widget, "options") and hasattr(widget, "description") else []
    return results


def test_drift_of_a_new_champion_is_asked_of_the_one_before(desk):
    desk.updates.append((pd.Timestamp("1987-08-01"), "promote", "p", 1, 2, "{}", 1))
    desk.updates.append((desk.rows.arrived.max(), "promote", "p", 2, 3, "{}", 2))
    desk.champion = 3
    parts = scientist_panels.drift_map_parts(DataScientistState(desk), lambda grid: None)
    assert "under version 2" in parts[1]


def test_control_charts_are_the_stored_ones(desk):
    days = tuple(pd.date_range("1988-01-01", periods=3).to_pydatetime())
    paths, limits = {"up": (0.0, 2.5, 5.0), "down": (0.0, 0.0, 0.0)}, {"up": 4.0, "down": 4.5}
    desk.charts = ChartSet(outcomes=ControlCharts(days, paths, limits))
    _, chart = scientist_panels.outcome_parts(DataScientistState(desk))
    lines = [trace for trace in chart.figure.data if trace.mode == "lines"]
    assert [tuple(line.y) for line in lines] == list(paths.values())
    table = chart.table.set_index("Chart")
    assert table["Limit"].tolist() == ["4.00", "4.50"] and table["State"].iloc[0] == "alarm"


def test_flips_are_counted_at_every_threshold(desk, study):
    state = working(desk)
    state.other = 2
    comparison = state.read.comparison(1, 2, 730)
    pairs = scientist_tables.pairs_frame(comparison)
    table = scientist_tables.flip_counts(comparison)
    assert len(pairs) == comparison.patients
    for cut, up in zip(study.thresholds, table["Only the other acts"], strict=True):
        expected = ((pairs["other"] >= cut) & (pairs["champion"] < cut)).sum()
        assert up == f"▲ {expected}"
    assert (pairs["way"] >= 0).all() and (pairs["way"] == 1).any()


def test_lineage_leads_back_to_the_rows(desk):
    state = working(desk)
    result = scientist_tables.lineage(state, 1)
    assert result["Run"] == "12" * 16 and result["Rows"] == "400 patients"
    assert result["Snapshot (SHA-256)"] == "cd" * 32 and scientist_tables.lineage(state, 99) == {}
    assert len(scientist_tables.lineage_rows(state, 1)) == 400


def test_events_show_swaps_refusals_alarms_and_quiet_runs(desk):
    days = pd.to_datetime(["1988-01-01", "1989-01-01"])
    desk.updates += [(days[0], "keep", "no better", 1, None, "{}", 1)]
    desk.updates += [(days[1], "refit", NASTY, 1, 2, "{}", 2)]
    desk.verdicts += [(day, "retrain", "slope", 1, "{}") for day in days]
    state = working(desk)
    events = scientist_tables.all_events(state)
    served = performance_frame(desk.evidence().performance.served)
    marks = performance_charts.performance_chart(served, None, events).data[-1]
    symbols = ["circle-open", "diamond", "diamond", "triangle-up", "triangle-up", "x"]
    assert sorted(marks.marker.symbol) == symbols
    assert not any("<script>" in result for result in marks.text)
    assert performance_charts.serving_periods(events)["version"].tolist() == [1, 2]
    shown = scientist_panels.events_html(events)
    assert "✕ update rejected" in shown and "◆ monitored: retrain" in shown
    assert "lm-dim" in shown and "<script>" not in shown


# ------------------------------------------------------------------------------------------ page


@pytest.mark.parametrize("tab", SCIENTIST_TABS)
def test_every_tab_draws_full_and_empty(desk, tab):
    panel = data_scientist(desk)
    panel.state.tab = tab
    panel.state.tick()
    assert not alerts(panel) and "<script>" not in html_of(panel)
    desk.rows, desk.updates, desk.verdicts = desk.rows[:0], [], []
    panel.state.refresh()
    assert not alerts(panel) and "could not be drawn" not in html_of(panel)


def test_first_tab_is_drawn_once_the_browser_has_the_page(desk):
    draw_when_shown.hold()
    panel = data_scientist(desk)
    panel.state.tick()
    assert "Loading" in html_of(panel)
    draw_when_shown.release()
    assert "Loading" not in html_of(panel) and "first model" in html_of(panel)


def test_news_replaces_only_what_differs_and_leaves_what_is_typed(desk):
    panel = data_scientist(desk)
    state = panel.state
    state.tick()
    state.reason = "half a sen"
    events, before = (piece.inner.children for piece in panel.drawer.tabs["Overview"])
    state.refresh()
    assert [piece.inner.children for piece in panel.drawer.tabs["Overview"]] == [
        events,
        before,
    ]
    desk.verdicts.append((desk.rows.arrived.max(), "recalibrate", "O:E 0.7", 1, "{}"))
    state.refresh()
    assert "◆ monitored: recalibrate" in html_of(panel) and state.reason == "half a sen"


def test_while_patients_stream_a_tab_is_drawn_now_and_then(desk, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(scientist_page, "time", SimpleNamespace(monotonic=lambda: now[0]))
    panel = data_scientist(desk)
    state, drawn = panel.state, []
    state.tick()
    drawer = panel.drawer
    drawer.tabs["Overview"][0].show = lambda: drawn.append(now[0])
    state.flow, state.paused = SimpleNamespace(since=0.0), True
    for _ in range(5):
        now[0] += 1.0
        state.refresh()
        state.work()
    assert 1 <= len(drawn) <= 3
    desk.champion = 2
    state.refresh()
    assert drawn[-1] == now[0]  # A swap is shown at once


def test_lost_service_is_a_sentence_and_heals(desk):
    panel = data_scientist(desk)
    state = panel.state
    state.tick()
    desk.lost = True
    state.tick()
    assert "Reconnecting" in html_of(panel)
    state.tab = "Performance"
    actions.send_patients(state, 1)
    assert state.failed and "does not answer" in state.message
    desk.lost = False
    state.tick()
    assert "Reconnecting" not in html_of(panel)


@pytest.mark.slow
def test_buttons_are_grey_where_they_would_do_nothing(desk):
    panel = data_scientist(desk)
    result, state = buttons(panel), panel.state
    off = {name for name, button in result.items() if button.disabled}
    assert {"Pause", "Stop", "Cancel"} <= off and not {"Start", "Run monitor"} & off
    state.stream = "synthetic patients"
    result["Start"].click()
    assert result["Start"].disabled and not result["Stop"].disabled
    result["Stop"].click()
    result["Run monitor"].click()
    assert result["Retrain"].disabled and not result["Cancel"].disabled
    result["Cancel"].click()
    result["Send one"].click()
    assert "Sent 1 patient;" in html_of(panel)


def test_choices_of_the_drift_follow_the_study(desk, study):
    panel = data_scientist(desk)
    boxes = {box.description: box for box in _dropdowns(panel)}
    boxes["What changes"].value = "level"
    assert [value for _, value in boxes["Feature"].options] == study.levels
    assert panel.state.target == study.levels[0] and panel.state.stream == "synthetic patients"
    boxes["What changes"].value = "label"
    assert panel.state.target == "" and panel.state.size == 2.2


def test_curves_escape_what_comes_from_data():
    curve = pd.DataFrame({"risk": [0.1], "observed": [0.1], "low": [0.0], "high": [0.2]})
    curve = curve.assign(patients=10, events=1)
    assert "<script>" not in model_charts.calibration_chart({NASTY: curve}).to_json()
    table = pd.DataFrame({"bin": [NASTY, "a"], "reference": [1.0, 0.0], "current": [0.0, 1.0]})
    figure = monitoring_charts.distribution_chart(table, NASTY, (NASTY, "now"))
    assert "<script>" not in figure.to_json()

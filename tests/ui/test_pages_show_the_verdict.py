"""Pages show what the monitor stored: page, verdict and API agree number by number."""

from contextlib import contextmanager

import packages
import pytest
from support.monica import FIRST, NEXT, ROWS, STUDY, Machine, learn

from lm.core.evidence import performance_frame
from lm.serve.app import background
from lm.serve.client import Client
from lm.ui import scientist_panels as panels
from lm.ui.scientist_state import DataScientistState

ALLOWED = {  # What pages may import outside core and ui
    "lm.serve.client",
    "lm.serve.routes",  # Which role may use which route
    "lm.data.source",
    "lm.data.synthetic",
    "lm.data.trigger",
    "lm.data.study_history",
}


def test_pages_import_no_module_that_computes():
    results = {
        (one, other)
        for one, other in packages.arrows()
        if one.startswith("lm.ui.") and not other.startswith(("lm.ui.", "lm.core."))
    }
    assert {other for _, other in results} <= ALLOWED, results


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A first model that has met 700 patients, and one complete monitoring run."""
    with Machine(STUDY, tmp_path_factory.mktemp("home")) as machine:
        learn(machine)
        machine.receive_many(NEXT[:700], on_arrival=True)
        end, known = NEXT["arrived"].iloc[699], ROWS["known_at"]
        sent = ROWS["record_id"].isin(NEXT["record_id"][:700])
        machine.add_outcomes(ROWS[(known > FIRST) & (known <= end) & sent])
        machine.monitor()
        yield machine


@pytest.fixture(params=["machine", "client"])
def state(machine, monkeypatch, request):
    """The page's state on the machine in process, and on a client of its service."""
    monkeypatch.setenv("LM_HOME", str(machine.store.folder.parent))

    @contextmanager
    def client():
        if request.param == "machine":
            yield machine
        else:
            with background(machine) as url, Client(url) as client:
                yield client

    with client() as result:
        yield DataScientistState(result, STUDY)


def charts(parts):
    return [part for part in parts if isinstance(part, panels.ChartPart)]


@pytest.mark.slow
def test_control_charts_and_limits_are_those_of_the_verdict(machine, state):
    evidence = machine.evidence()
    shown = [*charts(panels.outcome_parts(state)), *charts(panels.record_parts(state))]
    stored = [evidence.charts.outcomes, evidence.charts.follow_up, evidence.charts.records]
    stored = [one for one in stored if chart_lines(one)]
    assert len(shown) == len(stored) > 1
    for part, one in zip(shown, stored, strict=True):
        lines = [trace for trace in part.figure.data if trace.mode == "lines"]
        assert [tuple(line.y) for line in lines] == list(chart_lines(one).values())
        limits = [shape.y0 for shape in part.figure.layout.shapes]
        assert limits == [one.limits[name] for name in chart_lines(one)]


def chart_lines(one):
    """Stored paths without their empty places."""
    frame = one.frame()
    results = {name: tuple(frame[name].dropna()) for name in frame.columns}
    return {name: path for name, path in results.items() if path}


def test_performance_is_that_of_the_verdict(machine, state):
    history = machine.evidence().performance
    (part,) = charts(panels.performance_parts(state))
    served = performance_frame(history.served)
    mine = part.table[part.table["Model"] == "model in service"]
    assert mine["Period"].tolist() == served["period"].tolist()
    assert mine["Patients"].tolist() == served["patients"].tolist()
    measured = zip(served["brier"], served["brier_low"], served["brier_high"], strict=True)
    text = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in measured]
    assert mine["Brier score"].tolist() == text
    for years, name in (("the last two years", "recent"), ("all years", "all")):
        state.years, window = years, history.windows[name]
        (calibration,) = charts(panels.calibration_parts(state))
        assert list(calibration.figure.data[0].x) == [100 * p.risk for p in window.calibration]
        assert list(calibration.figure.data[0].y) == [100 * p.share for p in window.calibration]
        (benefit,) = charts(panels.net_benefit_parts(state))
        assert list(benefit.figure.data[3].y) == [100 * p.model for p in window.benefit]
        (groups,) = charts(panels.subgroup_parts(state))
        assert len(groups.table) == len(window.subgroups)


def test_the_drift_map_is_that_of_the_verdict(machine, state):
    drift = machine.evidence().drift_map
    for every in ("halves", "quarters", "years"):
        state.every, grid = every, drift.frame(every)
        (part,) = charts(panels.drift_map_parts(state, lambda _: None))
        (cells,) = part.figure.data
        index = grid.set_index(["feature", "period"])
        for row, text in zip(cells.customdata, cells.text, strict=True):
            for (feature, period), word in zip(row, text, strict=True):
                cell = index.loc[(feature, period)]
                expected = "" if cell["psi"] != cell["psi"] else f"{cell['psi']:.2f}"
                assert word == expected + (" ▲" if cell["moved"] and expected else "")
        state.feature, state.period = "age", grid["period"].iloc[-1]
        (part,) = charts(panels.cell_parts(state))
        stored = drift.distribution(every, "age", state.period)
        remaining = stored[(stored[["reference", "current"]] > 0).any(axis=1)]
        assert list(part.figure.data[1].y) == [100 * value for value in remaining["current"]]


def test_data_quality_and_verdict_are_those_of_the_run(machine, state):
    row = machine.table("verdicts").iloc[-1]
    (text,) = panels.verdict_parts(state)
    assert row["reason"][:40] in text
    faults = [fault for fault in machine.evidence().faults if fault.count]
    (table,) = panels.quality_parts(state)
    for fault in faults:
        assert f"{fault.count} of {fault.patients}" in table
    assert bool(faults) is ("lm-scroll" in table)

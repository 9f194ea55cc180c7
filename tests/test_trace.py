"""What one operation costs in calls, changes of module and validations: `tools/trace.py`."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "trace.py"
SPEC = spec_from_file_location("tool_trace", TOOL)  # The standard library has a `trace` too
trace = sys.modules["tool_trace"] = module_from_spec(SPEC)
SPEC.loader.exec_module(trace)

CHANGES = {
    "accepted": 76,
    "refused": 36,
    "repeated": 56,
    "outcome": 44,
    "run": 500,
    "update": 550,
}  # Changes of module at most; lower them. Aim of a monitoring run: 200
VALIDATIONS = {"accepted": 1, "refused": 1, "repeated": 1}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """One of each operation on a machine of its own."""
    return trace.operations(tmp_path_factory.mktemp("trace"))


@pytest.mark.slow
def test_an_operation_changes_module_no_oftener_than_it_did(traces):
    results = {name: t.changes for name, t in traces.items()}
    assert all(0 < results[name] <= most for name, most in CHANGES.items()), str(results)


def test_a_record_is_validated_no_oftener_than_it_was(traces):
    results = {name: traces[name].validations for name in VALIDATIONS}
    assert all(1 <= results[name] <= most for name, most in VALIDATIONS.items()), results
    assert traces["accepted"].predictions == 1


@pytest.mark.parametrize("name", ["refused", "repeated"])
def test_a_record_that_is_not_new_costs_no_more_than_one_that_is(traces, name):
    assert 0 < traces[name].calls <= traces["accepted"].calls
    assert 0 < traces[name].changes <= traces["accepted"].changes
    assert traces[name].validations == 1 and traces[name].predictions == 0


def test_calls_that_cross_modules_are_counted():
    from lm.core.study import load_study
    from lm.core.validation import check_row

    study = load_study("monica")
    result = trace.traced(lambda: check_row(study, {}))
    assert result.validations == 1 and result.calls > result.changes > 1
    assert ("", "core.validation", "check_row") in result.arrows

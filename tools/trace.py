"""Trace single operations through the packages: calls, changes of module, validations.

python tools/trace.py            print the table
python tools/trace.py run        also print which module calls which in a monitoring run

A change of module is a call of a function whose caller in the package is in another module.
"""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = str(ROOT / "lm") + os.sep
VALIDATION = "core.validation.check_row"  # What validates one record
PREDICTION = "model.fast_path.__call__"  # What predicts one record


@dataclass
class Trace:
    """What one operation called in the thread that ran it."""

    calls: int = 0  # Of functions of the package
    changes: int = 0  # Of them those from another module of the package
    validations: int = 0
    predictions: int = 0
    arrows: Counter = field(default_factory=Counter)  # (from, to, function) -> changes

    def row(self) -> tuple[int, ...]:
        """The figures of the table."""
        return self.calls, self.changes, self.validations, self.predictions


def module(frame: FrameType) -> str | None:
    """The module of a frame, such as `core.study`; None outside of the package."""
    path = frame.f_code.co_filename
    if not path.startswith(PACKAGE):
        return None
    return path[len(PACKAGE) : -len(".py")].replace(os.sep, ".")


def traced(action: Callable[[], Any]) -> Trace:
    """Count what `action` calls until it ends or raises.

    Parts of expressions and resumed generators do not count."""
    trace, stack = Trace(), []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        """A function is called or returns."""
        if event not in ("call", "return") or (place := module(frame)) is None:
            return
        if event == "return":
            if stack:
                stack.pop()
            return
        before, name = stack[-1] if stack else "", frame.f_code.co_name
        stack.append(place)
        if frame.f_lasti > 2 or name.startswith("<"):  # Resumed, or part of an expression
            return
        trace.calls += 1
        trace.validations += f"{place}.{name}" == VALIDATION
        trace.predictions += f"{place}.{name}" == PREDICTION
        if place != before:
            trace.changes += 1
            trace.arrows[before, place, name] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        with suppress(Exception):
            action()
    finally:
        sys.setprofile(before)
    return trace


def taught(machine: Any, rows: Any) -> None:
    """Give a machine its history and a first model."""
    first = machine.study.first_model
    machine.receive_many(rows[rows["arrived"] <= first], source="history", on_arrival=True)
    machine.add_outcomes(rows[rows["known_at"] <= first])
    machine.update(machine.monitor(first, fast=True))
    machine.warm()


def operations(folder: Path) -> dict[str, Trace]:
    """One of each operation, on a machine of the study `monica` below `folder`."""
    from lm.core.study import load_study
    from lm.core.study_rows import read_rows
    from lm.machine.machine import Machine

    study = load_study("monica")
    rows = read_rows(study)
    coming = rows[rows["arrived"] > study.first_model].head(300)
    patients = coming[["record_id", "arrived", *study.feature_names]].to_dict("records")
    new, bad = patients[200], {study.feature_names[0]: "no such value"}
    label, *labels = coming.head(200).dropna(subset="known_at").index
    with Machine(study, folder) as machine:
        taught(machine, rows)
        for patient in patients[:200]:
            machine.receive(patient)
        for before in (lambda: machine.receive(patients[201] | bad), lambda: machine.explain("?")):
            traced(before)  # Lazy imports and caches
        machine.add_outcomes(rows.loc[labels])
        outcome = rows.loc[label, ["record_id", "y", "known_at", "event"]].to_dict()
        traces = {
            "accepted": traced(lambda: machine.receive(new)),
            "refused": traced(lambda: machine.receive(patients[202] | bad)),
            "repeated": traced(lambda: machine.receive(new)),
            "outcome": traced(lambda: machine.add_outcome(**outcome)),
            "run": traced(machine.monitor),
        }
        verdict = machine.monitor() | {"action": "retrain"}
        return traces | {"update": traced(lambda: machine.update(verdict))}


def measured() -> dict[str, Trace]:
    """The traces, made in a state that does not stay."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"LM_HOME": folder, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
        return operations(Path(folder))


if __name__ == "__main__":
    table = measured()
    names = ("calls", "changes", "validations", "predictions")
    print("operation  ", *(f"{name:>11}" for name in names))
    for operation, trace in table.items():
        print(f"{operation:<12}", *(f"{number:>11}" for number in trace.row()))
    for wanted in sys.argv[1:]:
        print(f"\n{wanted}: changes of module")
        for (before, after, called), n in table[wanted].arrows.most_common(60):
            print(f"{n:>6}  {before or '(outside)'} -> {after}.{called}")

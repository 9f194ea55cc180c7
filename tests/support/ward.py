"""The study `ward`: three features, and patients, predictions and outcomes made by number."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

from lm.core.study import Feature, Study
from support.paths import TESTS
from support.waiting import PATIENCE

DAY = pd.Timedelta(days=1)
START = pd.Timestamp("2020-01-01")
HEAD = """
import os, sys, pandas as pd
sys.path.insert(0, {tests!r})
from pathlib import Path
from lm.core.errors import LMError
from lm.data.store import Store
from support.ward import STUDY, START, DAY, patient, answer, reasons, fill
folder = Path(sys.argv[1])
"""
STUDY = Study(
    name="ward",
    title="A ward",
    question="Will the patient die within 10 days?",
    unit_of_time="month",
    not_for=(),
    first_model=START,
    outcome="death",
    event_name="death",
    horizon_days=10,
    features=(
        Feature("age", "number", "age", "years", 0.0, 120.0),
        Feature('grade "G" select', "level", "grade", levels=("low", "high")),
        Feature("order", "number", "an SQL word", "", -1e9, 1e9),
    ),
    folder=Path("."),
    rows=Path("rows.csv"),
)


def patient(number, arrived=None, **over):
    row = {
        "record_id": f"p{number}",
        "arrived": START + number * DAY if arrived is None else arrived,
    }
    return row | {"age": 50.0 + number % 40, 'grade "G" select': "low", "order": 1.5} | over


def answer(version=1):
    return {"version": version, "risk": 0.2, "low": 0.1, "high": 0.3} | {
        "log_odds": -1.4,
        "unlike": 0.5,
    }


def reasons():
    return {"base": -2.0} | dict.fromkeys(STUDY.feature_names, 0.2)


def fill(store, n=30):
    """n patients with predictions, every third one dying on day 3, every fifth lost."""
    for i in range(n):
        row = patient(i)
        store.records.append(row, row["arrived"], "test", answer(), reasons())
        store.audit.head()  # Who asks moves the journal into the tables: one entry for each patient
    for i in range(n):
        arrived = START + i * DAY
        if i % 5 == 4:
            continue
        died = i % 3 == 0
        when = arrived + (3 if died else 10) * DAY
        store.outcomes.append(f"p{i}", int(died), when, when if died else None)


def lose(store, number, days, **over):
    """Report that a patient was lost so many days after arrival."""
    until = START + (number + days) * DAY
    row = {"record_id": f"p{number}", "y": None, "known_at": until, "followed_until": until}
    store.outcomes.append(**row | over)


def run(code, folder, **options):
    program = HEAD.format(tests=str(TESTS)) + code
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        **{"capture_output": True, "text": True, "timeout": PATIENCE} | options,
    )


NOW = START + 60 * DAY


def all_kinds(store):
    """A store in which each table has rows, from single and bulk writes."""
    fill(store, 6)
    for name in ("p3", "p4", "p5"):
        store.withdrawals.append("record", name, "Dr A", "another patient's values", NOW)
    rows = pd.DataFrame([patient(i) for i in range(20, 26)])
    risks = rows[["record_id"]].assign(**answer())
    store.records.append_many(
        rows, rows["arrived"], "bulk", risks, risks[["record_id"]].assign(**why())
    )
    truth = pd.DataFrame({"record_id": ["p20", "p21", "p22"], "y": 0, "known_at": NOW})
    store.outcomes.append_many(truth)
    for name in ("p0", "p1", "p2"):
        store.decisions.append(name, "Dr A", "agree", "", NOW)
        store.rejections.append("record", name, "age", 1, "rule", "message", {}, NOW)
        store.events.append_verdict({"as_of": NOW, "action": "nothing", "reason": name})
        store.events.append_update({"as_of": NOW, "action": "wait", "reason": name})
        sketch = {"as_of": NOW, "version": 1, "kind": "blocks", "budget": 0.1, "patients": 5}
        store.events.append_sketch(sketch | {"content": name})
        store.events.append_rollout(
            {"as_of": NOW, "policy": "{}", "reason": name, "actor": "a person"}
        )
        store.audit.head()  # What waits is moved: an entry of its own
        settings = {"as_of": NOW, "origin": "file", "file_sha256": name}
        store.events.append_settings(settings | {"study": "", "plan": ""})
        store.audit.head()  # What waits is moved: an entry of its own
        store.audit.append("attempt", {"for": name}, "machine")


def why():
    return {"version": 1} | reasons()

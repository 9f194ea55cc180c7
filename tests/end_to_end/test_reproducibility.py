"""The same data give the same predictions, models and decisions, to the bit, in fresh processes."""

import json
import os
import subprocess
import sys

import pytest

from lm.core.settings import find_root

pytestmark = pytest.mark.slow  # The fixtures of the module are

RUN = """
import hashlib, json
import pandas as pd
from lm.machine.machine import Machine
from lm.model.metrics import performance
from lm.model.predict import fit
from lm.offline.live import live
from lm.core.study import load_study; from lm.core.study_rows import read_rows

study = load_study("monica")
rows = read_rows(study)

def sha(thing):
    text = thing.to_csv(float_format=float.hex) if isinstance(thing, pd.DataFrame) else repr(thing)
    return hashlib.sha256(text.encode()).hexdigest()

with Machine(study) as machine:
    sent = live(machine, rows, patients=300)
    verdict = machine.monitor(fast=True) | {"action": "retrain"}
    update = machine.update(verdict, seed=5)
    known, models = machine.known().dropna(subset="risk"), machine.models()
    model = fit(study, rows[:900], "boosting", members=3)
    verdicts = machine.table("verdicts")  # Each quotes the audit log, which has clock times
    found = [json.loads(text) for text in verdicts["evidence"]]
    assert all(len(evidence.pop("audit")["hash"]) == 64 for evidence in found)
    verdicts["evidence"] = [json.dumps(evidence, sort_keys=True) for evidence in found]
    answer = machine.receive(rows.iloc[-1].to_dict(), now=rows["arrived"].iloc[-1])
    print(json.dumps({
        "sent": sent,
        "predictions": sha(known),
        "explanations": sha(machine.table("explanations")),
        "answer": sha(sorted(answer.items())),
        "metrics": sha(performance(known["y"].dropna(), known["risk"][known["y"].notna()])),
        "models": sha(models[["version", "made_for", "reason", "fingerprint", "snapshot"]]),
        "stored metrics": sha(models.filter(like="apparent")),
        "boosting": model.fingerprint(),
        "snapshot": machine.snapshot()["id"],
        "verdicts": sha(verdicts),
        "update": sha(update["reason"]),
        "updates": sha(machine.table("updates").drop(columns="evidence")),
        "records": sha(machine.table("records")),
    }))
"""

SETTINGS = [
    {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
    {"PYTHONHASHSEED": "2", "TZ": "Asia/Kolkata", "LC_ALL": "C", "OMP_NUM_THREADS": "4"},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small simulation, twice: other home, other hash seed, time zone and number of threads."""
    processes = []
    for number, settings in enumerate(SETTINGS):
        home = tmp_path_factory.mktemp(f"run {number}")
        places = {"LM_HOME": str(home / "state"), "LM_REPORTS": str(home / "reports")}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RUN],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=find_root(),
                env={**os.environ, **places, **settings},
            )
        )
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [err for _, err in results]
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


def test_enough_has_happened(runs):
    assert runs[0]["sent"] >= 300 and len(runs[0]) == 13


def test_two_fresh_processes_agree_to_the_bit(runs):
    assert [name for name in runs[0] if runs[0][name] != runs[1][name]] == []

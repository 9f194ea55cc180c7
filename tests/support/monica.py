"""A machine on the study `monica`: its history, its first model, and versions made from it."""

import pandas as pd

from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.machine.machine import Machine

BY = "quality manager"  # Whom the plan of monica names
STUDY = load_study("monica")
ROWS = read_rows(STUDY)
DAY = pd.Timedelta(days=1)
FIRST = STUDY.first_model
PAST = ROWS[ROWS["arrived"] <= FIRST]
NEXT = ROWS[ROWS["arrived"] > FIRST].reset_index(drop=True)


def learn(machine):
    """History, outcomes and a first model, as of the study's first day."""
    machine.receive_many(PAST, source="history", on_arrival=True)
    machine.add_outcomes(ROWS[ROWS["known_at"] <= FIRST])
    return machine.update(machine.monitor(FIRST, fast=True))


def shifted(machine, by):
    """Register a copy of the champion whose log-odds are larger by `by`."""
    model = machine.registry.load("champion").recalibrated(by)
    return machine.registry.register(model, {}, {}, {}, f"shifted by {by}")


HALF = {"kind": "ab", "challenger": 2, "share": 0.5}


def begun(home):
    """A machine with a champion and a second version whose log-odds are larger by 0.5."""
    machine = Machine(STUDY, home)
    learn(machine)
    shifted(machine, 0.5)
    return machine

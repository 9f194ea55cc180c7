"""Corrections and withdrawals: what counts is decided once, and nothing is lost."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.long import much
from support.memory import Memory
from support.ward import DAY, START, STUDY, answer, patient, reasons

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.records import UnknownRecord
from lm.data.snapshot import read_snapshot
from lm.data.store import Store
from lm.machine.machine import Machine


@pytest.fixture
def store(tmp_path):
    with Store(STUDY, tmp_path / "ward") as opened:
        yield opened


STEP = st.tuples(
    st.sampled_from(["record", "record", "correct", "outcome", "outcome", "withdraw", "gone"]),
    st.integers(0, 7),  # Which of the records there are
    st.integers(0, 40),  # Day
    st.sampled_from([0, 1]),
)


def take(store, memory, step):
    """One step on both; what one refuses the other must not take."""
    kind, number, day, y = step
    names = [r["record_id"] for r in memory.records]
    if kind in ("record", "correct"):
        corrects = names[number % len(names)] if kind == "correct" and names else None
        row = patient(len(names), START) | ({"corrects": corrects} if corrects else {})
        known_at = START + day * DAY
        store.records.append(row, known_at, "", answer(), reasons())
        record = {"record_id": row["record_id"], "arrived": START, "known_at": known_at}
        memory.records.append(record | {"corrects": corrects})
    elif not names:
        return
    elif kind == "outcome":
        name, known_at = names[number % len(names)], START + (10 + day) * DAY
        gone = memory.gone("record", name, START + 10_000 * DAY)
        if gone:
            with pytest.raises(UnknownRecord):
                store.outcomes.append(name, y, known_at)
            return
        latest = [o for o in memory.outcomes if o["record_id"] == name]
        latest = [o for o in latest if not memory.gone("outcome", o["seq"], START + 10_000 * DAY)]
        store.outcomes.append(name, y, known_at)
        if not latest or (latest[-1]["y"], latest[-1]["known_at"]) != (y, known_at):
            row = {"record_id": name, "y": y, "known_at": known_at}
            memory.outcomes.append(row | {"seq": len(memory.outcomes) + 1})
    else:
        name, as_of = names[number % len(names)], START + (5 + day) * DAY
        what = "record" if kind == "gone" else "outcome"
        try:
            row = store.withdrawals.append(what, name, "Dr Lee", "typing error", as_of)
        except LMError:
            return
        key = name if what == "record" else row["entry"]
        memory.withdrawn.append({"kind": what, "key": key, "as_of": as_of})


@pytest.mark.slow
@settings(max_examples=much(8, 600), deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=14), reopened=st.booleans())
def test_any_sequence_equals_a_plain_list(tmp_path_factory, steps, reopened):
    folder, memory = tmp_path_factory.mktemp("store"), Memory(STUDY.horizon_days)
    store = Store(STUDY, folder)
    try:
        for step in steps:
            take(store, memory, step)
        if reopened:
            store.close()
            store = Store(STUDY, folder)
        assert store.clock.data_time() == memory.clock()
        for day in (0, 4, 9, 13, 20, 33, 60):
            as_of = START + day * DAY
            known = store.queries.as_of(as_of)
            expected = memory.known(as_of)
            y = [None if np.isnan(v) else int(v) for v in known["y"]]
            assert dict(zip(known["record_id"], y, strict=True)) == expected
        assert len(store.queries.table("records")) == len(memory.records)
        counting = len(store.queries.as_of(START + 10_000 * DAY))
        assert store.status.counts()["records"] - store.status.superseded() == counting
        assert len(store.queries.table("outcomes")) == len(memory.outcomes)
        for name in {r["record_id"] for r in memory.records}:
            result = store.queries.current(name)
            last = memory.counting(START + 10_000 * DAY).get(memory.first(name))
            assert result["counts_as"] == (last and last["record_id"])
        assert store.verify() == []
    finally:
        store.close()


def test_corrections_chain_and_count_once(store):
    store.records.append(patient(1, START), START)
    store.outcomes.append("p1", 1, START + DAY)
    for number in (2, 3):
        row = patient(number, START) | {"corrects": f"p{number - 1}"}
        store.records.append(row, START + number * DAY)
    known = store.queries.as_of(START + 20 * DAY)
    assert known["record_id"].tolist() == ["p3"] and known["y"].tolist() == [1.0]
    assert store.queries.as_of(START + 2 * DAY)["record_id"].tolist() == ["p2"]
    assert store.queries.table("records")["original"].tolist()[1:] == ["p1", "p1"]
    assert store.queries.visits("p1")["record_id"].tolist() == ["p3"]


def test_a_correction_needs_an_earlier_record(store):
    with pytest.raises(UnknownRecord, match=r"corrects = 'p7' breaks the rule"):
        store.records.append(patient(1) | {"corrects": "p7"}, START + DAY)
    assert not store.queries.has("p1")


def test_a_batch_may_correct_itself_and_what_came_before(store):
    store.records.append(patient(1, START), START)
    rows = pd.DataFrame([patient(n, START) for n in (2, 3, 4)])
    rows["corrects"] = ["p1", None, "p3"]
    store.records.append_many(rows, START)
    assert store.queries.as_of(START)["record_id"].tolist() == ["p2", "p4"]


def test_a_withdrawn_outcome_gives_back_clock_and_label(store):
    store.records.append(patient(0), START, "", answer(), reasons())
    store.outcomes.append("p0", 0, START + 11 * DAY)
    store.outcomes.append("p0", 1, START + 900 * DAY, event=START + DAY)
    frozen = store.snapshots.take(START + 20 * DAY)
    row = store.withdrawals.append("outcome", "p0", "Dr Lee", "2022 was meant")
    assert row["entry"] == 2 and row["as_of"] == START + 11 * DAY == store.clock.data_time()
    assert store.queries.as_of()["y"].tolist() == [0.0] and store.queries.current("p0")["y"] == 0
    assert len(store.queries.table("outcomes")) == 2
    log = store.queries.table("audit")
    assert log.iloc[-1][["kind", "actor"]].tolist() == ["withdrawals", "Dr Lee"]
    assert read_snapshot(frozen["path"])["y"].tolist() == [0.0]
    with pytest.raises(LMError, match=r"by = .* needs the name of a person"):
        store.withdrawals.append("outcome", "p0", " ", "why")
    store.withdrawals.append("record", "p0", "Dr Lee", "another patient")
    assert (
        store.queries.as_of().empty
        and store.queries.visits("p0").empty
        and store.clock.data_time() is None
    )
    with pytest.raises(LMError, match="withdrawn already by Dr Lee"):
        store.withdrawals.append("record", "p0", "Dr Lee", "again")
    with pytest.raises(UnknownRecord, match="no such record"):
        store.outcomes.append("p0", 1, START + 12 * DAY)
    assert store.verify() == []


@pytest.mark.parametrize(
    "name", ["", "  ", None, "x" * 101, "Dr\nA", "Dr \u202eA", True, 1.5, ["Dr A"]]
)
def test_an_act_has_the_name_of_a_person(tmp_path, name):
    study = load_study("monica")
    row = read_rows(study).iloc[0][["record_id", "arrived", *study.feature_names]].to_dict()
    with Machine(study, tmp_path) as machine:
        machine.receive(row, now=row["arrived"])
        for act in (
            lambda: machine.withdraw("record", row["record_id"], name, "not mine"),
            lambda: machine.add_decision(row["record_id"], name, "agree"),
        ):
            with pytest.raises(LMError, match="needs the name of a person"):
                act()
        assert machine.table("withdrawals").empty and machine.table("decisions").empty
        machine.add_decision(row["record_id"], " Zoe\u0301 ", "agree")
        assert machine.table("decisions")["clinician"].tolist() == ["Zo\u00e9"]

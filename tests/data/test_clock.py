"""One clock at every entry point: no date after now, and a replayed study lives by its own time."""

import os
from dataclasses import replace

import pandas as pd
import pytest
from support.journal_lines import line
from support.ward import DAY, STUDY, answer, patient, reasons

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import RejectedRecord
from lm.data.store import Store
from lm.machine.machine import Machine

NOW = pd.Timestamp("2026-03-01T12:00")
LONG_AGO, SOON = NOW - 400 * DAY, NOW + pd.Timedelta(minutes=30)


@pytest.fixture
def opened(tmp_path):
    """Opens stores and machines whose wall clock stands still."""
    stored = []

    def open_one(study=STUDY, machine=False):
        if machine:
            made = Machine(study, tmp_path)
            store = made.store
        else:
            made = store = Store(study, tmp_path / study.name)
        store.clock.wall = lambda: NOW
        stored.append(made)
        return made

    yield open_one
    for made in stored:
        made.close()


def predicted(store, number, when):
    store.records.append(patient(number, when), when, "", answer(), reasons())


def test_the_first_prediction_says_whether_time_is_replayed(opened):
    store = opened()
    store.records.append(patient(0, LONG_AGO), LONG_AGO)
    assert (
        store.clock.replayed() is None and store.clock.now() == NOW
    )  # A history alone says nothing
    predicted(store, 1, LONG_AGO + DAY)
    predicted(store, 2, NOW)
    assert store.clock.replayed() is True
    store.close()
    again = opened()
    assert again.clock.replayed() is True
    assert again.clock.now() == again.clock.data_time() == NOW


def test_before_the_first_prediction_a_run_is_dated_by_what_is_known(tmp_path):
    rows = read_rows(load_study("monica")).head(400)
    with Machine("monica", tmp_path) as machine:
        machine.receive_many(
            rows[["record_id", "arrived", *machine.study.feature_names]], on_arrival=True
        )
        machine.add_outcomes(rows)
        verdict = machine.monitor()
        assert (
            pd.Timestamp(verdict["as_of"])
            == machine.store.clock.data_time()
            < pd.Timestamp("1990-01-01")
        )


@pytest.mark.parametrize("down", [True, False], ids=["the service was down", "a replay"])
def test_a_first_prediction_in_the_journal_counts_when_it_was_written(opened, down):
    store = opened()
    store.close()
    came = pd.Timestamp.now("UTC").tz_localize(None).floor("s") - 3 * DAY
    path = store.folder / "journal-000001.jsonl"
    path.write_bytes(line(0, came))
    if down:  # Three days ago it was written, and the store is opened only today
        os.utime(path, (came.tz_localize("UTC").timestamp(),) * 2)
    for _ in range(2):
        again = opened()
        assert again.clock.replayed() is not down and again.verify() == []
        assert again.queries.table("records")["record_id"].tolist() == ["p0"]
        again.close()


def test_a_live_study_lives_by_the_wall_clock(opened):
    store = opened()
    store.clock.wall = lambda: pd.Timestamp.now("UTC").tz_localize(None)
    predicted(store, 0, store.clock.wall() - pd.Timedelta(hours=3))
    assert store.clock.replayed() is False and store.clock.now() > store.clock.data_time()
    store.close()
    assert opened().clock.replayed() is False


@pytest.mark.parametrize(("declared", "replayed"), [("wall", False), ("replay", True)])
def test_the_study_may_say_which(opened, declared, replayed):
    store = opened(replace(STUDY, clock=declared))
    predicted(store, 0, LONG_AGO if declared == "wall" else NOW)
    assert store.clock.replayed() is replayed


def test_what_is_dated_later_than_now_is_refused_at_every_entry_point_of_the_store(opened):
    store, late = opened(), NOW + pd.Timedelta(hours=2)
    rows = pd.DataFrame([patient(5, NOW)])
    predicted(store, 0, NOW)
    store.records.append(patient(1, NOW), SOON)  # A sender's clock may be an hour ahead
    for middleware in (
        lambda: store.records.append(patient(2, NOW), late),
        lambda: store.records.append_many(rows, late),
        lambda: store.outcomes.append("p0", 1, late),
        lambda: store.outcomes.append("p0", 1, NOW, event="2142-02-01"),
        lambda: store.outcomes.append("p0", None, NOW, followed_until="2142-02-01"),
    ):
        with pytest.raises(LMError, match=r"not later than now, 2026-03-01 12:00"):
            middleware()
    frame = pd.DataFrame([{"record_id": "p0", "y": 1, "known_at": "2142-02-01"}])
    accepted, refused = store.outcomes.append_many(frame)
    assert accepted == 0 and "later than now" in str(refused[0][1])
    assert store.clock.data_time() == SOON and store.status.counts()["outcomes"] == 0


def test_a_declared_replay_may_tell_of_a_future_step_by_step(opened):
    store = opened(replace(STUDY, clock="replay"))
    predicted(store, 0, NOW)
    predicted(store, 1, NOW + 300 * DAY)
    with pytest.raises(LMError, match="later than now"):
        predicted(store, 2, pd.Timestamp("2142-02-01"))
    assert store.clock.now() == NOW + 300 * DAY


def test_a_run_moves_the_clock_and_a_far_one_does_not(opened):
    store = opened()
    predicted(store, 0, LONG_AGO)
    store.events.append_verdict(
        {"as_of": LONG_AGO + 90 * DAY, "action": "nothing", "reason": "quiet"}
    )
    assert store.clock.data_time() == LONG_AGO + 90 * DAY
    store.events.append_verdict({"as_of": "2142-02-01", "action": "nothing", "reason": "quiet"})
    assert store.clock.data_time() == LONG_AGO + 90 * DAY


def sent(number, arrived):
    return patient(number) | {"arrived": arrived.isoformat()}


def test_entries_of_a_replayed_machine_share_its_clock(opened):
    machine = opened(machine=True)
    predicted(machine.store, 0, LONG_AGO)
    machine.receive(sent(1, LONG_AGO - 5 * DAY))  # Arrived before the clock: known now
    records = machine.table("records").set_index("record_id")["known_at"]
    assert records["p1"] == LONG_AGO == machine.now()
    machine.receive(sent(2, LONG_AGO + 30 * DAY))  # Arrived later: the clock moves there
    assert machine.now() == LONG_AGO + 30 * DAY
    assert machine.add_decision("p0", "Dr Lee", "agree")["decided_at"] == machine.now().isoformat()
    with pytest.raises(LMError):
        machine.add_outcome("p0", 2, LONG_AGO + 11 * DAY)
    assert machine.table("rejects")["received_at"].tolist() == [machine.now()]
    status = machine.status()
    assert status["clock"] == status["now"] == machine.now().isoformat() and status["replayed"]


@pytest.mark.parametrize("many", [False, True])
def test_a_jump_of_more_than_a_year_is_refused(opened, many):
    machine = opened(machine=True)
    predicted(machine.store, 0, pd.Timestamp("1991-05-01"))
    row = sent(1, pd.Timestamp("2021-06-01"))
    if many:
        near = sent(2, pd.Timestamp("1991-06-01"))
        answers = machine.receive_many([row, near]).set_index("record_id")["error"]
        assert answers["p2"] == "" and "the clock of this replayed study" in answers["p1"]
        assert machine.now() == pd.Timestamp("1991-06-01")
    else:
        with pytest.raises(RejectedRecord, match=r"1991-05-01.*the clock of this replayed study"):
            machine.receive(row)
        assert machine.now() == pd.Timestamp("1991-05-01")
    assert machine.table("rejects")["field"].tolist() == ["arrived"]


def test_entries_of_a_live_machine_refuse_the_future(opened):
    machine = opened(machine=True)
    predicted(machine.store, 0, NOW)
    future = NOW + 2 * DAY
    for wrong in (
        lambda: machine.receive(sent(1, future)),
        lambda: machine.receive(sent(1, NOW), now=future),
        lambda: machine.add_decision("p0", "Dr Lee", "agree", now=future),
        lambda: machine.receive_many([sent(1, NOW)], now=future),
    ):
        with pytest.raises(LMError, match="not later than now"):
            wrong()
    errors = machine.receive_many([sent(1, future), sent(2, NOW)])["error"].tolist()
    assert errors[0] == "" and "not later than now" in errors[1]


def test_an_entry_taken_back_gives_the_clock_back(opened):
    machine = opened(machine=True)
    predicted(machine.store, 0, pd.Timestamp("1991-05-01"))
    machine.store.outcomes.append("p0", 1, pd.Timestamp("2022-05-03"), event="1991-05-02")
    assert machine.now() == pd.Timestamp("2022-05-03")
    row = machine.withdraw("outcome", "p0", "Dr Lee", "1991 was meant")
    assert machine.now() == pd.Timestamp("1991-05-01") and row["entry"] == 1
    assert (
        machine.store.queries.current("p0")["y"] is None and machine.known()["y_early"].isna().all()
    )

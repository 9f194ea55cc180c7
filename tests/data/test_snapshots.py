"""Which snapshots stay, that the rest can be made again, and that the log says what is gone."""

import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.long import much
from support.ward import DAY, START, STUDY, patient

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.retention import (
    NEWEST,
    TakenSnapshot,
    referenced_snapshots,
    removable_snapshots,
    remove_old_snapshots,
    restore_snapshot,
    snapshots_on_disk,
)
from lm.data.snapshot import read_snapshot
from lm.data.store import Store
from lm.machine.base import own_name
from lm.machine.machine import Machine
from lm.serve.auth import Person
from lm.serve.dependencies import snapshot_owner
from lm.serve.routes import JOB
from lm.update.permission import Grants
from lm.update.run import reproduce

TAKEN = st.lists(
    st.builds(
        TakenSnapshot,
        st.uuids().map(str),
        st.datetimes(pd.Timestamp("2025-01-01"), pd.Timestamp("2025-06-30")).map(pd.Timestamp),
        st.booleans(),
        st.none(),
    ),
    max_size=60,
    unique_by=lambda one: one.id,
)


@settings(max_examples=much(100, 2000), deadline=None)
@given(TAKEN, st.integers(0, 12), st.data())
def test_the_rule(taken, newest, data):
    ids = [one.id for one in taken]
    named = data.draw(st.sets(st.sampled_from(ids))) if ids else set()
    gone = {one.id for one in removable_snapshots(taken, named, newest)}
    left = [one for one in taken if one.id not in gone]
    others = [one for one in taken if one.id not in named and not one.person]
    assert not gone & named and not any(one.person and one.id in gone for one in taken)
    assert {one.id for one in others[max(0, len(others) - newest) :]} <= {one.id for one in left}
    for month in {one.as_of.strftime("%Y-%m") for one in others}:
        latest = max(one.as_of for one in others if one.as_of.strftime("%Y-%m") == month)
        assert any(one.as_of == latest for one in left if one in others)
    months = {one.as_of.strftime("%Y-%m") for one in others}
    assert sum(one in others for one in left) <= newest + len(months)
    assert removable_snapshots(left, named, newest) == []


def test_what_refers():
    updates = pd.DataFrame(
        [
            ("refit", "of the model", '{"verdict": 3}'),
            ("keep", "of nothing", '{"verdict": 1}'),
            ("wait", "of a proposal", '{"verdict": 2.0}'),
            ("rollback", "", None),
        ],
        columns=["action", "snapshot", "evidence"],
    )
    verdicts = pd.DataFrame({"seq": [1, 2, 3], "snapshot": ["one", "two", "three"]})
    stored = {"of the model", "of a proposal", "two", "three", "fitted"}
    assert referenced_snapshots(["fitted"], updates, verdicts) == stored
    assert referenced_snapshots([], updates[:0], verdicts) == set()


STEPS = st.sampled_from(["record", "outcome", "withdraw", "snapshot", "snapshot"])


@pytest.mark.slow
@settings(max_examples=much(8, 200), deadline=None)
@given(st.lists(STEPS, max_size=14))
def test_what_is_removed_can_be_made_again(steps):
    with tempfile.TemporaryDirectory() as place, Store(STUDY, Path(place)) as store:
        store.records.append(patient(0), START)
        contents = {}
        for number, step in enumerate(["snapshot", *steps, "record", "snapshot"], 1):
            when = START + number // 3 * DAY  # Several of one moment
            if step == "record":
                store.records.append(patient(number, START), when)
            elif step == "outcome":
                store.outcomes.append("p0", 1, when, event=START)
            elif step == "withdraw" and "p0" not in store.engine.index.links.gone and number > 3:
                store.withdrawals.append("record", "p0", "Ada", "a test", START + number // 3 * DAY)
                break
            elif step == "snapshot":
                taken = store.snapshots.take()
                contents[taken["id"]] = read_snapshot(taken["path"])
        before = len(list((store.folder / "snapshots").glob("*.parquet")))
        gone = remove_old_snapshots(store, [], newest=0, most=99)
        assert before == len(contents) and not store.snapshots.permanent
        assert len(gone) == before - len({d.strftime("%Y-%m") for d in times(store)})
        assert len(store.audit.entries("snapshot removed")) == len(gone)
        for name, content in contents.items():
            back = restore_snapshot(store, name[:16], "Ada")
            assert back["id"] == name and back["rows"] == len(content)
            pd.testing.assert_frame_equal(read_snapshot(back["path"]), content)
        assert remove_old_snapshots(store, [], newest=0) == []  # A person refers to all of them
        assert store.verify() == []


def times(store):
    """The moments of the snapshots in the log."""
    return [pd.Timestamp(made["as_of"]) for made in store.audit.entries("snapshot")]


def test_no_file_goes_that_the_tables_do_not_give_again(tmp_path):
    with Store(STUDY, tmp_path) as store:
        for number in range(6):
            store.records.append(patient(number), START + number * DAY)
            store.snapshots.take()
        paths = sorted((tmp_path / "snapshots").glob("*.parquet"))
        strange = tmp_path / "snapshots" / f"{'ab' * 32}.parquet"
        strange.write_bytes(paths[0].read_bytes())  # Nothing says when it was taken
        with store.snapshots.removing:  # A backup copies them
            assert remove_old_snapshots(store, [], newest=0) == []
        assert len(remove_old_snapshots(store, [], newest=0, most=2)) == 2
        assert len(remove_old_snapshots(store, [], newest=0)) == 3 and strange.exists()
        with pytest.raises(LMError, match="0 have this name"):
            restore_snapshot(store, "f" * 64, "Ada")


def test_other_rules_of_the_study_make_no_other_snapshot(tmp_path):
    with Store(STUDY, tmp_path) as store:
        for number in range(3):
            store.records.append(patient(number), START + number * DAY)
            store.snapshots.take()
        gone = remove_old_snapshots(store, [], newest=0)
        store.study = replace(STUDY, horizon_days=99)
        with pytest.raises(LMError, match=r"horizon = 10 days.*, the study has 99 days"):
            restore_snapshot(store, gone[0], "Ada")
        assert len(list((tmp_path / "snapshots").glob("*"))) == 1


def test_those_of_an_earlier_version_count_by_their_verdict(tmp_path, monkeypatch):
    with Store(STUDY, tmp_path) as store:
        for number in range(5):
            store.records.append(patient(number), START + number * DAY)
            taken = store.snapshots.take()
            verdict = {"as_of": taken["as_of"], "action": "keep", "snapshot": taken["id"]}
            store.events.append_verdict(verdict | {"evidence": {}})
        with monkeypatch.context() as patch:
            patch.setattr(store.audit, "signed_entries", lambda kind: [])
            assert [one.as_of for one in snapshots_on_disk(store)] == [
                START + n * DAY for n in range(5)
            ]
            gone = remove_old_snapshots(store, [], newest=1)
        assert len(gone) == 3 and len(store.audit.entries("snapshot removed")) == 3
        assert restore_snapshot(store, gone[0], "Ada")["rows"] == 1


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A machine with a model, after more monitoring runs than snapshots stay."""
    study, home = load_study("monica"), tmp_path_factory.mktemp("lived")
    rows = read_rows(study)
    past = rows[rows["known_at"] <= study.first_model].tail(300)
    with Machine(study, home) as machine:
        machine.receive_many(past, source="history", on_arrival=True)
        machine.add_outcomes(past)
        mine = machine.snapshot(study.first_model - 400 * DAY, by="Ada")
        machine.update(machine.monitor(study.first_model, fast=True))
        days = pd.date_range(end=study.first_model, periods=2 * NEWEST)
        runs = [machine.monitor(day, fast=True) for day in days]
        yield machine, mine, runs


@pytest.mark.slow
def test_monitoring_runs_leave_few_files(lived):
    machine, mine, runs = lived
    files = {path.stem for path in (machine.store.folder / "snapshots").glob("*.parquet")}
    months = {pd.Timestamp(run["as_of"]).strftime("%Y-%m") for run in runs}
    assert mine["id"] in files and machine.registry.snapshots() <= files
    assert len(files) <= NEWEST + len(months) + 3 < len({run["snapshot"] for run in runs})
    gone = next(run["snapshot"] for run in runs if run["snapshot"] not in files)
    assert machine.snapshot(again=gone)["id"] == gone
    assert machine.verify() == []


def test_the_snapshot_of_a_model_stays_and_makes_it_again(lived):
    machine, _, _ = lived
    place = machine.store.folder / "snapshots"
    for version in machine.registry.numbers():
        assert reproduce(machine, machine.study, machine.registry, version, place)["same"]


def test_who_a_snapshot_stays_for():
    machine = SimpleNamespace(grants=Grants())

    def asked(name, role):
        return Person(name, role)

    for notebook, by in {"monitor": "", "retrain": "", "experiment": "Ada"}.items():
        _, grant = machine.grants.issue(notebook, "Ada", 1, 1, START, {})
        assert snapshot_owner(machine, asked(grant.name, JOB)) == by
    assert snapshot_owner(machine, asked("ward 3", "machine")) == ""
    assert snapshot_owner(machine, asked("Ada", "data scientist")) == "Ada"
    assert snapshot_owner(machine, None) == own_name()

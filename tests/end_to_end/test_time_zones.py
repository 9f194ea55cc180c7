"""A study in Berlin: every entry point reads local time as the same instant, stored in UTC."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lm.cli.cli import main
from lm.core.labels import horizon_ends, label_outcomes
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.times import parse_moment
from lm.data.snapshot import read_snapshot
from lm.data.synthetic import synthetic
from lm.machine.machine import Machine
from lm.machine.queries import state_at
from lm.monitor.follow_up import follow_up_days
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client
from lm.ui.clinician_tables import patient_data_html

MONICA = load_study("monica")
PATIENT = read_rows(MONICA).iloc[0][MONICA.feature_names].to_dict()
INSTANT = pd.Timestamp("1990-07-05T08:30")  # 10:30 in Berlin
SPELLINGS = {
    "local": "1990-07-05T10:30",
    "UTC": "1990-07-05 08:30Z",
    "offset": "1990-07-05T10:30:00+02:00",
    "typed": INSTANT,
    "aware": INSTANT.tz_localize("UTC").tz_convert("Asia/Tokyo"),
}


@pytest.fixture(scope="module")
def berlin(tmp_path_factory):
    """A study whose clock is Berlin's, with a table of one patient per spelling."""
    folder = tmp_path_factory.mktemp("data") / "berlin"
    folder.mkdir()
    parent = f'extends = "{MONICA.folder.as_posix()}"\n'
    (folder / "study.toml").write_text(parent + 'time_zone = "Europe/Berlin"\nclock = "replay"\n')
    rows = [
        {"record_id": name, "arrived": str(when), **PATIENT, "event": "", "followed_until": day}
        for name, when in SPELLINGS.items()
        for day in ["1990-08-02"]
        if name != "typed"
    ]
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    return load_study(folder)


def test_a_table_is_read_in_the_zone_of_its_study(berlin):
    rows = read_rows(berlin)
    assert set(rows["arrived"]) == {INSTANT} and (rows["y"] == 0).all()
    assert (rows["followed_until"] == pd.Timestamp("1990-08-01T22:00")).all()  # Midnight in Berlin
    assert set(read_rows(replace(berlin, time_zone="UTC"))["arrived"]) == {
        *(INSTANT, pd.Timestamp("1990-07-05T10:30"))
    }


def token_of(machine):
    """A token for all that a program may do."""
    return Tokens(machine.store.folder).create("Test", "admin")


def test_every_entry_point_reads_the_same_instant(berlin, tmp_path):
    machine = Machine(berlin, tmp_path)
    with machine, background(machine) as url, Client(url, token=token_of(machine)) as client:
        for name, when in SPELLINGS.items():
            row = PATIENT | {"arrived": when}
            machine.receive(row | {"record_id": f"{name} alone"})
            client.receive(row | {"record_id": f"{name} sent"})
            client.receive_many([row | {"record_id": f"{name} listed"}])
            table = pd.DataFrame([row | {"record_id": f"{name} in a table"}])
            client.receive_many(table)
            machine.receive_many(table.assign(record_id=f"{name} at once"))
        arrived = machine.table("records").set_index("record_id")["arrived"]
        assert len(arrived) == 25 and set(arrived) == {INSTANT}
        for name, when in SPELLINGS.items():
            late = (
                when.replace("07-05", "08-02") if isinstance(when, str) else when + berlin.horizon
            )
            machine.add_outcome(f"{name} alone", 0, known_at=late)
            client.add_outcome(f"{name} sent", 0, known_at=late)
            client.add_outcomes(
                pd.DataFrame([{"record_id": f"{name} listed", "y": 0, "known_at": late}])
            )
        known = machine.table("outcomes")["known_at"]
        assert len(known) == 15 and set(known) == {INSTANT + berlin.horizon}
        local = (INSTANT + berlin.horizon + pd.Timedelta(hours=2)).isoformat()
        assert client.known(as_of=local)["y"].notna().sum() == 15
        early = INSTANT + berlin.horizon - pd.Timedelta(minutes=1)
        assert client.known(as_of=early)["y"].notna().sum() == 0


def test_every_entry_point_asks_about_the_same_moment(berlin, tmp_path, monkeypatch, capsys):
    """A time without an offset is on the study's clock, in this process and over the network."""
    monkeypatch.setenv("LM_HOME", str(tmp_path))
    local = "1990-07-05T10:30"  # INSTANT, on a clock in Berlin
    ways = [local, f"{INSTANT.isoformat()}Z", INSTANT]
    with Machine(berlin, tmp_path) as machine:
        early = INSTANT - pd.Timedelta(minutes=30)
        for name, when in (
            ("before", early),
            ("then", INSTANT),
            ("after", INSTANT + 2 * (INSTANT - early)),
        ):
            machine.receive(PATIENT | {"record_id": name, "arrived": when}, now=when)
        machine.store.events.append_verdict(
            {"as_of": INSTANT, "action": "keep", "reason": "all is well"}
        )
        with background(machine) as url, Client(url, token=token_of(machine)) as client:
            for asked in (machine, client):
                for when in ways:
                    assert len(asked.known(when)) == len(asked.table("records", as_of=when)) == 2
                    assert len(asked.table("verdicts", as_of=when)) == 1
                    state = state_at(asked, berlin, when)
                    assert asked.snapshot(when)["rows"] == state["patients"] == 2
            result = machine.table("audit")["at"].iloc[-1].tz_localize("UTC")
            monkeypatch.setattr("lm.core.study.load_study", lambda name: berlin)
            for zone in ("Europe/Berlin", "UTC"):
                since = result.tz_convert(zone).isoformat()
                assert main(["audit", berlin.name, "--since", since]) == 0
                counted = len(capsys.readouterr().out.splitlines())
                assert main(["audit", berlin.name, "--since", since[:26]]) == 0
                same = len(capsys.readouterr().out.splitlines()) == counted
                assert same is (zone == "Europe/Berlin")


def test_a_day_is_answered_and_shown_as_a_day(berlin, tmp_path):
    with Machine(berlin, tmp_path) as machine:
        inputs = {"a day": "1990-07-05", "a time": "1990-07-05T10:30"}
        for name, when in inputs.items():
            first = machine.receive(PATIENT | {"record_id": name, "arrived": when})
            again = machine.explain(name)
            exact = "day" if name == "a day" else "second"
            assert first["arrived_precision"] == again["arrived_precision"] == exact
        shown = [patient_data_html(berlin, machine.explain(name)) for name in inputs]
    assert "arrived 5 Jul 1990 " in shown[0] and "arrived 5 Jul 1990, 10:30 " in shown[1]


@pytest.mark.parametrize("change", ["1990-03-25", "1990-09-30"], ids=["spring", "autumn"])
def test_a_horizon_ends_alike_for_store_and_rule_where_clocks_change(berlin, tmp_path, change):
    first = pd.Timestamp(change) - berlin.horizon - pd.Timedelta(days=2)
    hours = [first + pd.Timedelta(hours=n) for n in range(0, 24 * 32, 7)]
    days = sorted({f"{when:%Y-%m-%d}" for when in hours})
    came = dict(enumerate([when.tz_localize("UTC") for when in hours] + days))
    ends, second = {}, pd.Timedelta(seconds=1)
    with Machine(berlin, tmp_path) as machine:
        rows = [PATIENT | {"record_id": str(n), "arrived": when} for n, when in came.items()]
        assert machine.receive_many(rows, on_arrival=True)["error"].eq("").all()
        for n, when in came.items():
            ends[str(n)] = parse_moment(when, "Europe/Berlin").plus(berlin.horizon).when
        results = [{"record_id": n, "y": 0, "known_at": end} for n, end in ends.items()]
        assert machine.add_outcomes(pd.DataFrame(results))["accepted"] == len(results)
        for end in sorted(set(ends.values()))[::5]:
            for as_of in (end - second, end):
                known = machine.known(as_of).set_index("record_id")
                due = pd.Series(ends)[known.index]
                assert known["matured"].astype(bool).equals(due.le(as_of).rename("matured"))
                assert known["y"].notna().equals(due.le(as_of).rename("y"))
        known = machine.known(max(ends.values())).set_index("record_id")
        assert (known["followed_until"] == pd.Series(ends)[known.index]).all()
        calendar = known["followed_until"] - known["arrived"]
        assert calendar.nunique() == 2  # A day of 23 or of 25 hours lies in some
        path = machine.snapshot()["path"]
        assert read_snapshot(path).set_index("record_id")["matured"].equals(known["matured"])


def test_follow_up_and_labels_agree_to_the_last_day(berlin):
    """An event on the last day of the horizon counts in charts as it counts in labels."""
    first = pd.Timestamp("1990-08-25")
    wall = pd.Series([first + pd.Timedelta(hours=7 * n) for n in range(200)])
    days = wall.index % 2 == 0
    came = wall.where(~days, wall.dt.floor("D")).dt.tz_localize(berlin.time_zone)
    table = pd.DataFrame({"arrived": came.dt.tz_convert("UTC").dt.tz_localize(None)})
    table["arrived_precision"] = np.where(days, "day", "second")
    due, minute = horizon_ends(berlin, table), pd.Timedelta(minutes=1)
    for late in (-minute, 0 * minute, minute, 23 * 60 * minute):
        frame = table.assign(event=due + late, followed_until=due + 2 * berlin.horizon)
        y = label_outcomes(berlin, frame)["y"]
        if late <= 0 * minute:
            assert (y == 1).all()
        elif late == minute:  # A day lasts until it ends
            assert (y == 1).tolist() == days.tolist()
        last = frame["followed_until"].max()
        days_followed, happened = follow_up_days(frame.assign(y=y), berlin.horizon_days, last)
        assert happened.tolist() == (y == 1).tolist()
        assert (days_followed <= berlin.horizon_days).all()


def test_synthetic_patients_are_followed_to_the_end_of_their_horizon():
    there = replace(MONICA, time_zone="America/New_York", clock="replay")
    rows = synthetic(there, 900, seed=1)
    survived = rows[rows["event"].isna()]
    assert rows["y"].notna().all()
    assert (survived["followed_until"] == horizon_ends(there, survived)).all()

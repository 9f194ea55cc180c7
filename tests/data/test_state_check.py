"""What an earlier version took is found, and nothing is changed without being asked."""

import hashlib
import tarfile

import pytest
from support.paths import STATES

from lm.cli.cli import main
from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.connection import StoreLocked
from lm.data.state_check import check_state, repair
from lm.data.store import Store

DATA = STATES
EXPECTED = {  # Kind: rows, and records that must be among those named
    "collision": (22, {"p00146"}),
    "sentinel": (7, {"p00151"}),
    "double": (2, {"c1", "c2"}),
    "contradiction": (10, {"p00148", "p00149", "p00150"}),
}


def unpacked(tmp_path, name):
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def faulty(tmp_path):
    """A state of the version before with a feature `shadow`, a date of 2142, and more."""
    return unpacked(tmp_path, "state_with_faults")


@pytest.fixture
def sound(tmp_path):
    return unpacked(tmp_path, "state_before")


def content(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("store.duckdb*")
    }


def test_every_kind_is_detected_and_nothing_is_changed(faulty):
    folder = faulty / "home" / "sick"
    before = content(folder)
    result = check_state(folder)
    assert content(folder) == before
    for kind, (count, records) in EXPECTED.items():
        (finding,) = [f for f in result if f.kind == kind]
        assert finding.count == count and records <= set(finding.records)
    futures = [f.sentence for f in result if f.kind == "future"]
    assert len(futures) == 2 and "8 outcomes have known_at later than now, up to 2142" in futures[0]


def test_a_study_that_is_refused_today_can_be_checked_all_the_same(faulty, monkeypatch, capsys):
    monkeypatch.setenv("LM_DATA", str(faulty))
    monkeypatch.setenv("LM_HOME", str(faulty / "home"))
    with pytest.raises(LMError, match=r"'shadow'.*the machine's own"):
        load_study("sick")
    assert main(["check-state", "sick"]) == 1
    assert "feature 'shadow' has the name of a column" in capsys.readouterr().out


def test_a_sound_state_has_nothing_to_report(sound, monkeypatch, capsys):
    monkeypatch.setenv("LM_DATA", str(sound))
    monkeypatch.setenv("LM_HOME", str(sound / "home"))
    assert check_state(sound / "home" / "ward") == []
    assert main(["check-state", "ward"]) == 0
    assert "breaks none of today's rules" in capsys.readouterr().out


def test_a_repair_is_a_named_withdrawal(sound, monkeypatch):
    folder, study = sound / "home" / "ward", load_study(sound / "ward")
    with Store(study, folder) as store:
        clock, name = store.clock.data_time(), store.queries.table("records")["record_id"].iloc[-1]
        arrived = store.queries.table("records")["arrived"].iloc[-1]
        store.clock.wall = lambda: arrived.replace(year=2150)
        store.outcomes.append(name, 1, arrived.replace(year=2142), event=arrived)
        assert store.clock.data_time().year == 2142
        with pytest.raises(StoreLocked):
            check_state(folder)
    assert "future" in {finding.kind for finding in check_state(folder)}
    (done,) = repair(study, folder, "Dr Lee", "2020 was meant")
    assert (done["kind"], done["record_id"], done["actor"]) == ("outcome", name, "Dr Lee")
    assert check_state(folder) == []
    with Store(study, folder) as store:
        assert store.clock.data_time() == clock and store.verify() == []


def test_no_store_is_a_sentence(tmp_path):
    with pytest.raises(LMError, match="holds no store"):
        check_state(tmp_path)

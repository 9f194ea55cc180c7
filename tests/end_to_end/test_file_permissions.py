"""No other user of the computer reads the state: permissions of all that the commands write."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import PATIENCE

from lm.core.errors import LMError
from lm.core.settings import SECRETS, find_root, private_umask
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.serve.client import connect, find_service

pytestmark = pytest.mark.slow  # The fixtures of the module are

ROOT = find_root()


def lm(*text, **how):
    """The command as a careless shell runs it, from the umask on."""
    command = ["sh", "-c", 'umask 000; exec "$0" "$@"', sys.executable, "-m", "lm.cli.cli"]
    return subprocess.Popen([*command, *map(str, text)], cwd=ROOT, stdout=subprocess.PIPE, **how)


def ran(*text):
    with lm(*text) as process:
        assert process.wait(PATIENCE) == 0, text


def open_to_others(folder, mask=0o077):
    """Files and folders on which others have a right, and how many there are."""
    every = [path for path in Path(folder).rglob("*") if not path.is_symlink()]
    wide = [path for path in every if path.lstat().st_mode & mask]
    return [str(path.relative_to(folder)) for path in wide], {path.name for path in every}


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """Places after patients, a monitoring run, a snapshot, scores and a live service."""
    place = tmp_path_factory.mktemp("used")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LM_HOME", str(place / "state"))
        patched.setenv("LM_REPORTS", str(place / "reports"))
        ran("simulate", "monica", "--patients", 20, "--quiet")
        rows = read_rows(load_study("monica")).tail(20)
        rows.drop(columns=["y"]).to_csv(place / "patients.csv", index=False)
        ran("predict", "monica", place / "patients.csv", "--output", place / "state" / "scores.csv")
        ran("snapshot", "monica")
        with lm("serve", "monica", "--port", 0) as service:
            assert b"served at" in service.stdout.readline()
            assert find_service(place / "state" / "monica")
            try:
                study = load_study("monica")
                row = rows.iloc[-1][["arrived", *study.feature_names]].to_dict()
                with connect("monica") as machine:
                    machine.receive(row | {"record_id": "new"}, now=row["arrived"])
                yield place
            finally:
                service.send_signal(signal.SIGTERM)


def test_nothing_that_the_commands_write_is_open_to_others(used):
    for part in ("state", "reports"):
        wide, names = open_to_others(used / part)
        assert not wide
        if part == "state":
            assert {"store.duckdb", "mlflow.db", "tokens.json", "service.json"} <= names
            assert {"scores.csv", "snapshots"} <= names
            assert [name for name in names if name.startswith("journal")]


def test_an_older_state_is_closed_at_the_next_start(used, tmp_path, monkeypatch):
    state = tmp_path / "older"
    subprocess.run(["cp", "-r", str(used / "state"), str(state)], check=True)
    outside = tmp_path / "outside"
    outside.write_text("not of the state")
    (state / "photos").mkdir()
    (state / "photos" / "beach.jpg").touch()
    (state / "monica" / "link").symlink_to(outside)
    subprocess.run(["chmod", "-R", "a+rwX", str(state), str(outside)], check=True)
    for secret in SECRETS:  # `check_private` speaks of those
        (state / "monica" / secret).chmod(0o600)
    monkeypatch.setenv("LM_HOME", str(state))
    ran("studies")
    wide = open_to_others(state)[0]
    assert set(wide) == {"photos", "photos/beach.jpg", "scores.csv"}  # Not in a study's folder
    assert stat.S_IMODE(outside.stat().st_mode) == 0o666


def test_the_umask_follows_the_place_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("LM_UMASK", raising=False)
    for mode, mask in {0o755: 0o077, 0o770: 0o077, 0o2770: 0o007, 0o2777: 0o077}.items():
        tmp_path.chmod(mode)
        assert private_umask(tmp_path) == mask, oct(mode)
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)  # As OpenShift starts a container
    for mode, mask in {0o755: 0o077, 0o775: 0o007, 0o777: 0o077}.items():
        tmp_path.chmod(mode)
        assert private_umask(tmp_path) == mask, oct(mode)
    for text, mask in {"077": 0o077, "0027": 0o027, "07": 0o007}.items():
        monkeypatch.setenv("LM_UMASK", text)
        assert private_umask(tmp_path) == mask
    for text in ("022", "777", "-1", "7", "0o77", "x", "7 7", "277"):
        monkeypatch.setenv("LM_UMASK", text)
        with pytest.raises(LMError, match=r"LM_UMASK = .* must be 077, 027 or 007"):
            private_umask(tmp_path)


def test_a_volume_of_a_group_stays_the_groups(tmp_path, monkeypatch):
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o2770)
    monkeypatch.setenv("LM_HOME", str(volume))
    ran("trigger", "monica", "--n", 1)
    assert not open_to_others(volume, 0o007)[0]
    assert (volume / "monica").stat().st_mode & 0o2070 == 0o2070
    assert (volume / "monica" / "store.duckdb").stat().st_mode & 0o777 == 0o660

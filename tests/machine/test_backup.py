"""A backup made while the machine runs can be restored, and ends with the same numbers."""

import io
import json
import resource
import sqlite3
import tarfile
import threading
import tracemalloc

import pandas as pd
import pyarrow as pa
import pytest
from support.ward import START, STUDY, patient

from lm.cli import cli
from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.connection import StoreLocked
from lm.data.ledger import NotWhole
from lm.data.store import Store
from lm.machine.backup import (
    MANIFEST,
    backup_file,
    check_backup,
    manifest_digest,
    read_backup,
    restore,
    write_backup,
)
from lm.machine.machine import Machine
from lm.model.registry import Registry
from lm.serve.app import background
from lm.serve.client import connect


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Home of a monica with a champion, and a backup of it made while patients came."""
    home = tmp_path_factory.mktemp("learned")
    study, file = load_study("monica"), home / "backups" / "monica-1.tar.zst"
    rows = read_rows(study)
    past = rows[rows["known_at"] <= study.first_model].tail(300)
    with Machine(study, home) as machine:
        machine.receive_many(past, source="history", on_arrival=True)
        machine.add_outcomes(past)
        machine.update(machine.monitor(study.first_model, fast=True))
        before, stop = machine.status()["counts"]["records"], threading.Event()
        some = rows[rows["known_at"] > study.first_model].head(300)
        some = [
            {k: row[k] for k in ("record_id", "arrived", *study.feature_names)}
            for row in some.to_dict("records")
        ]

        def come():
            for row in some:
                if stop.is_set():
                    return
                machine.receive(row)

        thread = threading.Thread(target=come)
        thread.start()
        with backup_file(file) as sink:
            about = machine.backup(sink, "Ada")
        stop.set()
        thread.join()
    assert about["counts"]["records"] >= before
    return home, file, about, some[-1]


@pytest.mark.slow
def test_it_ends_with_the_same_numbers(learned, tmp_path):
    home, file, about, row = learned
    done = restore(file, tmp_path / "home", tmp_path / "data", "Ada")
    assert done["aside"] == "" and (tmp_path / "data" / "monica" / "study.toml").is_file()
    with Machine("monica", home) as old, Machine("monica", tmp_path / "home") as new:
        assert new.verify() == []
        for table in ("records", "predictions", "explanations", "outcomes", "updates"):
            mine, theirs = old.table(table).head(about["counts"][table]), new.table(table)
            pd.testing.assert_frame_equal(mine, theirs)
        one, other = (
            {"record_id": "new"} | {k: v for k, v in row.items() if k != "record_id"},
        ) * 2
        assert old.receive(one) == new.receive(other)
        (note,) = new.store.audit.entries("restore")
        assert note["entry"] == about["audit"][0]
    folder = tmp_path / "home" / "monica"
    assert file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_state_that_is_there_is_replaced_with_a_word_only(learned, tmp_path):
    file = learned[1]
    restore(file, tmp_path, tmp_path / "data", "Ada")
    with pytest.raises(LMError, match="--replace"):
        restore(file, tmp_path, tmp_path / "data", "Ada")
    with (
        Store(load_study("monica"), tmp_path / "monica"),
        pytest.raises(StoreLocked),
    ):
        restore(file, tmp_path, tmp_path / "data", "Ada", replace=True)
    done = restore(file, tmp_path, tmp_path / "data", "Ada", replace=True)
    assert len(list(tmp_path.glob("monica.before-*"))) == 1 and "before" in done["aside"]
    assert not list(tmp_path.glob(".restore-*"))


def repacked(file, place, change):
    """An archive with other members: `change` gets (name, content) pairs."""
    with pa.OSFile(str(file)) as raw, pa.CompressedInputStream(raw, "zstd") as packed:
        plain = io.BytesIO(packed.read())
    with tarfile.open(fileobj=plain) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive.getmembers()]
    made = place / "changed.tar.zst"
    with (
        pa.OSFile(str(made), "wb") as raw,
        pa.CompressedOutputStream(raw, "zstd") as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for member, content in change(members):
            if member.name == MANIFEST:  # As one who changes it would
                about = json.loads(content)
                content = json.dumps(about | {"sha256": manifest_digest(about)}).encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made


def outside(members, name):
    """The manifest and a member name a file elsewhere."""
    about = json.loads(members[0][1])
    about["files"][name] = about["files"].pop("audit.head")
    for member, content in members:
        if member.name == "audit.head":
            member.name = name
        yield member, json.dumps(about).encode() if member.name == MANIFEST else content


def named(members, study):
    about = json.loads(members[0][1]) | {"study": study}
    return [(members[0][0], json.dumps(about).encode()), *members[1:]]


def later(members):
    about = json.loads(members[0][1]) | {"schema": 99, "lm": "9.0"}
    return [(members[0][0], json.dumps(about).encode()), *members[1:]]


def linked(members):
    for member, content in members:
        if member.name == "audit.head":
            member.type, member.linkname, content = tarfile.SYMTYPE, "/etc/passwd", b""
        yield member, content


def bomb(members):
    """A header that holds 512 MiB of zeros, in some 20 KB."""
    member = tarfile.TarInfo("audit.head")
    member.type = tarfile.XHDTYPE
    return [members[0], (member, bytes(2**29))]


def longer(members):
    return [(m, c + b"\0" * 10**7 if m.name == "audit.head" else c) for m, c in members]


CHANGES = {
    "outside": lambda members: outside(members, "../../evil"),
    "absolute": lambda members: outside(members, "/tmp/evil"),
    "beside": lambda members: outside(members, "state/../../evil"),
    "name": lambda members: named(members, "../evil"),
    "later": later,
    "link": linked,
    "longer": longer,
    "bomb": bomb,
    "edited": lambda members: [
        (m, c[:-1] + b"x" if m.name.endswith("outcomes.parquet") else c) for m, c in members
    ],
    "missing": lambda members: members[:-1],
    "headless": lambda members: members[1:],
    "twice": lambda members: [*members, members[-1]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_archive_that_was_changed_is_refused_and_nothing_is_touched(learned, tmp_path, change):
    made = repacked(learned[1], tmp_path, CHANGES[change])
    tracemalloc.start()
    with pytest.raises(LMError) as caught:
        restore(made, tmp_path / "home", tmp_path / "data", "Ada")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 64 * 2**20
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["changed.tar.zst", "home"]


@pytest.mark.parametrize("stored", [0, 0.3, 0.999, -1])
def test_an_archive_that_was_cut_is_refused(learned, tmp_path, stored):
    content = learned[1].read_bytes()
    cut = tmp_path / "cut.tar.zst"
    cut.write_bytes(content[: stored if stored == -1 else int(len(content) * stored)])
    with pytest.raises(LMError):
        check_backup(cut)


@pytest.mark.slow
def test_a_backup_of_a_running_service_by_the_command_line(learned, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    restore(learned[1], home, tmp_path / "data", "Ada")
    monkeypatch.setenv("LM_HOME", str(home))
    with Machine("monica", home) as machine, background(machine):
        assert cli.main(["backup", "monica"]) == 0
        with connect("monica") as client:
            log = client.table("audit")
    assert log["kind"].tolist().count("backup") == 1
    (file,) = (home / "backups").glob("monica-*.tar.zst")
    assert cli.main(["backup", "--verify", str(file)]) == 0
    assert cli.main(["backup", "monica", str(file)]) == 2  # It never overwrites
    (home / "monica" / "store.duckdb").unlink()
    capsys.readouterr()
    assert cli.main(["status", "monica"]) == 2
    output = capsys.readouterr().err
    assert "store.duckdb is missing" in output and f"restore {file}" in output
    assert cli.main(["audit", "monica", "--verify"]) == 1
    assert cli.main(["restore", str(file), "--replace"]) == 0
    assert cli.main(["audit", "monica", "--verify"]) == 0


def test_a_registry_that_lacks_a_version_or_is_anothers_is_refused(
    learned, tmp_path, monkeypatch, capsys
):
    restore(learned[1], tmp_path, tmp_path / "data", "Ada")
    monkeypatch.setenv("LM_HOME", str(tmp_path))
    registry = Registry("monica", tmp_path / "monica" / "registry")
    (model,) = registry.models.rglob("model.skops")
    model.rename(tmp_path / "aside")
    with pytest.raises(NotWhole, match="registry lacks the model of version 1"):
        Machine("monica", tmp_path)
    assert cli.main(["accept-loss", "monica", "--by", "Ada", "--reason", "the disk is gone"]) == 0
    with Machine("monica", tmp_path) as machine:
        assert machine.status()["champion"] is None
        assert machine.table("audit")["kind"].tolist().count("loss") == 1
    (tmp_path / "aside").rename(model)
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert any("version 1 is not what was registered" in fault for fault in registry.verify())
    with sqlite3.connect(registry.file) as base:
        base.execute("UPDATE experiment_tags SET value = 'other' WHERE key = 'lm.machine'")
    with pytest.raises(NotWhole, match="registry is of another machine"):
        Machine("monica", tmp_path)


def test_a_backup_of_a_store_alone(tmp_path):
    with Store(STUDY, tmp_path / "ward") as store:
        for k in range(5):
            store.records.append(patient(k, START), START)
        sink = io.BytesIO()
        about = write_backup(store, Registry("ward", tmp_path / "ward" / "registry"), sink)
    (tmp_path / "b").write_bytes(sink.getvalue())
    (tmp_path / "parts").mkdir()
    assert read_backup(tmp_path / "b", tmp_path / "parts") == about
    assert about["counts"]["records"] == 5


def test_a_disk_that_takes_no_more_leaves_no_file_that_passes_for_a_backup(tmp_path, monkeypatch):
    """Neither a half file nor the parts; the machine goes on, and the next backup is whole."""
    with Store(STUDY, tmp_path / "ward") as store:
        for k in range(5):
            store.records.append(patient(k, START), START)
        registry, file = Registry("ward", store.folder / "registry"), tmp_path / "out" / "b.tar.zst"
        for limit in (0, 512, 4096):
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                with pytest.raises(LMError) as caught, backup_file(file) as sink:
                    write_backup(store, registry, sink)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert "\n" not in str(caught.value)
            assert list(file.parent.glob("*")) == [] and not list(store.folder.glob(".backup-*"))
        with backup_file(file) as sink:
            about = write_backup(store, registry, sink)
        store.records.append(patient(5, START), START)
        assert about["counts"]["records"] == 5 and store.verify() == []

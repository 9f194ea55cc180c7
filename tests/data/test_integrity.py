"""A state of which a part is missing, cut, older or another's is refused, or nothing is lost.

A machine is made once and killed: some patients are in the tables, some in DuckDB's WAL, some in
the journal only. Each case damages one file of a copy and opens it again.
"""

import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.long import much
from support.paths import TESTS
from support.ward import START, STUDY, patient

from lm.core.errors import LMError
from lm.data.ledger import ANCHOR, Ledger, NotWhole
from lm.data.store import Store, examine

PARTS = ("store.duckdb", "store.duckdb.wal", "ledger", ANCHOR, "journal-000002.jsonl")
KILLED = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
import lm.data.engine as module
from lm.data.store import Store
from support.ward import START, STUDY, patient
module.CHECKPOINT_PAUSE = 1000
folder = Path(sys.argv[1])
with Store(STUDY, folder) as store:
    for k in range(4):
        store.records.append(patient(k, START), START)
store = Store(STUDY, folder)
for k in range(4, 8):
    store.records.append(patient(k, START), START)
store.audit.head()
store.audit.append("attempt", {{"what": "something"}}, "Ada")
for k in range(8, 12):
    store.records.append(patient(k, START), START)
os._exit(9)
"""
PATIENTS = 12


def killed(folder):
    """A state left by a process that was killed."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert done.returncode == 9
    assert {path.name for path in folder.iterdir()} > {*PARTS}
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return killed(tmp_path_factory.mktemp("made") / "ward")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return killed(tmp_path_factory.mktemp("other") / "ward")


def copied(made, place, verified=False):
    """A copy; the start does not see that it is one unless `verified`."""
    folder = Path(shutil.copytree(made, place / "ward", dirs_exist_ok=True))
    if not verified:
        ledger = Ledger(folder)
        ledger.begin(ledger.read())
        ledger.close()
    return folder


def state(folder):
    """Counts of a state that opens, or None where it is refused with one sentence."""
    try:
        with Store(STUDY, folder) as store:
            counts = store.status.counts()
            return counts["records"], len(store.queries.table("records")), counts["audit"]
    except LMError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return None


def whole(folder):
    """Whether a start loses nothing: the same patients, or a refusal, and verification agrees."""
    opened = state(folder)
    if opened is not None:
        assert opened[:2] == (PATIENTS, PATIENTS)
    return opened


def test_a_killed_machine_opens_with_all_that_was_acknowledged(made, tmp_path):
    folder = copied(made, tmp_path)
    assert whole(folder) is not None and examine(STUDY, folder) == []


def test_a_copy_is_verified_once(made, tmp_path):
    folder = copied(made, tmp_path, verified=True)
    assert whole(folder) is not None
    assert Ledger(folder).read()["inode"] == (folder / "ledger").stat().st_ino


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stored", [None, 0, 0.5, -1, "line"])
def test_a_part_that_is_missing_or_cut(made, tmp_path, part, stored):
    folder = copied(made, tmp_path)
    path, content = folder / part, (folder / part).read_bytes()
    path.unlink()
    if stored == "line":
        path.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
    elif stored is not None:
        path.write_bytes(content[: int(len(content) * stored) if stored in (0, 0.5) else stored])
    faults = examine(STUDY, folder)
    opened = whole(folder)
    assert opened is not None or faults, "refused, and --verify finds nothing"
    if stored is None:
        assert opened is None and faults
        with pytest.raises(NotWhole, match="lm accept-loss ward"):
            Store(STUDY, folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_machine(made, other, tmp_path, part):
    folder = copied(made, tmp_path)
    shutil.copy(other / part, folder / part)
    assert examine(STUDY, folder) != []
    assert whole(folder) is None


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(part=st.sampled_from(PARTS), place=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit(made, tmp_path_factory, part, place, bit):
    folder = copied(made, tmp_path_factory.mktemp("flip"))
    content = bytearray((folder / part).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    (folder / part).write_bytes(content)
    whole(folder)


@pytest.mark.parametrize("part", PARTS)
def test_an_older_copy_of_one_part(made, tmp_path, part):
    folder = copied(made, tmp_path)
    with Store(STUDY, folder) as store:
        for k in range(PATIENTS, PATIENTS + 4):
            store.records.append(patient(k, START), START)
    if not (folder / part).exists():
        return  # It was closed: WAL and journal have nothing to hold
    shutil.copy(made / part, folder / part)
    assert state(folder) is None


def test_a_new_machine_needs_no_word_and_a_lost_one_does(made, tmp_path):
    with Store(STUDY, tmp_path / "new") as store:
        assert store.status.counts()["records"] == 0
    Store(STUDY, tmp_path / "new").close()
    folder = copied(made, tmp_path)
    for part in PARTS:
        (folder / part).unlink()
    (folder / "snapshots" / "a.parquet").write_bytes(b"")
    with pytest.raises(NotWhole, match=r"store\.duckdb is missing beside snapshots/a\.parquet"):
        Store(STUDY, folder)


def test_a_named_person_goes_on_without_what_is_missing(made, tmp_path):
    folder = copied(made, tmp_path)
    (folder / "journal-000002.jsonl").unlink()
    with Store(STUDY, folder, {"by": "Ada", "reason": "the disk is gone"}) as store:
        assert store.status.counts()["records"] == 8 and store.verify() == []
        (loss,) = store.audit.entries("loss")
        log = store.queries.table("audit")
        store.records.append(patient(20, START), START)
    assert log.loc[log["kind"] == "loss", "actor"].tolist() == ["Ada"]
    assert "line 12 was acknowledged" in loss["faults"][0]
    with Store(STUDY, folder) as store:
        assert store.status.counts()["records"] == 9 and store.verify() == []


def test_a_part_that_goes_while_the_machine_runs_is_seen_by_verify(made, tmp_path):
    for part in ("ledger", ANCHOR):
        folder = copied(made, tmp_path / part)
        with Store(STUDY, folder) as store:
            assert store.verify() == []
            (folder / part).rename(folder / "aside")
            assert any(part in fault for fault in store.verify())
            (folder / "aside").rename(folder / part)


@pytest.mark.slow
@settings(max_examples=much(12, 300), deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_copy_of_a_living_folder_is_whole_or_refused(tmp_path_factory, seed):
    """As `cp -r`, rsync and tar make it: file by file, in any order, while the machine writes."""
    rng, place = random.Random(seed), tmp_path_factory.mktemp("living")
    copy, sent = place / "copy" / "ward", 0
    copy.mkdir(parents=True)
    with Store(STUDY, place / "ward") as store:

        def work():
            nonlocal sent
            for _ in range(rng.randrange(3)):
                store.records.append(patient(sent, START), START)
                sent += 1
            if rng.random() < 0.4:
                store.audit.head()  # The journal moves into the tables, and its file goes

        work()
        store.records.append(patient(900, START), START)
        before = sent + 1
        names = sorted(path.name for path in store.folder.iterdir() if path.is_file())
        for name in rng.sample(names, len(names)):
            with suppress(FileNotFoundError):
                shutil.copy(store.folder / name, copy / name)
            work()
        assert store.verify() == []
    with Store(STUDY, place / "ward") as store:
        assert store.status.counts()["records"] == sent + 1
    try:
        with Store(STUDY, copy) as store:
            assert store.status.counts()["records"] >= before and store.verify() == []
    except LMError as error:
        assert "\n" not in str(error)

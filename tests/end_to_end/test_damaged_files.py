"""Each file of a state in turn: deleted, cut, flipped, older or another machine's.

A whole machine is made once, with patients, outcomes, two models, tokens and a key, and copied for
each case: closed, or as a kill leaves it. A start has all that was acknowledged, or is refused
with one sentence that names the part; verification finds the same.
"""

import itertools
import re
import shutil
import sqlite3
from types import SimpleNamespace

import pytest
from support.long import LONG

import lm.data.engine as engine
import lm.data.memory_index as memory_index
from lm.cli import cli
from lm.core.errors import LMError
from lm.core.pseudonyms import Pseudonyms
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.connection import StoreLocked
from lm.data.ledger import Ledger, NotWhole
from lm.data.store import examine
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.model.registry import Registry
from lm.serve.auth import Tokens, token_table

MONICA = load_study("monica")
ROWS = read_rows(MONICA)
PAST = ROWS[ROWS["known_at"] <= MONICA.first_model].tail(120)
NAMES = ["record_id", "arrived", *MONICA.feature_names]
NEW = ROWS[ROWS["known_at"] > MONICA.first_model].head(12)[NAMES].to_dict("records")
VERSION = "registry/models/monica/{}/artifacts/model/{}"


def begin(home, registry=None):
    """A closed machine with a champion, and its folder; the models of another where given."""
    folder = home / "monica"
    if registry is not None:
        shutil.copytree(registry, folder / "registry")
        with sqlite3.connect(folder / "registry" / "mlflow.db") as base:
            base.execute("DELETE FROM experiment_tags")
    with Machine(MONICA, home, {"by": "Ada", "reason": "made so"} if registry else None) as machine:
        machine.receive_many(PAST, source="history", on_arrival=True)
        machine.add_outcomes(PAST)
        snap = machine.snapshot()
        if registry is None:
            machine.registry.register(fit(MONICA, PAST, "logistic"), {}, {}, snap, "made")
        machine.promote(1, "tested", machine.plan.approvers[0])
        for row in NEW[:4]:
            machine.receive(row)
        Tokens(folder).create("Ada", "admin")
        machine.note("attempt", {"what": "token create"}, "Ada")
    return folder


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Folders: closed, as a kill leaves them, and those of another machine."""
    place, patched = tmp_path_factory.mktemp("states"), pytest.MonkeyPatch()
    patched.setattr(engine, "CHECKPOINT_PAUSE", 1000)  # What waits in the journal stays there
    patched.setattr(memory_index, "MANY_NAMES", 50)  # Names are stored in files
    made = {"closed": place / "closed", "other": place / "other"}
    first = begin(place / "home")
    shutil.copytree(first, made["closed"])
    shutil.copytree(begin(place / "home 2", first / "registry"), made["other"])
    with Machine(MONICA, place / "home") as machine:
        for row in NEW[4:8]:
            machine.receive(row)
        machine.store.audit.head()  # The journal moves into the tables, and so into the WAL
        machine.registry.register(fit(MONICA, PAST, "logistic", C=0.1), {}, {}, {}, "made")
        machine.promote(2, "tested", machine.plan.approvers[0])
        Tokens(first).create("Bob", "viewer")
        machine.note("attempt", {"what": "token create"}, "Ada")
        for row in NEW[8:]:
            machine.receive(row)
        machine.registry.settle()
        made["killed"] = place / "killed"
        shutil.copytree(first, made["killed"])
    yield SimpleNamespace(**made, runs=runs(first))
    patched.undo()


def runs(folder):
    """Version -> MLflow's run."""
    registry = Registry("monica", folder / "registry")
    return {version: registry.run_id(version) for version in registry.numbers()}


PARTS = {  # Name -> the file, and what a refusal calls it
    "database": ("store.duckdb", r"store\.duckdb"),
    "wal": ("store.duckdb.wal", r"store\.duckdb"),
    "journal": ("journal-*.jsonl", "journal"),
    "anchor": ("audit.head", r"audit\.head"),
    "ledger": ("ledger", "ledger"),
    "names": ("records.names.npy", "names"),
    "registry": ("registry/mlflow.db", "registry"),
    "champion": ("champion", "version|registry"),
    "description": ("description", "version"),
    "key": ("pseudonyms.key", r"pseudonyms\.key"),
    "tokens": ("tokens.json", r"tokens\.json"),
    "snapshot": ("snapshot", "snapshot"),
}
DAMAGES = ("deleted", "half", "empty", "flipped", "older", "other", "folder")
IN_USE = ("wal", "journal")  # What a machine that was closed does not have
UNSEEN = {  # The state is whole all the same, and no fault has to be reported
    *(("names", damage) for damage in DAMAGES),
    *(("ledger", damage) for damage in ("half", "flipped")),  # It has two places
    *(
        ("registry", "flipped"),
        ("database", "flipped"),
        ("database", "older"),
        ("anchor", "older"),
        ("key", "older"),
    ),
    *(("description", "older"), ("champion", "older"), ("snapshot", "older")),
    *(("snapshot", "other"), ("champion", "other"), ("description", "other")),  # The same content
}


def located(states, folder, part, ended):
    """The path of a part."""
    name, champion = PARTS[part][0], states.runs[2 if ended == "killed" else 1]
    if part == "snapshot":
        return next(folder.glob("snapshots/*.parquet"))
    if part in ("champion", "description"):
        file = {"champion": "model.skops", "description": "MLmodel"}[part]
        return folder / VERSION.format(champion, file)
    return next(folder.glob(name))


def damage(states, folder, part, how, ended):
    """Damage one file of a copy."""
    path = located(states, folder, part, ended)
    content, name = path.read_bytes(), path.relative_to(folder)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    before = {"older": states.closed, "other": states.other}.get(how, folder) / name
    if not before.exists():
        pytest.skip("there was none")
    after = {"half": content[: len(content) // 2], "empty": b"", "flipped": bytes(flipped)}
    after |= dict.fromkeys(("older", "other"), before.read_bytes())
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how in after:
        path.write_bytes(after[how])
        path.chmod(0o600)


def copied(folder, home):
    """A copy that the start does not take for one: its files are still the machine's own."""
    made = shutil.copytree(folder, home / "monica")
    ledger = Ledger(made)
    ledger.begin(ledger.read())
    ledger.close()
    return made


def content(home):
    """All that a machine has, and what its verification finds."""
    with Machine(MONICA, home) as machine:
        counts, folder = machine.status()["counts"], home / "monica"
        stored = {name: counts[name] for name in ("records", "predictions", "outcomes", "updates")}
        stored |= {"ids": machine.table("records")["record_id"].tolist()}
        stored |= {"champion": machine.status()["champion"], "models": machine.registry.numbers()}
        stored |= {"tokens": token_table(Tokens(folder))["name"].tolist()}
        return stored | {"pseudonym": Pseudonyms(folder).of("p1")}, machine.verify()


@pytest.fixture(scope="module")
def whole(states, tmp_path_factory):
    """What undamaged copies hold."""
    held = {}
    for ended in ("closed", "killed"):
        home = tmp_path_factory.mktemp(ended)
        copied(getattr(states, ended), home)
        held[ended], faults = content(home)
        assert faults == [] and held[ended]["records"] == {"closed": 124, "killed": 132}[ended]
    return held


SHORT = {  # Of each part what is likeliest, and what is hardest to see
    "database": {"deleted-killed", "half-closed", "older-killed", "other-closed"},
    "wal": {"deleted-killed", "half-killed"},
    "journal": {"deleted-killed", "half-killed", "flipped-killed"},
    "anchor": {"deleted-closed", "half-killed"},
    "ledger": {"deleted-killed", "half-closed"},
    "names": {"half-killed", "older-killed", "other-closed"},
    "registry": {"deleted-closed", "half-killed", "older-killed"},
    "champion": {"flipped-killed"},
    "description": {"flipped-closed"},
    "key": {"deleted-killed", "other-closed"},
    "tokens": {"older-killed", "empty-closed"},
    "snapshot": {"deleted-closed", "flipped-killed"},
}


def cases():
    """Each part with each damage, after a kill and after a close; some where tests are short."""
    for part, how, ended in itertools.product(PARTS, DAMAGES, ("killed", "closed")):
        none = ended == "closed" and (part in IN_USE or how == "older")  # It is the older copy
        if not none and (LONG or f"{how}-{ended}" in SHORT[part]):
            yield pytest.param(part, how, ended, id=f"{part}-{how}-{ended}")


@pytest.mark.parametrize("part, how, ended", list(cases()))
def test_nothing_is_lost_without_a_sentence(states, whole, tmp_path, part, how, ended):
    folder = copied(getattr(states, ended), tmp_path)
    damage(states, folder, part, how, ended)
    try:
        held, faults = content(tmp_path)
    except LMError as error:
        sentence = str(error)
        assert "\n" not in sentence and re.search(PARTS[part][1], sentence)
        if part not in ("registry", "champion"):  # `lm audit --verify` prints the refusal too
            assert examine(MONICA, folder), "refused, and verification finds nothing"
        assert isinstance(error, NotWhole) or how == "folder", sentence
        return
    assert held == whole[ended], "opened with less than was acknowledged"
    assert faults or (part, how) in UNSEEN, "opened, and verification finds nothing"


LOSSES = [("wal", "deleted"), ("wal", "half"), ("journal", "deleted"), ("journal", "half")]
LOSSES += [("registry", "deleted")]
LOSSES += [("registry", "half"), ("champion", "flipped"), ("key", "deleted"), ("tokens", "older")]
LOSES = {"wal": r"loses 4 of 128 records", "journal": r"loses \d entries of the journal"}
LOSES |= {"registry": "", "champion": "model versions 2", "key": "", "tokens": ""}


def stated_lost(states, sentence, whole):
    """How many patients are gone, as the sentence says, held against what was counted before."""
    if match := re.search(r"loses (\d+) of (\d+) records", sentence):
        waiting = sum(text.count(b'"records":{') for text in waited(states))
        assert int(match[2]) == whole["records"] - waiting
        return int(match[1])
    match = re.search(r"loses (\d+) entries of the journal", sentence)
    lines = [line for text in waited(states) for line in text.splitlines()[1:]]
    last = lines[len(lines) - int(match[1]) :] if match else []
    return sum(b'"records":{' in line for line in last)


def waited(states):
    """The journal of the machine that was killed."""
    return [path.read_bytes() for path in sorted(states.killed.glob("journal-*.jsonl"))]


@pytest.mark.parametrize("part, how", LOSSES)
def test_a_loss_is_counted_before_it_is_accepted_and_the_machine_goes_on(
    states, whole, tmp_path, monkeypatch, capsys, part, how
):
    folder = copied(states.killed, tmp_path)
    damage(states, folder, part, how, "killed")
    monkeypatch.setenv("LM_HOME", str(tmp_path))
    with pytest.raises(NotWhole) as refused:
        Machine(MONICA, tmp_path)
    assert re.search(LOSES[part], str(refused.value))
    gone = stated_lost(states, str(refused.value), whole["killed"])
    assert cli.main(["audit", "monica", "--verify"]) == 1
    assert cli.main(["accept-loss", "monica", "--by", "Ada", "--reason", "the disk is gone"]) == 0
    assert cli.main(["audit", "monica", "--verify"]) == 0, capsys.readouterr().out
    with Machine(MONICA, tmp_path) as machine:
        assert machine.status()["counts"]["records"] == whole["killed"]["records"] - gone
        assert (gone > 0) is (part in IN_USE)
        model = fit(MONICA, PAST, "logistic", C=0.2)
        version = machine.registry.register(model, {}, {}, {}, "made after the loss")
        assert version == 3  # No number of a model that is gone comes again
        machine.promote(version, "tested", machine.plan.approvers[0])
    with Machine(MONICA, tmp_path) as machine:
        assert machine.status()["champion"] == 3 and machine.verify() == []


def test_two_owners_of_one_folder(states, tmp_path, monkeypatch):
    """Also by a link, by a relative path, and where the lock file was deleted meanwhile."""
    copied(states.closed, tmp_path / "home")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "monica").symlink_to(tmp_path / "home" / "monica")
    monkeypatch.chdir(tmp_path)
    with Machine(MONICA, tmp_path / "link"):
        for home in ("home", "link", "apart", "./link/../home"):
            with pytest.raises(StoreLocked, match="is open in this process"):
                Machine(MONICA, type(tmp_path)(home))
        (tmp_path / "home" / "monica" / "store.lock").unlink()
        with pytest.raises(StoreLocked):
            Machine(MONICA, tmp_path / "home")
    with Machine(MONICA, tmp_path / "apart") as machine:
        assert machine.status()["counts"]["records"] == 124 and machine.verify() == []


def test_a_home_and_a_study_that_are_links_are_themselves(states, tmp_path):
    folder = copied(states.killed, tmp_path / "real")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "monica").symlink_to(folder)
    held, faults = content(tmp_path / "home")
    assert faults == [] and held["records"] == 132


def test_a_file_that_became_a_link_to_itself_is_still_there(states, whole, tmp_path):
    for part in ("journal", "anchor", "registry", "key", "tokens"):
        folder = copied(states.killed, tmp_path / part)
        path = located(states, folder, part, "killed")
        path.rename(tmp_path / part / "elsewhere")
        path.symlink_to(tmp_path / part / "elsewhere")
        assert content(tmp_path / part) == (whole["killed"], [])

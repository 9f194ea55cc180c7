"""Make a small state with the code of an earlier commit; run it with that commit's lm on the path.

git archive COMMIT lm | tar -x -C /tmp/old
cd tests/data/states; PYTHONPATH=/tmp/old python make_state.py state_before.tar.xz NEW.tar.xz

It opens the older state `ward`, so that it is migrated, brings five patients, of whom three stay in
the journal, and ends without closing, as after a kill."""

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import lm.store as module
from lm.study import load_study

from lm.machine import Machine


def main(before: str, made: str) -> None:
    """Read one archive, write another."""
    module.CHECKPOINT_PAUSE = 1000
    place = Path(tempfile.mkdtemp())
    with tarfile.open(before) as archive:
        archive.extractall(place, filter="data")
    study = load_study(place / "ward")
    machine = Machine(study, place / "home")
    row = machine.known().iloc[-1]
    row = {name: row[name] for name in study.feature_names}
    expected = json.loads((place / "expected.json").read_text())
    for k in range(5):
        new = row | {"record_id": f"later-{k}", "arrived": "2020-03-20"}
        expected["risks"][f"later-{k}"] = machine.receive(new)["risk"]
        if k == 1:
            machine.store.head()
    expected["records"] += 5
    model, snapshot = machine.registry.load(machine.registry.numbers()[-1]), machine.snapshot()
    machine.registry.register(model, {}, {}, snapshot, "again, with the tags of that commit")
    (place / "expected.json").write_text(json.dumps(expected))
    with tarfile.open(made, "w:xz") as archive:
        for part in ("home", "ward", "expected.json"):
            archive.add(place / part, part)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The libraries beside us: what can be checked without their environments."""

import ast
import json
import re
import runpy
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pandas as pd
import peers
import pytest

NAMES = ["bentoml", "evidently", "frouros", "mlflow", "mlserver", "nannyml", "river"]
SCRIPTS = sorted(peers.SCRIPTS.glob("*.py"))
PIN = re.compile(r"[a-z0-9][a-z0-9._-]*==[^ ;*]+( ; .+)?")


@pytest.fixture
def contract(monkeypatch):
    """The shared module, loaded as its scripts load it: with their folder first on the path."""
    monkeypatch.setattr(sys, "path", [str(peers.SCRIPTS), *sys.path])
    spec = spec_from_file_location("contract", peers.SCRIPTS / "contract.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_library_has_pins_and_a_script():
    assert peers.names() == NAMES
    assert set(NAMES) <= {path.stem.removeprefix("serving_") for path in SCRIPTS}


@pytest.mark.parametrize("name", NAMES)
def test_every_requirement_is_pinned_and_the_licence_is_reported(name):
    text = (peers.SCRIPTS / f"{name}.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in pins if not PIN.fullmatch(line)] == []
    version = next(line for line in pins if line.startswith(f"{name}==")).split("==")[1]
    head = text.splitlines()[0]
    assert version in head and re.search(r"released in \w+ 20\d\d", head)
    assert re.search(r"Licence: (Apache 2\.0|BSD 3-clause)\.", head)
    # Alibi-detect is under the Business Source Licence, deepchecks under the AGPL
    assert not re.search(
        r"^(alibi|deepchecks|seldon|nvidia(?!-ml-py)|learning-machine)", text, re.M
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_compile_and_see_nothing_of_ours_unless_they_say_so(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
    ours = {name for name in modules if name and name.split(".")[0] == "lm"}
    assert not ours or path.name.startswith("ours_")


def test_unknown_name_gets_one_sentence():
    command = [sys.executable, "tools/peers.py", "make", "river", "alibi"]
    run = subprocess.run(command, cwd=peers.ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip() == (
        f"there is no library 'alibi' to build: choose from {', '.join(NAMES)}"
    )


def test_without_uv_one_sentence(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="uv is not here"):
        peers.uv()


def test_build_runs_once_and_again_only_for_new_pins(tmp_path, monkeypatch):
    scripts, made = tmp_path / "scripts", tmp_path / "made"
    scripts.mkdir()
    (made / "x").mkdir(parents=True)
    (scripts / "x.txt").write_text("x==1\n")
    calls = []
    for name, value in {"ROOT": tmp_path, "SCRIPTS": scripts, "PEERS": made}.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **rest: calls.append(command))
    peers.make()
    peers.make("x")
    assert len(calls) == 2 and "--no-deps" in calls[1]
    (scripts / "x.txt").write_text("x==2\n")
    peers.make("x")
    assert len(calls) == 4


def test_the_scripts_folder_does_not_hide_the_libraries(contract):
    assert sys.path[-1] == str(peers.SCRIPTS) and sys.path.count(str(peers.SCRIPTS)) == 1


def test_batches_never_see_ahead(contract):
    seen = list(contract.batches(260, 50, 100))
    assert seen == [(slice(0, 50), 150), (slice(50, 100), 200), (slice(100, 150), 250)]
    assert list(contract.batches(49, 50)) == [] and list(contract.batches(50, 50, 250)) == []


def test_codes_keep_missing_and_put_new_levels_last(contract):
    columns = {"numbers": ["age"], "levels": ["size"]}
    reference = {"size": np.array(["b", "a", None], dtype=object)}
    values = {"age": np.array([1.0, np.nan]), "risk": np.array([0.1, 0.2])}
    table = values | {"size": np.array(["unk", None], dtype=object)}
    codes = contract.coded(table, reference, columns)
    assert codes["size"][0] == 2 and np.isnan(codes["size"][1]) and np.isnan(codes["age"][1])


def test_errors_of_unknown_outcomes_are_missing(contract):
    table = {"y": np.array([1.0, 0.0, np.nan]), "risk": np.array([0.4, 0.4, 0.4])}
    assert contract.errors(table, wrong=False)[:2] == pytest.approx([0.6, 0.4])
    assert contract.errors(table, wrong=True)[:2].tolist() == [1.0, 0.0]
    assert np.isnan(contract.errors(table, wrong=True)[2])


def test_online_detectors_alarm_when_the_outcome_is_known(contract, monkeypatch):
    monkeypatch.setitem(sys.modules, "contract", contract)
    online = runpy.run_path(str(peers.SCRIPTS / "online.py"))
    reference = {"y": np.zeros(3), "risk": np.zeros(3)}
    watch = online["on_outcomes"]("d", list, lambda d, value: value > 0.5, reference, 2, False)
    stream = {"y": np.array([0.0, 1.0, np.nan, 1.0, 1.0]), "risk": np.zeros(5)}
    assert watch(stream) == {"d": [4]}  # y of the second is known once the fourth has arrived


def test_contract_writes_every_detector_and_stream(contract, tmp_path, monkeypatch):
    (tmp_path / "streams").mkdir()
    frame = pd.DataFrame({"age": [1.0, 2.0], "risk": [0.1, 0.2], "y": [0.0, np.nan]})
    for place in ("reference", "streams/a", "streams/b", "streams/c", "streams/d"):
        frame.to_parquet(tmp_path / f"{place}.parquet")
    columns = {"numbers": ["age"], "levels": [], "delay": 1}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    out = tmp_path / "out.json"
    command = ["x", str(tmp_path), "--streams", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    watchers = {"w": lambda stream: {"d": [len(stream["age"])]}}
    contract.main(["numpy"], {"d": "features"}, lambda reference, columns, batch: watchers)
    payload = json.loads(out.read_text())
    assert payload["detectors"] == {"d": {"kind": "features", "alarms": {"a": [2], "c": [2]}}}
    assert payload["versions"]["numpy"] == np.__version__ and payload["seconds"]["per stream"] >= 0

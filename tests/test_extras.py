"""A plain installation is small: what needs more says which extra to install."""

import importlib.metadata
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {  # Extra -> what only that extra (or another one of these) installs
    "serve": ("fastapi", "starlette", "uvicorn", "httptools", "uvloop", "prometheus_client"),
    "ui": ("ipywidgets", "jupyterlab", "voila", "plotly"),
    "broker": ("redis",),
    "onnx": ("onnx", "onnxruntime"),
    "report": ("evidently",),
}
SHARED = ("httpx",)  # In two extras

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
from lm.core.errors import LMError
"""


def without(hidden, code, home):
    """What a process prints in which some libraries cannot be imported."""
    variables = {"LM_HOME": str(home), "LM_REPORTS": str(home / "reports"), "OMP_NUM_THREADS": "1"}
    script = HIDE.format(hidden=set(hidden)) + code
    command = [sys.executable, "-W", "error::UserWarning:lm", "-c", script]
    how = {"capture_output": True, "text": True, "cwd": home, "env": os.environ | variables}
    ran = subprocess.run(command, **how)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def needed(lines):
    """Every distribution that these requirements bring."""
    libraries, wanted = set(), [Requirement(line) for line in lines]
    while wanted:
        one = wanted.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in libraries:
            continue
        libraries.add((name, extras))
        for need in map(Requirement, importlib.metadata.requires(name) or ()):
            if not need.marker or any(need.marker.evaluate({"extra": e}) for e in {"", *extras}):
                wanted.append(need)
    return {name for name, _ in libraries}


def modules_beyond_the_base():
    """Top-level modules of this environment that a plain installation lacks."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    base = needed(parser["DEFAULT"]["requirements"].split())
    modules = importlib.metadata.packages_distributions()
    return {
        module
        for module, owners in modules.items()
        if not base & set(map(canonicalize_name, owners)) and module != "lm"
    }


def refusal(call):
    """Code that prints the error of a call, and nothing where there is none."""
    return f"try:\n    {call}\nexcept LMError as error:\n    print(error)\n"


ENTRIES = {  # Extra -> code that needs it
    "serve": "import lm.serve.app",
    "ui": "import lm.ui.theme",
    "broker": "from lm.serve.streams import open_redis; open_redis()",
    "onnx": "from lm.model.onnx import Portable; Portable(b'')",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_what_needs_an_extra_says_what_to_install(name, tmp_path):
    printed = without(LIBRARIES[name], refusal(ENTRIES[name]), tmp_path)
    assert printed.count("\n") == 1 and printed.startswith("the library ")
    assert f"pip install 'learning-machine[{name}]'" in printed
    present = without((), refusal(ENTRIES[name]), tmp_path)
    assert "pip install" not in present


def test_a_client_of_a_service_needs_the_extra_serve(tmp_path):
    code = refusal("from lm.serve.client import Client; Client('http://127.0.0.1:9')")
    assert "learning-machine[serve]" in without(SHARED, code, tmp_path)


@pytest.mark.slow
def test_a_drift_report_that_is_not_drawn_says_what_to_install(tmp_path):
    code = """if True:
        import pathlib, warnings
        from lm.core.study import load_study
        from lm.core.study_rows import read_rows
        from lm.monitor.verdict import evidently_report
        study = load_study("monica")
        rows = read_rows(study)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = evidently_report(study, rows, rows, pathlib.Path("report.html"))
        print(made, caught[-1].message)"""
    printed = without(LIBRARIES["report"], code, tmp_path)
    assert printed.startswith("None ") and "learning-machine[report]" in printed


@pytest.mark.slow
def test_a_machine_works_with_the_base_dependencies_alone(tmp_path):
    hidden = modules_beyond_the_base()
    assert hidden > {"fastcore", "redis", "onnx", "plotly", "voila", "evidently", "pytest"}
    code = """if True:
        import lm
        from lm.core.study import load_study
        from lm.core.study_rows import read_rows
        study = load_study("monica")
        rows = read_rows(study)
        outcomes = ["record_id", "y", "event", "followed_until", "known_at"]
        fields = ["record_id", "arrived", *study.feature_names]
        with lm.connect("monica") as machine:
            old = rows[rows["arrived"] < study.first_model]
            machine.receive_many(old[fields], on_arrival=True)
            machine.add_outcomes(old[[name for name in outcomes if name in old]])
            update = machine.update(machine.monitor())
            answer = machine.receive(rows[fields].iloc[-1].to_dict())
            verdict = machine.monitor()
        print(update["action"], 0 < answer["risk"] < 1, verdict["action"])"""
    action, predicted, verdict = without(hidden, code, tmp_path).split(maxsplit=2)
    assert (action, predicted) == ("first", "True") and verdict.strip()

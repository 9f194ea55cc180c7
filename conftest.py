"""Every test has a machine of its own: an empty LM_HOME and LM_REPORTS in a temporary folder.

The pipelines and lessons, which nbval runs cell by cell in kernels of their own, share one machine
instead, on which a small simulation has run: see `prepare`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
PREPARE = ("simulate", "monica", "--patients", "600")  # What `lm` does before nbval's notebooks


def use(folder):
    """The variables of a machine that lives in `folder`."""
    return {"LM_HOME": str(folder / "state"), "LM_REPORTS": str(folder / "reports")}


def pytest_configure(config):
    config.shared = Path(tempfile.mkdtemp(prefix="lm-tests-"))
    os.environ.update(use(config.shared), DO_NOT_TRACK="1", MLFLOW_DISABLE_TELEMETRY="true")
    os.environ.pop("LM_DATA", None)


def pytest_unconfigure(config):
    shutil.rmtree(config.shared, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """nbdev_clean removes execution counts; nbval takes a cell without one for never run."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.cell.execution_count = 1


def pytest_collection_finish(session):
    notebooks = any(item.path.suffix == ".ipynb" for item in session.items)
    if notebooks and not session.config.option.collectonly:
        prepare()


def prepare():
    """Fill the machine that the pipelines and lessons share; nothing else is prepared for them."""
    command = [sys.executable, "-m", "lm.cli", *PREPARE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.exit(f"lm {' '.join(PREPARE)} failed: {done.stderr[-2000:]}", returncode=1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """LM_HOME of this test alone, empty."""
    for name, value in use(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "state"

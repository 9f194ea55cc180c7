"""The package passes the type checker that pyproject.toml configures."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_type_checker_finds_nothing():
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / "build" / "mypy")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

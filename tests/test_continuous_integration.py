"""What runs at each commit, at each push and every week exists and calls what is here."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERBS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def loaded(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check_command(text):
    """Its file or its verb of the Makefile is here."""
    if text[0] == "make":
        assert text[1] in VERBS
    for word in text:
        if word.startswith((".ci/", "tools/", "tests/")):
            assert (ROOT / word).exists(), word


def test_hooks_call_what_is_here():
    (repository,) = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # They need no network
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert {"export", "ruff-check", "ruff-format", "notebooks"} <= set(hooks)
    for hook in hooks.values():
        check_command(shlex.split(hook["entry"]))
        re.compile(hook.get("files", ""))


def test_the_documentation_is_built_by_the_verb_of_everybody():
    (job,) = loaded(ROOT / ".github" / "workflows" / "docs.yml")["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    check_command(shlex.split(command))


@pytest.mark.parametrize(
    "path", [path for path in WORKFLOWS if path.stem != "docs"], ids=lambda path: path.stem
)
def test_workflows_call_the_same_script_as_everybody(path):
    (job,) = loaded(path)["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    for command in commands:
        check_command(shlex.split(command))
    assert commands[-1].endswith(".ci/run") and job["env"]["PYTHON"].startswith("python")
    assert loaded(path)["permissions"] == {"contents": "read"}


def test_every_python_that_is_promised_is_tested():
    (job,) = loaded(ROOT / ".github" / "workflows" / "test.yml")["jobs"].values()
    badge = re.search(r"badge/python-([^-]+)-blue", (ROOT / "README.md").read_text())[1]
    assert job["strategy"]["matrix"]["python"] == re.findall(r"3\.\d+", badge)
    assert any("schedule" in (loaded(path).get(True) or {}) for path in WORKFLOWS)

"""JSON schemas of the files that people write: they follow the structs, and editors use them."""

import json
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import schemas

SHIPPED = sorted(path for path in ROOT.glob("data/*/*.toml"))


def checker(name):
    """A validator of one schema."""
    from jsonschema import Draft202012Validator

    schema = json.loads((schemas.FOLDER / name).read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_schemas_are_those_of_the_structs():
    for name, text in schemas.schemas().items():
        stored = (schemas.FOLDER / name).read_text(encoding="utf-8")
        assert stored == text, "run make schemas"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_file_names_its_schema_and_keeps_it(path):
    text = path.read_text(encoding="utf-8")
    line = text.splitlines()[0]
    assert line.startswith("#:schema ")
    assert (path.parent / line.removeprefix("#:schema ")).resolve().is_file()
    document = json.loads(json.dumps(tomllib.loads(text), default=str))
    assert not [e.message for e in checker(f"{path.stem}.json").iter_errors(document)]


def test_a_schema_rejects_what_the_file_would_reject():
    plan = checker("plan.json")
    assert not list(plan.iter_errors({"protocol": {"margin": 0.1}}))
    assert list(plan.iter_errors({"protocol": {"margin": 0.3}}))
    assert list(plan.iter_errors({"protocol": {"margins": 0.1}}))
    assert list(plan.iter_errors({"modifications": {"automatic": ["retrain"]}}))
    study = checker("study.json")
    assert list(study.iter_errors({"title": "A ward"}))
    assert not list(study.iter_errors({"title": "A ward", "extends": "../ward"}))
    assert list(study.iter_errors({"extends": "../ward", "threshold": [0.1]}))


def test_a_plan_that_the_package_writes_names_its_schema():
    from lm.update.change_control import DEFAULT_PLAN

    assert DEFAULT_PLAN.startswith("#:schema ../../lm/assets/schemas/plan.json\n")

"""Hygiene: what holds for every notebook of a kind, and for lm/ as their export."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
FORBIDDEN = {
    "a path": re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|var|Users)/\w"),
    "this folder": re.compile("|".join(map(re.escape, {str(ROOT), tempfile.gettempdir() + "/"}))),
    "a memory address": re.compile(r"\b0x[0-9a-f]{6,}\b"),
    "a host": re.compile(r"(?:127\.0\.0\.1|localhost):\d+"),
    "a clock time": re.compile(r"\b\d\d:\d\d:\d\d[.,]\d{3,}"),
}


def folder_of(path):
    """The folder of nbs/ in which a notebook lies: "nbs" for the map."""
    inside = path.relative_to(ROOT / "nbs").parts
    return inside[0] if len(inside) > 1 else "nbs"


def kind(*names):
    """Parametrise over the notebooks in these folders of nbs/."""
    results = [p for p in NOTEBOOKS if folder_of(p) in names]
    ids = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in results]
    return pytest.mark.parametrize("path", results, ids=ids)


def cells(path, cell_type="code"):
    """Cells of one type, `text` joined."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["text"] = "".join(cell["source"])
    return [cell for cell in notebook["cells"] if cell["cell_type"] == cell_type]


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def printed(output):
    """Everything a reader sees of one output, scripts and images left out."""
    data = output.get("data", {})
    texts = [data.get(k, "") for k in ("text/plain", "text/html", "text/markdown")]
    return "".join("".join(text) for text in [*texts, output.get("text", "")])


everywhere = kind("nbs", "library", "pipelines", "dashboards", "lessons", "benchmarks")


IMPORTS = {ast.Import, ast.ImportFrom, ast.If}  # `if TYPE_CHECKING:`


def longest(text):
    """How many lines a cell may have: one class with its constants may have 90, imports 60."""
    code = "\n".join(line for line in text.splitlines() if not line.startswith(("%", "!")))
    try:
        body = ast.parse(code).body
    except SyntaxError:  # Markdown
        return 40
    kinds = Counter(type(node) for node in body)
    if {ast.Import, ast.ImportFrom} & kinds.keys() and kinds.keys() <= IMPORTS:
        return 60
    constants = kinds.keys() - {ast.ClassDef} <= {ast.Assign, ast.AnnAssign}
    return 90 if kinds[ast.ClassDef] == 1 and constants else 40


@everywhere
def test_cells_and_files_are_small(path):
    for cell in (*cells(path), *cells(path, "markdown")):
        assert len(lines(cell["text"])) <= longest(cell["text"]), cell["id"]
    assert path.stat().st_size < 250_000


@everywhere
def test_no_output_is_an_error(path):
    kinds = [output["output_type"] for cell in cells(path) for output in cell["outputs"]]
    assert "error" not in kinds


@kind("pipelines", "benchmarks")
def test_there_is_one_parameters_cell_of_literals_and_it_comes_first(path):
    code = cells(path)
    tagged = [i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == [0]
    for statement in ast.parse(code[0]["text"]).body:
        assert isinstance(statement, ast.AnnAssign)
        ast.literal_eval(statement.value)


@kind("pipelines", "dashboards", "benchmarks")
def test_nothing_is_stored(path):
    assert all(not cell["outputs"] for cell in cells(path))
    assert all(cell["execution_count"] is None for cell in cells(path))
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]


@kind("dashboards")
def test_a_dashboard_is_a_doorbell(path):
    code = cells(path)
    assert len(code) + len(cells(path, "markdown")) <= 4
    assert sum(len(lines(cell["text"])) for cell in code) <= 25


@kind("library", "lessons")
@pytest.mark.parametrize("what", FORBIDDEN)
def test_stored_outputs_hold_nothing_of_the_machine_they_ran_on(path, what):
    for cell in cells(path):
        for output in cell["outputs"]:
            match = FORBIDDEN[what].search(printed(output))
            assert not match, f"{what} in cell {cell['id']}: {match}"


def imports(text):
    """Modules of lm that this code imports, or names in one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm."):
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("lm."))


def module_of(path):
    """The module that a library notebook makes, and its place: folder and number each."""
    parts = path.relative_to(ROOT / "nbs" / "library").with_suffix("").parts
    numbers, names = zip(*(part.split("_", 1) for part in parts), strict=True)
    return "lm." + ".".join(names), numbers


PLACES = dict(module_of(p) for p in NOTEBOOKS if folder_of(p) == "library")


@kind("library")
def test_a_module_imports_only_from_lower_numbers(path):
    module, place = module_of(path)
    for cell in cells(path):
        for name in imports(cell["text"]):
            parts = name.split(".")
            below = [".".join(parts[:n]) for n in range(len(parts), 1, -1)]
            result = next((each for each in below if each in PLACES), None)
            assert result, f"{name} has no notebook"
            assert PLACES[result] < place, f"{result} is not below {module}"


@kind("library")
def test_exported_definitions_say_what_they_do(path):
    exported = [c["text"] for c in cells(path) if re.match(r"#\|\s*export\b", c["text"])]
    for text in exported:
        for node in ast.parse(text).body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public or isinstance(node, ast.ClassDef):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_every_module_has_a_notebook_and_every_notebook_a_module():
    lm = ROOT / "lm"
    made = [p.relative_to(ROOT).with_suffix("") for p in lm.rglob("*.py") if p.stem[0] != "_"]
    assert {".".join(p.parts) for p in made if "assets" not in p.parts} == set(PLACES)


def test_no_tracked_file_is_larger_than_a_megabyte():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert not [p.name for p in tracked if p.is_file() and p.stat().st_size > 1_000_000]


def contents(folder):
    """Every notebook and module below `folder`, by relative path."""
    results = [*folder.glob("nbs/**/*.ipynb"), *folder.glob("lm/**/*.py")]
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in results}


@pytest.mark.slow
def test_export_and_clean_would_change_nothing(tmp_path):
    leave = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    for name in ("nbs", "lm", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    before = contents(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    command = [sys.executable, tmp_path / "tools" / "notebooks.py", "export"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = contents(tmp_path)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    assert not changed, f"run `make export`: {', '.join(changed)}"


@pytest.mark.parametrize("verb", [("check",), ("format", "--check")], ids=["check", "format"])
def test_ruff_finds_nothing(verb):
    command = [sys.executable, "-m", "ruff", *verb, "--quiet", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""Measure the rhythm of the notebooks and the length of the sentences.

python tools/style.py   print the table that `make style` shows
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import glossary

ROOT = Path(__file__).resolve().parents[1]
NEAR = 3  # Code cells after a definition in which it must be run
FLOORS = {  # What tests/test_style.py holds; raise them, never lower them. Aims: 85 and 80
    "definitions run within three cells, %": 88,
    "demonstrations that assert, %": 88,
}
CEILINGS = {
    "public names of several modules": 0,
    "longest function, lines": 40,
    "sentences of README.md, median words": 15,
    "sentences of README.md, longest": 30,
    "sentences of the lessons, median words": 15,
    "sentences of the lessons, longest": 30,
    "methods of the largest class": 20,
}


def notebooks() -> list[Path]:
    """Those of the library, in reading order."""
    paths = (ROOT / "nbs" / "library").rglob("*.ipynb")
    return sorted(path for path in paths if ".ipynb_checkpoints" not in path.parts)


def cells(path: Path, kind: str = "code") -> list[str]:
    """Sources of the cells of one kind."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def parsed(text: str) -> ast.Module:
    """The code of a cell, without lines for IPython."""
    plain = "\n".join(line for line in text.splitlines() if not line.startswith(("%", "!")))
    return ast.parse(plain)


def exported(text: str) -> bool:
    """Whether a cell becomes part of the package."""
    return re.match(r"#\|\s*export\b", text) is not None


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a cell."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


def used(tree: ast.Module) -> set[str]:
    """Names and attributes that a cell mentions."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def rhythm() -> Counter:
    """Definitions and those run soon; demonstrations and those that assert; longest function."""
    count: Counter = Counter()
    for path in notebooks():
        trees = [(exported(text), parsed(text)) for text in cells(path)]
        for k, (public, tree) in enumerate(trees):
            if public:
                near = [other for own, other in trees[k + 1 :] if not own][:NEAR]
                names = set().union(*map(used, near))
                for node in definitions(tree):
                    count["definitions"] += 1
                    count["run"] += node.name in names
                for node in ast.walk(tree):
                    if isinstance(node, ast.FunctionDef):
                        lines = (node.end_lineno or 0) - node.lineno + 1
                        count["longest"] = max(count["longest"], lines)
            elif any(not isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
                count["demonstrations"] += 1
                count["asserting"] += any(isinstance(n, ast.Assert) for n in ast.walk(tree))
    return count


def names() -> Counter:
    """How many modules export each public name."""
    counter: Counter = Counter()
    for path in (ROOT / "lm").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_list = isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
            if is_list and getattr(node.targets[0], "id", "") == "__all__":
                counter.update(set(ast.literal_eval(node.value)))
    return counter


def sentences(text: str) -> list[int]:
    """Words of each sentence of a Markdown text, without code, tables and headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", " ", text, flags=re.S)
    prose = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!\[|- \*\*|>)", line)]
    parts = re.split(r"(?<=[.!?:])\s+(?=[A-Z*`\[])|\n\s*\n|\n\s*[-\d]+[.)]?\s", "\n".join(prose))
    return [len(tokens) for part in parts if len(tokens := re.findall(r"\w[\w'’-]*", part)) > 2]


def lengths(paths: Iterable[Path]) -> list[int]:
    """Words of each sentence of the notebooks' prose."""
    texts = (text for path in paths for text in cells(path, "markdown"))
    return [length for text in texts for length in sentences(text)]


def largest_class() -> tuple[str, int]:
    """Class with the most methods, patched ones included."""
    count: Counter = Counter()
    for path in (ROOT / "lm").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                count[node.name] += sum(isinstance(n, ast.FunctionDef) for n in node.body)
            elif isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Name) and d.id == "patch" for d in node.decorator_list
            ):
                owner = node.args.args[0].annotation
                count[getattr(owner, "id", "?")] += 1
    return max(count.items(), key=lambda item: item[1])


def measured() -> dict[str, Any]:
    """The table."""
    count, exports = rhythm(), names()
    readme = sentences((ROOT / "README.md").read_text(encoding="utf-8"))
    prose, lessons = (lengths(paths) for paths in (notebooks(), ROOT.glob("nbs/lessons/*.ipynb")))
    owner, methods = largest_class()
    lines = [len(path.read_text().splitlines()) for path in (ROOT / "lm").rglob("*.py")]
    return {
        "modules": len(notebooks()),
        "lines of lm/": sum(lines),
        "public names": len(exports),
        "public names of several modules": sum(n > 1 for n in exports.values()),
        "methods of the largest class": methods,
        "largest class": owner,
        "definitions run within three cells, %": round(100 * count["run"] / count["definitions"]),
        "demonstrations that assert, %": round(100 * count["asserting"] / count["demonstrations"]),
        "longest function, lines": count["longest"],
        "sentences of README.md, median words": median(readme),
        "sentences of README.md, longest": max(readme),
        "sentences of the library, median words": median(prose),
        "sentences of the library, longest": max(prose),
        "sentences of the lessons, median words": median(lessons),
        "sentences of the lessons, longest": max(lessons),
        "words to avoid (tools/glossary.py)": sum(glossary.counts().values()),
    }


if __name__ == "__main__":
    table = measured()
    width = max(map(len, table))
    print(*(f"{name:<{width}}  {value}" for name, value in table.items()), sep="\n")

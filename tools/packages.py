"""Draw which package of `lm` imports from which, and list the modules in the map.

python tools/packages.py         print every import of a module by another
python tools/packages.py write   draw them into nbs/packages.svg, list modules in nbs/index.ipynb
"""

import ast
import json
import re
import sys
from collections import Counter
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "nbs" / "packages.svg"
MAP = ROOT / "nbs" / "index.ipynb"
WIDE, LINE, NAMES, STEP = 1010, 15, 460, 44  # Pixels: all, a line, the names, a column


def places() -> dict[str, tuple[str, ...]]:
    """Module -> numbers of its folders and its notebook; a higher place may import a lower one."""
    numbers_of = {}
    for path in (ROOT / "nbs" / "library").rglob("*.ipynb"):
        parts = path.relative_to(ROOT / "nbs" / "library").with_suffix("").parts
        if ".ipynb_checkpoints" not in parts:
            numbers, names = zip(*(part.split("_", 1) for part in parts), strict=True)
            numbers_of["lm." + ".".join(names)] = numbers
    return dict(sorted(numbers_of.items(), key=lambda item: item[1]))


def imported(module: str, known: dict[str, tuple[str, ...]]) -> set[str]:
    """Modules that a module imports, also inside functions."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            up = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            names = [base, *(f"{base}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        modules |= {name for name in names if name in known and name != module}
    return modules


def arrows() -> list[tuple[str, str]]:
    """Every import of a module by another."""
    known = places()
    return [(one, other) for one in known for other in sorted(imported(one, known))]


def package(module: str) -> str:
    """lm.ui.charts.model -> ui"""
    return module.split(".")[1]


def text(x: float, y: float, labels: str, more: str = "") -> str:
    """A line of text in the picture."""
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(labels)}</text>'


def drawing() -> str:
    """Packages from the command down to the core, with modules, and counts of their imports."""
    rooms: dict[str, list[str]] = {}
    for module in places():
        rooms.setdefault(package(module), []).append(module.split(".", 2)[2])
    order = list(rooms)[::-1]
    counts = Counter((package(a), package(b)) for a, b in arrows())
    middle = 'text-anchor="middle"'
    parts = [text(NAMES + STEP / 2, 20, "imports from", 'class="pale"')]
    for k, name in enumerate(order[1:]):
        parts.append(text(NAMES + STEP * (k + 0.5) + 40, 40, name, f'{middle} class="small"'))
    y = 52
    for name in order:
        lines = wrap(", ".join(rooms[name]), 58)
        height = LINE * max(len(lines), 1) + 12
        parts.append(f'<rect x="8" y="{y}" width="{WIDE - 16}" height="{height - 2}"/>')
        parts.append(text(18, y + 18, name, 'class="name"'))
        parts += [text(96, y + 18 + LINE * k, line) for k, line in enumerate(lines)]
        for k, other in enumerate(order[1:]):
            if count := counts[name, other] if name != other else 0:
                x, size = NAMES + STEP * (k + 0.5) + 40, min(13, 4 + 2 * count**0.5)
                at = y + height / 2 - 1
                parts.append(f'<circle cx="{x:g}" cy="{at:g}" r="{size:.1f}"/>')
                parts.append(text(x, at + 4, str(count), f'{middle} class="count"'))
        y += height
    style = (
        "text{font:12px sans-serif;fill:#222}.name{font-weight:bold}.small{font-size:10px}"
        ".pale{fill:#666;font-size:10px}.count{font-size:10px}rect{fill:#f3f5f7}circle{fill:#b9d3ea}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {y + 6}" role="img">'
    ground = f'<path d="M0 0h{WIDE}v{y + 6}H0z" fill="#fff"/>'
    return "\n".join([head, f"<style>{style}</style>", ground, *parts, "</svg>", ""])


def purpose(path: Path) -> str:
    """What a notebook does: the sentence below its title, else the question that it answers."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    head = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    blocks = [" ".join(block.split()) for block in head.split("\n\n")[1:]]
    first = next((block for block in blocks if not block.startswith("#|")), "")
    return re.split(r"(?<=[.?])\s", first.removeprefix("> "))[0].replace("|", "\\|")


def listing(name: str) -> str:
    """The modules of a package as a table of the map."""
    lines = ["| notebook | module | what it does |", "|---|---|---|"]
    for path in sorted((ROOT / "nbs" / "library").glob(f"[0-9][0-9]_{name}/**/[0-9]*.ipynb")):
        parts = [part.split("_", 1)[1] for part in path.relative_to(MAP.parent / "library").parts]
        module = ".".join(["lm", *parts]).removesuffix(".ipynb")
        title = parts[-1].removesuffix(".ipynb").replace("_", " ")
        lines.append(
            f"| [{title}]({path.relative_to(MAP.parent)}) | `{module}` | {purpose(path)} |"
        )
    return "\n".join(lines)


def mapped() -> str:
    """The map with the modules of today: a cell `index-NAME` for each package."""
    notebook = json.loads(MAP.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and "| module |" in text:
            head = text[: text.index("| notebook |")]
            table = listing(cell["id"].removeprefix("index-"))
            cell["source"] = (head + table).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        PICTURE.write_text(drawing(), encoding="utf-8")
        MAP.write_text(mapped(), encoding="utf-8")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        print(*(f"{one} -> {other}" for one, other in arrows()), sep="\n")

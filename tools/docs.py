"""Build the documentation: notebooks and pages as HTML in _docs, with the links between them.

python tools/docs.py [FOLDER]
"""

import os
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode, v4

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
OUTSIDE = ("http://", "https://", "mailto:", "attachment:", "data:")
START = (
    '<meta http-equiv="refresh" content="0; url=nbs/index.html"><a href="nbs/index.html">Start</a>'
)


def sources() -> list[Path]:
    """Notebooks and pages that the documentation shows."""
    notebooks = (ROOT / "nbs").rglob("*.ipynb")
    shown = [path for path in notebooks if ".ipynb_checkpoints" not in path.parts]
    return sorted([*shown, *ROOT.glob("*.md"), *ROOT.glob("reports/**/*.md")])


def links(path: Path) -> list[str]:
    """Targets of the relative links in the prose of a notebook or page."""
    matches = [match for cell in prose(read(path)) for match in LINK.finditer(cell.source)]
    return [match[2] for match in matches if not match[2].startswith(OUTSIDE)]


def prose(notebook: NotebookNode) -> list[NotebookNode]:
    """Markdown cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def read(path: Path) -> NotebookNode:
    """A notebook, or a page as a notebook of one cell."""
    if path.suffix == ".ipynb":
        return nbformat.read(path, as_version=4)
    return v4.new_notebook(cells=[v4.new_markdown_cell(path.read_text(encoding="utf-8"))])


def linked(path: Path, target: str, shown: set[Path], git_url: str) -> str:
    """Where a link of a page leads in the documentation."""
    if target.startswith(OUTSIDE):
        return target
    place = Path(os.path.normpath(path.parent / target))
    if place in shown:
        return str(Path(target).with_suffix(".html"))
    if place.suffix in (".svg", ".png"):
        return target
    return f"{git_url}/blob/main/{place.relative_to(ROOT).as_posix()}"


def build(folder: Path, paths: list[Path]) -> list[Path]:
    """Write the pages of some sources below `folder`; the files."""
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    git_url, shown = config["DEFAULT"]["git_url"], set(sources())
    exporter, made = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True), []
    for path in paths:
        notebook = read(path)
        for cell in prose(notebook):
            cell.source = LINK.sub(
                lambda m, path=path: (
                    f"{m[1]}{linked(path, m[2], shown, git_url)}{m[3] or ''}{m[4]}"
                ),
                cell.source,
            )
        page = folder / path.relative_to(ROOT).with_suffix(".html")
        page.parent.mkdir(parents=True, exist_ok=True)
        body, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        page.write_text(body, encoding="utf-8")
        made.append(page)
    for picture in [*ROOT.glob("nbs/*.svg"), *ROOT.glob("reports/**/*.png")]:
        copy = folder / picture.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, copy)
    first = f'<meta http-equiv="refresh" content="0; url={START}"><a href="{START}">Start</a>'
    (folder / "index.html").write_text(first, encoding="utf-8")
    return made


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve()
    print(f"{len(build(place, sources()))} pages in {place}")

"""The documentation builds, and its links lead somewhere."""

import os
import re

import docs
import pytest

SOURCES = docs.sources()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(docs.ROOT)))
def test_every_relative_link_leads_to_a_file(path):
    dead = [target for target in docs.links(path) if not (path.parent / target).exists()]
    assert not dead


@pytest.mark.slow
def test_pages_link_to_pages(tmp_path):
    paths = [docs.ROOT / "README.md", docs.ROOT / "nbs" / "index.ipynb"]
    made = docs.build(tmp_path, paths)
    assert [page.relative_to(tmp_path).as_posix() for page in made] == [
        "README.html",
        "nbs/index.html",
    ]
    known = {os.path.normpath(path.with_suffix(".html")) for path in SOURCES}
    for page, path in zip(made, paths, strict=True):
        targets = re.findall(r'href="([^"#:]+\.html)"', page.read_text(encoding="utf-8"))
        assert targets and {os.path.normpath(path.parent / target) for target in targets} <= known
    assert 'href="nbs/index.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")

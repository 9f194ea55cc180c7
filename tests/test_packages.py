"""The packages of `lm`: imports go down, and the drawing shows them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import packages


@pytest.mark.slow
def test_no_module_imports_from_a_higher_place():
    place = packages.places()
    results = [(one, other) for one, other in packages.arrows() if place[other] >= place[one]]
    assert len(place) > 60 and not results


def test_the_drawing_is_that_of_today():
    text = "run python tools/packages.py write"
    assert packages.PICTURE.read_text(encoding="utf-8") == packages.drawing(), text


def test_the_map_lists_the_modules_of_today():
    assert packages.MAP.read_text(encoding="utf-8") == packages.mapped(), "run make export"


def test_an_upward_import_would_be_detected(tmp_path, monkeypatch):
    known = {"lm.core.a": ("00", "00"), "lm.data.b": ("20", "00")}
    (tmp_path / "lm" / "core").mkdir(parents=True)
    (tmp_path / "lm" / "core" / "a.py").write_text("def f():\n    from ..data import b\n")
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    assert packages.imported("lm.core.a", known) == {"lm.data.b"}

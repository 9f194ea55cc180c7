"""The rhythm of the notebooks does not decay, and its measure measures."""

import ast

import pytest
import style


@pytest.fixture(scope="module")
def table():
    return style.measured()


@pytest.mark.slow
@pytest.mark.parametrize("name", style.FLOORS)
def test_no_lower_than_the_floor(table, name):
    assert table[name] >= style.FLOORS[name]


@pytest.mark.parametrize("name", style.CEILINGS)
def test_no_higher_than_the_ceiling(table, name):
    assert table[name] <= style.CEILINGS[name]


def test_a_definition_counts_as_run_where_a_near_cell_names_it(tmp_path, monkeypatch):
    def code(*lines):
        return "\n".join(lines)

    made = [
        code("#| export", "def near():", "    pass"),
        "assert near() is None",
        code("#| export", "def far():", "    pass"),
        "1",
        "2",
        "3",
        "far()",
        "import os",
    ]
    monkeypatch.setattr(style, "notebooks", lambda: ["one"])
    monkeypatch.setattr(style, "cells", lambda path: made)
    count = style.rhythm()
    assert (count["definitions"], count["run"]) == (2, 1)
    assert (count["demonstrations"], count["asserting"]) == (5, 1)


TEXT = """# Heading

One two three. Four five
six seven.

| a | b c d |

```sh
lm x y z
```

- eight nine ten
- eleven twelve thirteen
"""


def test_sentences_are_counted_without_code_tables_and_headings():
    assert style.sentences(TEXT) == [3, 4, 3, 3]


def test_the_largest_class_stays_small():
    owner, methods = style.largest_class()
    assert owner and 10 < methods <= 20  # Patched methods count
    assert style.exported("#| export\nx = 1") and not style.exported("x = 1")
    assert style.used(ast.parse("a.b(c)")) == {"a", "b", "c"}

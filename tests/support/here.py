"""Benchmarks run cell by cell in the process of the tests: a kernel costs five seconds each."""

import ast
import json
from pathlib import Path

from lm.jobs.notebook_runner import check_parameters


def run_here(notebook, parameters):
    """The record that a notebook with these parameters ends with.

    Raises `LMError` for an unknown parameter, and whatever a cell raises."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names, where = {"__name__": "__main__", "display": print}, Path(notebook).stem
    exec(code[0], names)
    names |= check_parameters(notebook, parameters)
    for number, cell in enumerate(code[1:-1], 2):
        exec(compile(cell, f"{where}, code cell {number}", "exec"), names)
    *body, last = ast.parse(code[-1]).body
    exec(compile(ast.Module(body, []), f"{where}, last cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), f"{where}, record", "eval"), names)

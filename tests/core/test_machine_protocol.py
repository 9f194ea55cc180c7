"""The machine in process and the client over HTTP fulfil one protocol."""

import inspect

import pytest

from lm.core.protocol import LearningMachine, unfulfilled
from lm.machine.machine import Machine
from lm.serve.client import Client


@pytest.mark.parametrize("kind", [Machine, Client])
def test_both_sides_fulfil_the_protocol(kind):
    assert unfulfilled(kind, LearningMachine) == []


def test_the_protocol_names_every_method_that_both_sides_share():
    public = [{n for n in dir(kind) if not n.startswith("_")} for kind in (Machine, Client)]
    shared = {n for n in public[0] & public[1] if inspect.isfunction(getattr(Machine, n))}
    assert shared - set(dir(LearningMachine)) == {"grant", "submit_result"}  # Of jobs


@pytest.mark.parametrize(
    ("method", "finding"),
    [
        (lambda self, row, now=None: None, "receive lacks source"),
        (lambda self, row, source="", now=None: None, "receive takes row, source, now in another"),
        (lambda self, row, now=None, source="?": None, "receive has other defaults for source"),
        (lambda self, row, by, now=None, source="": None, "receive has other defaults for by"),
        (None, "receive is missing"),
    ],
)
def test_a_method_that_differs_is_named(method, finding):
    own = {n: v for n, v in vars(LearningMachine).items() if callable(v)}
    methods = {n: getattr(LearningMachine, n) for n in dir(LearningMachine) if n[0] != "_"} | own
    methods["receive"] = method
    if method is None:
        del methods["receive"]
    other = type("Other", (), {n: f for n, f in methods.items() if inspect.isfunction(f)})
    assert any(line.startswith(finding) for line in unfulfilled(other, LearningMachine))


def test_more_parameters_are_fine_if_they_are_optional():
    def receive(self, row, now=None, source="", by=""):
        """One more parameter."""

    other = type("Other", (Machine,), {"receive": receive})
    assert unfulfilled(other, LearningMachine) == []

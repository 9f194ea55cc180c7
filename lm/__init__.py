"""A clinical prediction system that stays right after it is deployed."""

__version__ = "0.2.0"

from typing import Any


def connect(
    study: str,  # Its name
    **options: Any,  # Of `lm.serve.client.connect`
) -> Any:  # A client where the study is being served, else the machine in this process
    """The learning machine of a study, wherever it runs: `lm.serve.client.connect`."""
    from lm.serve.client import connect as find

    return find(study, **options)


def load_model(
    name: str,  # "monica@champion", "monica@3" or "monica": the champion
    **options: Any,  # Of `lm.model.onnx.load_model`: form="onnx" for the language-neutral file
) -> Any:  # A `RiskModel`, or a `Portable`
    """A registered model for use in any program: `lm.model.onnx.load_model`."""
    from lm.model.onnx import load_model as load

    return load(name, **options)

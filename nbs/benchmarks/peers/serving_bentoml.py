"""Serve FOLDER/FORM.joblib with BentoML, with one worker.

.peers/bentoml/bin/python nbs/benchmarks/peers/serving_bentoml.py FOLDER PORT pipeline|encoded
"""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
import joblib
import numpy as np
import pandas as pd


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Risk:
    """Both forms of the model, of which one is asked."""

    def __init__(self) -> None:
        """Read the model."""
        self.model = joblib.load(os.environ["SERVED"])

    @bentoml.api
    def pipeline(self, rows: list[dict[str, Any]]) -> list[float]:
        """Risks of patients."""
        return self.model.predict_proba(pd.DataFrame(rows))[:, 1].tolist()

    @bentoml.api
    def encoded(self, rows: list[list[float]]) -> list[float]:
        """Risks of patients whose features are numbers already."""
        return self.model.predict_proba(np.array(rows))[:, 1].tolist()


if __name__ == "__main__":
    folder, port, form = sys.argv[1:4]
    os.environ |= {"SERVED": f"{folder}/{form}.joblib", "BENTOML_DO_NOT_TRACK": "True"}
    here = Path(__file__)
    arguments = ["serve", f"{here.stem}:Risk", "--working-dir", str(here.parent), "--port", port]
    command = str(Path(sys.executable).parent / "bentoml")
    os.execv(command, [command, *arguments, "--host", "127.0.0.1"])

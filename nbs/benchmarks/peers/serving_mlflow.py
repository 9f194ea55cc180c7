"""Serve FOLDER/FORM.joblib as `mlflow models serve` does, with one worker.

    .peers/mlflow/bin/python nbs/benchmarks/peers/serving_mlflow.py FOLDER PORT pipeline|encoded

No signature is stored with the model and no access log is written, which saves work. PORT 0
only saves the model as MLflow stores it.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import joblib
import mlflow.sklearn


def main(folder: Path, port: str, form: str) -> None:
    """Save the model, and become its server."""
    place, needs = folder / f"mlflow-{form}", [f"scikit-learn=={version('scikit-learn')}"]
    how = {"pyfunc_predict_fn": "predict_proba", "serialization_format": "cloudpickle"}
    if not place.exists():
        model = joblib.load(folder / f"{form}.joblib")
        mlflow.sklearn.save_model(model, place, pip_requirements=needs, **how)
    if port == "0":
        return
    arguments = ["models", "serve", "-m", str(place), "-h", "127.0.0.1", "-p", port]
    arguments += ["--workers", "1", "--env-manager", "local"]
    os.environ["UVICORN_ACCESS_LOG"] = "0"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4])

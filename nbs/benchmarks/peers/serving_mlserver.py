"""Serve FOLDER/FORM.joblib with MLServer and its scikit-learn runtime, in one process.

.peers/mlserver/bin/python nbs/benchmarks/peers/serving_mlserver.py FOLDER PORT pipeline|encoded
"""

import json
import os
import sys
from pathlib import Path


def main(folder: Path, port: int, form: str) -> None:
    """Write its two files of settings, and become its server."""
    place = folder / f"mlserver-{form}"
    place.mkdir(exist_ok=True)
    ports = {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    server = {"debug": False, "parallel_workers": 0, "host": "127.0.0.1"} | ports
    model = {"name": "model", "implementation": "mlserver_sklearn.SKLearnModel"}
    model["parameters"] = {"uri": str(folder / f"{form}.joblib"), "version": "1"}
    (place / "settings.json").write_text(json.dumps(server))
    (place / "model-settings.json").write_text(json.dumps(model))
    command = str(Path(sys.executable).parent / "mlserver")
    os.execv(command, [command, "start", str(place)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

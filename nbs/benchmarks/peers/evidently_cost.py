"""What one look costs with Evidently: DataDriftPreset once, with its defaults, on all columns.

    .peers/evidently/bin/python nbs/benchmarks/peers/evidently_cost.py REFERENCE CURRENT

Both are Parquet files. Prints one line of JSON: seconds to import, to read both files and to run
(the report included), the highest resident memory of the process in MB after each, and how many
columns drifted.
"""

import json
import sys
import time
import warnings

start = time.perf_counter()
from memory import peak_mb  # isort: skip  # Before the folder leaves the path

import contract  # Takes this folder off the path and turns telemetry off
import pandas as pd
from evidently import Report
from evidently.presets import DataDriftPreset

warnings.simplefilter("ignore")


def main(reference: str, current: str) -> None:
    """Read, run, print."""
    imported, import_mb = time.perf_counter(), peak_mb()
    known, now = pd.read_parquet(reference), pd.read_parquet(current)
    read, read_mb = time.perf_counter(), peak_mb()
    run = Report([DataDriftPreset()]).run(now, known)
    report = {
        "evidently": contract.version("evidently"),
        "rows": [len(known), len(now)],
        "columns": known.shape[1],
        "import_seconds": imported - start,
        "read_seconds": read - imported,
        "run_seconds": time.perf_counter() - read,
        "import_mb": import_mb,
        "read_mb": read_mb,
        "peak_mb": peak_mb(),
        "drifted": run.dict()["metrics"][0]["value"]["count"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

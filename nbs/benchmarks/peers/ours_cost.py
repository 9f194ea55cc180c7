"""One look of lm at a Parquet file, in a process of its own: prints seconds and peak memory.

python ours_cost.py keep REFERENCE.parquet KEPT.json
python ours_cost.py look CURRENT.parquet KEPT.json
"""

import argparse
import json
import time
from pathlib import Path

began = time.perf_counter()
import pyarrow.parquet as pq
from memory import peak_mb

from lm.monitor.covariate_shift import compare_windows
from lm.monitor.sketch import (
    Column,
    number_column,
    sketch_from_json,
    sketch_parquet,
    sketch_to_json,
)

imported = time.perf_counter() - began


def columns_of(path, rows):
    """Bins from the first rows of a Parquet file: words where there is text, else numbers."""
    found, file = [], pq.ParquetFile(path)
    for name in file.schema_arrow.names:
        batch = next(file.iter_batches(rows, columns=[name])).column(0)
        values = batch.to_pandas()
        if values.dtype.kind == "f" or values.dtype.kind in "iu":
            found.append(number_column(name, values.to_numpy(float)))
        else:
            found.append(Column(name, "level", tuple(sorted(values.dropna().unique())), exact=True))
    return found


def report(began, sketch, **more):
    """One line of JSON: seconds, peak memory, and how much was read."""
    found = {"import_seconds": imported, "seconds": time.perf_counter() - began}
    found["peak_mb"] = peak_mb()
    found |= {"rows": sketch.patients, "columns": len(sketch.columns)}
    print(json.dumps(found | more))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("step", choices=["keep", "look"], help="keep a reference, or look")
    arguments.add_argument("table", type=Path, help="Parquet, of then or of now")
    arguments.add_argument("kept", type=Path, help="the reference's sketch as JSON")
    arguments.add_argument("--rows", type=int, default=100_000, help="that fix the bins")
    arguments.add_argument("--memory", default="200MB", help="for DuckDB")
    args = arguments.parse_args()
    began = time.perf_counter()
    if args.step == "keep":
        columns = columns_of(args.table, args.rows)
        then = sketch_parquet(columns, args.table, 2, args.memory)
        args.kept.write_text(sketch_to_json(then))
        return report(began, then)
    then = sketch_from_json(args.kept.read_text())
    now = sketch_parquet(then.columns, args.table, 2, args.memory)
    counted = time.perf_counter()
    table = compare_windows(then, now, threshold=1e-6)
    tests = time.perf_counter() - counted
    report(began, now, moved=int(table["moved"].sum()), tests_seconds=tests)


if __name__ == "__main__":
    main()

"""One look of lm at a Parquet file, in a process of its own: prints seconds and peak memory.

python ours_cost.py count REFERENCE.parquet SKETCH.json
python ours_cost.py compare CURRENT.parquet SKETCH.json
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
    columns, file = [], pq.ParquetFile(path)
    for name in file.schema_arrow.names:
        batch = next(file.iter_batches(rows, columns=[name])).column(0)
        values = batch.to_pandas()
        if values.dtype.kind == "f" or values.dtype.kind in "iu":
            columns.append(number_column(name, values.to_numpy(float)))
        else:
            levels = tuple(sorted(values.dropna().unique()))
            columns.append(Column(name, "level", levels, exact=True))
    return columns


def report(began, sketch, **more):
    """One line of JSON: seconds, peak memory, and how much was read."""
    fields = {"import_seconds": imported, "seconds": time.perf_counter() - began}
    fields["peak_mb"] = peak_mb()
    fields |= {"rows": sketch.patients, "columns": len(sketch.columns)}
    print(json.dumps(fields | more))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("step", choices=["count", "compare"], help="what to do")
    arguments.add_argument("table", type=Path, help="Parquet, of then or of now")
    arguments.add_argument("sketch", type=Path, help="the reference's sketch as JSON")
    arguments.add_argument("--rows", type=int, default=100_000, help="that fix the bins")
    arguments.add_argument("--memory", default="200MB", help="for DuckDB")
    args = arguments.parse_args()
    began = time.perf_counter()
    if args.step == "count":
        columns = columns_of(args.table, args.rows)
        then = sketch_parquet(columns, args.table, 2, args.memory)
        args.sketch.write_text(sketch_to_json(then))
        return report(began, then)
    then = sketch_from_json(args.sketch.read_text())
    now = sketch_parquet(then.columns, args.table, 2, args.memory)
    counted = time.perf_counter()
    table = compare_windows(then, now, threshold=1e-6)
    tests = time.perf_counter() - counted
    report(began, now, moved=int(table["moved"].sum()), tests_seconds=tests)


if __name__ == "__main__":
    main()

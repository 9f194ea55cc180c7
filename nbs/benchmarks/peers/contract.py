"""What the scripts beside it share: the folder that they read and the file that they write.

    .peers/NAME/bin/python nbs/benchmarks/peers/NAME.py FOLDER --out FILE.json [--batch 50]

FOLDER holds columns.json {"numbers": [...], "levels": [...], "delay": 250}, reference.parquet and
streams/NAME.parquet, each with the features, `risk` and `y`, or folders of these two, every trial
with a reference of its own; no stream name comes twice. Rows stand in order of arrival, and y
of row i is known once row i + delay has arrived. FILE.json holds, for each detector and stream,
the numbers of patients seen at which it raised an alarm. Everything is used with the library's
defaults; streaming detectors see the reference first, and what they say of it does not count.
Missing values are left out of a test, as the libraries themselves ask. Needs only pyarrow.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

# This folder comes first on the path of its scripts, where river.py would hide the library `river`
sys.path.append(sys.path.pop(sys.path.index(str(Path(__file__).parent))))
os.environ |= {"DO_NOT_TRACK": "1", "NML_DISABLE_USAGE_LOGGING": "1"}

STARTED = time.perf_counter()
Table = dict[str, np.ndarray]  # One array for each column, in order of arrival
Alarms = dict[str, list[int]]  # For each detector the numbers of patients seen


def read(path: Path) -> Table:  # Numbers as float with NaN, levels as text with None
    """One Parquet file, without pandas."""
    table = pq.read_table(path)
    return {c: table[c].to_numpy(zero_copy_only=False) for c in table.column_names}


def coded(table: Table, reference: Table, columns: dict) -> Table:  # Floats, NaN where missing
    """Features and risk as numbers: levels by their place in the reference's, sorted."""
    codes = {c: table[c].astype(float) for c in (*columns["numbers"], "risk")}
    for c in columns["levels"]:
        levels = sorted({v for v in reference[c] if v is not None})
        place = {v: float(i) for i, v in enumerate(levels)} | {None: np.nan}
        codes[c] = np.array([place.get(v, float(len(levels))) for v in table[c]])
    return codes


def errors(table: Table, wrong: bool) -> np.ndarray:  # Shape (n,), NaN where y never gets known
    """Absolute error |y - risk|, or whether a risk of 0.5 or more was the `wrong` call (0 or 1)."""
    y, risk = table["y"].astype(float), table["risk"].astype(float)
    miss = ((risk >= 0.5) != (y == 1)).astype(float) if wrong else np.abs(y - risk)
    return np.where(np.isnan(y), np.nan, miss)


def batches(n: int, batch: int, delay: int = 0) -> Iterable[tuple[slice, int]]:
    """Whole batches that arrive, and are known, within n patients: rows, patients seen by then."""
    for end in range(batch, n - delay + 1, batch):
        yield slice(end - batch, end), end + delay


def pick(files: list[Path], streams: int | None) -> list[Path]:
    """`streams` files spread evenly over all, or all of them."""
    if streams is None or streams >= len(files):
        return files
    return [files[i * len(files) // streams] for i in range(streams)]


def main(
    packages: list[str],  # Whose versions to record
    kinds: dict[str, str],  # For each detector: features, outcomes or estimate
    prepare: Callable[[Table, dict, int], dict[str, Callable[[Table], Alarms]]],
) -> None:
    """Read the folder, run what `prepare` makes of the reference over each stream, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=50, help="patients in a batch")
    parser.add_argument("--streams", type=int, help="only this many, spread evenly over all")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    seconds = {"import": time.perf_counter() - STARTED}
    columns = json.loads((asked.folder / "columns.json").read_text(encoding="utf-8"))
    files = pick(sorted(asked.folder.glob("**/streams/*.parquet")), asked.streams)
    results, seconds["prepare"] = {name: {} for name in kinds}, 0.0
    for home in dict.fromkeys(path.parent.parent for path in files):
        start = time.perf_counter()
        watchers = prepare(read(home / "reference.parquet"), columns, asked.batch)
        seconds["prepare"] += time.perf_counter() - start
        for path in (path for path in files if path.parent.parent == home):
            stream = read(path)
            for watcher, watch in watchers.items():
                start = time.perf_counter()
                for name, rows in watch(stream).items():
                    results[name][path.stem] = [int(row) for row in rows]
                seconds[watcher] = seconds.get(watcher, 0) + time.perf_counter() - start
    seconds["total"] = time.perf_counter() - STARTED
    watching = sum(seconds.values()) - seconds["import"] - seconds["total"]
    seconds["per stream"] = watching / max(len(files), 1)
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    detectors = {name: {"kind": kinds[name], "alarms": results[name]} for name in kinds}
    report = {"versions": versions, "detectors": detectors, "seconds": seconds}
    asked.out.write_text(json.dumps(report, indent=1), encoding="utf-8")

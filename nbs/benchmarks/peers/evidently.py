"""Evidently's DataDriftPreset with its defaults, once for each batch.

The features and the risk are compared with the reference. Two results count: the dataset flag
(half of the columns or more drifted) and whether any column drifted.
"""

import warnings
from collections.abc import Callable

import contract
import numpy as np
import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset

DATASET, ANY = "Evidently dataset flag", "Evidently any column"
SHARE = DataDriftPreset().drift_share
warnings.simplefilter("ignore")


def data(table: contract.Table, columns: dict, empty: list[str]) -> Dataset:
    """Features and risk of some patients, without `empty` columns, as Evidently takes them."""
    numbers = [c for c in (*columns["numbers"], "risk") if c not in empty]
    levels = [c for c in columns["levels"] if c not in empty]
    kinds = DataDefinition(numerical_columns=numbers, categorical_columns=levels)
    frame = pd.DataFrame({c: table[c] for c in numbers + levels})
    return Dataset.from_pandas(frame, data_definition=kinds)


def drifted(reference: contract.Table, batch: contract.Table, columns: dict) -> tuple[int, float]:
    """Number and share of drifted columns; a column with no value at all stops Evidently."""
    names = [*columns["numbers"], *columns["levels"], "risk"]
    empty = [c for c in names if pd.isna(batch[c]).all()]
    run = Report([DataDriftPreset()]).run(
        data(batch, columns, empty), data(reference, columns, empty)
    )
    value = run.dict()["metrics"][0]["value"]
    return value["count"] + len(empty), (value["count"] + len(empty)) / len(names)


def prepare(reference: dict, columns: dict, batch: int) -> dict[str, Callable]:
    """The one detector of this script, ready for a stream."""

    def watch(stream: contract.Table) -> contract.Alarms:
        alarms = {DATASET: [], ANY: []}
        for rows, seen in contract.batches(len(stream["risk"]), batch):
            part = {c: values[rows] for c, values in stream.items()}
            with np.errstate(all="ignore"):
                count, share = drifted(reference, part, columns)
            alarms[ANY] += [seen] if count else []
            alarms[DATASET] += [seen] if share >= SHARE else []
        return alarms

    return {"DataDriftPreset": watch}


if __name__ == "__main__":
    contract.main(["evidently", "pandas"], {DATASET: "features", ANY: "features"}, prepare)

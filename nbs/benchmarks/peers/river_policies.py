"""River's online learners with their defaults, as policies: each matured outcome updates them.

    .peers/river/bin/python nbs/benchmarks/peers/river_policies.py FOLDER --out FOLDER

FOLDER holds columns.json {"numbers": [...], "levels": {name: [...]}} and one NAME.parquet for each
stream: features (numbers on the scale that our own model sees), `y`, `arrived`, `matured` (when the
outcome may be used, NaT for never) and `asked` (whether a risk is wanted). Rows stand in order
of arrival. Before each prediction the outcomes that matured until then update the model, in order;
those before the first prediction are the warm start. Written are
NAME.parquet with the risk of each asked patient by every learner, and learned.json with the number
of outcomes that taught after the first question. A class never seen has the risk 0.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import contract
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from river import base, forest, linear_model, preprocessing, stats

MODELS = {
    "River logistic regression": lambda: (
        preprocessing.StandardScaler() | linear_model.LogisticRegression()
    ),
    "River adaptive random forest": lambda: forest.ARFClassifier(seed=0),
}


def ready(name: str, columns: dict) -> base.Classifier:  # A new learner
    """With the running mean in the place of a missing number."""
    means = [(number, stats.Mean()) for number in columns["numbers"]]
    return preprocessing.StatImputer(*means) | MODELS[name]()


def patients(stream: contract.Table, columns: dict) -> list[dict]:  # As River takes them
    """Numbers as they are, None where missing; every level but the first as 0 or 1."""
    table = {
        c: [None if np.isnan(v) else v for v in stream[c].tolist()] for c in columns["numbers"]
    }
    for name, levels in columns["levels"].items():
        table |= {f"{name} {v}": (stream[name] == v).astype(float).tolist() for v in levels[1:]}
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def lessons(stream: contract.Table) -> list[int]:  # Rows in the order in which they may teach
    """Patients whose outcome matures, in order; those of one moment by arrival."""
    known = ~np.isnat(stream["matured"]) & ~np.isnan(stream["y"].astype(float))
    order = np.argsort(stream["matured"], kind="stable")
    return order[known[order]].tolist()


def live(model: base.Classifier, stream: contract.Table, columns: dict) -> tuple[list[float], int]:
    """Risk of each asked patient, and how many outcomes taught after the first question."""
    rows, queue, risks, learned = patients(stream, columns), lessons(stream), [], 0
    waiting = iter([*queue, None])
    due = next(waiting)
    for i in np.flatnonzero(stream["asked"]).tolist():
        while due is not None and stream["matured"][due] <= stream["arrived"][i]:
            model.learn_one(rows[due], bool(stream["y"][due]))
            learned += bool(risks)
            due = next(waiting)
        risks.append(float(model.predict_proba_one(rows[i]).get(True, 0.0)))
    return risks, learned


def main() -> None:
    """Every learner on every stream."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    columns = json.loads((asked.folder / "columns.json").read_text(encoding="utf-8"))
    learned = {}
    for path in sorted(asked.folder.glob("*.parquet")):
        stream = contract.read(path)
        results = {name: live(ready(name, columns), stream, columns) for name in MODELS}
        learned[path.stem] = {name: count for name, (_, count) in results.items()}
        table = pa.table({name: risks for name, (risks, _) in results.items()})
        pq.write_table(table, asked.out / path.name)
    versions = {"python": platform.python_version(), "river": version("river")}
    text = json.dumps({"versions": versions, "learned": learned}, indent=1)
    (asked.out / "learned.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

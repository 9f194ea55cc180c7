"""NannyML's estimate of the AUROC without outcomes (CBPE, its defaults), window by window.

    .peers/nannyml/bin/python nbs/benchmarks/peers/nannyml_cbpe.py FOLDER --out FILE.json

Each folder in FOLDER holds reference.parquet and windows/NAME.parquet, with risk and y each; no
window name comes twice. A window is one chunk. FILE.json holds, for each window, the estimate, its
sampling error (the interval that NannyML draws is three of them on either side), the AUROC that
came true, and how many seconds it took, fitting included.
"""

import argparse
import json
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import contract
import nannyml
import pandas as pd

warnings.simplefilter("ignore")


def frame(path: Path) -> pd.DataFrame:
    """Risk and outcome as NannyML takes them: with the call at a risk of 0.5."""
    table = contract.read(path)
    patients = pd.DataFrame({name: table[name] for name in ("risk", "y")})
    return patients.assign(call=(patients["risk"] >= 0.5).astype(int))


def estimates(home: Path) -> dict[str, dict[str, float]]:
    """All windows that share one reference."""
    reference, by_window = frame(home / "reference.parquet"), {}
    options = {"problem_type": "classification_binary", "metrics": ["roc_auc"], "chunk_number": 1}
    options |= {"y_true": "y", "y_pred": "call", "y_pred_proba": "risk"}
    for path in sorted((home / "windows").glob("*.parquet")):
        start = time.perf_counter()
        estimated = nannyml.CBPE(**options).fit(reference).estimate(frame(path))
        row = estimated.filter(period="analysis").to_df(multilevel=False).iloc[0]
        names = {"value": "value", "error": "sampling_error", "realised": "realized"}
        by_window[path.stem] = {k: float(row[f"roc_auc_{v}"]) for k, v in names.items()}
        by_window[path.stem]["seconds"] = time.perf_counter() - start
    return by_window


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    windows = {}
    for home in sorted(path for path in asked.folder.iterdir() if path.is_dir()):
        windows |= estimates(home)
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("nannyml", "scikit-learn", "pandas", "numpy")}
    report = {"versions": versions, "windows": windows}
    asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

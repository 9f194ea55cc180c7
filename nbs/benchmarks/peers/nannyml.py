"""NannyML's calculators with their defaults, in chunks of one batch.

UnivariateDriftCalculator on the features and the risk (an alert of any column), CBPE of the AUROC
(performance without outcomes), and the AUROC that came true once the outcomes are known.
"""

import warnings
from collections.abc import Callable

import contract
import nannyml
import numpy as np
import pandas as pd

warnings.simplefilter("ignore")
DRIFT, CBPE = "NannyML univariate drift", "NannyML CBPE"
REALISED = "NannyML realised AUROC"
KINDS = {DRIFT: "features", CBPE: "estimate", REALISED: "outcomes"}


def frame(table: contract.Table) -> pd.DataFrame:
    """As NannyML takes it: with the call at a risk of 0.5."""
    patients = pd.DataFrame(table)
    return patients.assign(call=(patients["risk"] >= 0.5).astype(int))


def alerts(calculate: Callable, patients: pd.DataFrame, batch: int, delay: int = 0) -> list[int]:
    """Patients seen at each whole chunk in which any column alerts; without any chunk, none."""
    whole = patients[: len(patients) // batch * batch]
    if not len(whole):
        return []
    table = calculate(whole).filter(period="analysis").to_df(multilevel=False)
    alert = table.filter(regex="_alert$").fillna(False).astype(bool).any(axis=1)
    return [batch * (i + 1) + delay for i in np.flatnonzero(alert)]


def prepare(reference: dict, columns: dict, batch: int) -> dict[str, Callable]:
    """Three calculators, fitted to the reference."""
    known, delay = frame(reference).dropna(subset=["y"]), columns["delay"]
    names = [*columns["numbers"], *columns["levels"], "risk"]
    options = {"problem_type": "classification_binary", "metrics": ["roc_auc"], "chunk_size": batch}
    options |= {"y_true": "y", "y_pred": "call", "y_pred_proba": "risk"}
    drift = nannyml.UnivariateDriftCalculator(column_names=names, chunk_size=batch).fit(known)
    cbpe = nannyml.CBPE(**options).fit(known)
    realised = nannyml.PerformanceCalculator(**options).fit(known)

    def by_drift(stream: contract.Table) -> contract.Alarms:
        return {DRIFT: alerts(drift.calculate, frame(stream), batch)}

    def by_estimate(stream: contract.Table) -> contract.Alarms:
        return {CBPE: alerts(cbpe.estimate, frame(stream), batch)}

    def by_outcome(stream: contract.Table) -> contract.Alarms:
        matured = frame(stream)[: max(len(stream["risk"]) - delay, 0)]
        matured = matured if matured["y"].notna().any() else matured[:0]
        return {REALISED: alerts(realised.calculate, matured, batch, delay)}

    return {DRIFT: by_drift, CBPE: by_estimate, REALISED: by_outcome}


if __name__ == "__main__":
    contract.main(["nannyml", "pandas"], KINDS, prepare)

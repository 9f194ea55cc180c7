"""Frouros's detectors with their defaults.

For each batch: the Kolmogorov-Smirnov test of each number and the risk and the chi-square test of
each level, at 0.05; PSI of each feature (levels as numbers) and the risk, at 0.2. On the absolute
error of the risk, patient by patient: ADWIN, CUSUM, PageHinkley. On whether a risk of 0.5 or more
was the wrong call: DDM, EDDM, HDDM_A, HDDM_W. After an alarm the detector is reset.
"""

from collections.abc import Callable

import contract
import numpy as np
import online
from frouros.detectors import concept_drift, data_drift

TESTS, PSI = "Frouros KS and chi-square", "Frouros PSI"
ANY = {
    "ADWIN": concept_drift.ADWIN,
    "CUSUM": concept_drift.CUSUM,
    "PageHinkley": concept_drift.PageHinkley,
}
WRONG = {
    "DDM": concept_drift.DDM,
    "EDDM": concept_drift.EDDM,
    "HDDM_A": concept_drift.HDDMA,
    "HDDM_W": concept_drift.HDDMW,
}
KINDS = {TESTS: "features", PSI: "features"}
KINDS |= {f"Frouros {name}, error": "outcomes" for name in ANY}
KINDS |= {f"Frouros {name}, wrong call": "outcomes" for name in WRONG}


def update(detector: concept_drift.DDM, value: float) -> bool:
    """One value more; the detector is reset where it alarms, or it would alarm ever after."""
    detector.update(value=value)
    alarm = bool(detector.drift)
    if alarm:
        detector.reset()
    return alarm


def present(values: np.ndarray) -> np.ndarray:
    """Without what is missing: NaN in numbers, None in levels."""
    return values[np.array([v is not None and v == v for v in values], dtype=bool)]


def fitted(make: Callable, known: np.ndarray) -> object:
    """A detector fitted to the reference's values."""
    detector = make()
    detector.fit(X=present(known))
    return detector


def alarms(detectors: dict, values: contract.Table, batch: int, over: Callable) -> list[int]:
    """Patients seen at each batch in which the result for any column is `over` its limit."""
    n = len(values["risk"])
    alarmed = []
    for rows, seen in contract.batches(n, batch):
        parts = {c: present(values[c][rows]) for c in detectors}
        results = (detectors[c].compare(X=parts[c])[0] for c in detectors if len(parts[c]))
        if any(over(result) for result in results):
            alarmed.append(seen)
    return alarmed


def batches(reference: dict, columns: dict, batch: int) -> dict[str, Callable]:
    """The two that look at batches, ready for a stream."""
    tests = {c: fitted(data_drift.KSTest, reference[c]) for c in (*columns["numbers"], "risk")}
    tests |= {c: fitted(data_drift.ChiSquareTest, reference[c]) for c in columns["levels"]}
    known = contract.coded(reference, reference, columns)
    psi = {c: fitted(data_drift.PSI, known[c]) for c in known}

    def by_tests(stream: contract.Table) -> contract.Alarms:
        return {TESTS: alarms(tests, stream, batch, lambda result: result.p_value < 0.05)}

    def by_psi(stream: contract.Table) -> contract.Alarms:
        values = contract.coded(stream, reference, columns)
        return {PSI: alarms(psi, values, batch, lambda result: result.distance > 0.2)}

    return {TESTS: by_tests, PSI: by_psi}


def prepare(reference: dict, columns: dict, batch: int) -> dict[str, Callable]:
    """Every detector of this script, ready for a stream."""
    watchers, delay = batches(reference, columns, batch), columns["delay"]
    both = [(kind, "error", make) for kind, make in ANY.items()]
    both += [(kind, "wrong call", make) for kind, make in WRONG.items()]
    for kind, what, make in both:
        name, wrong = f"Frouros {kind}, {what}", what == "wrong call"
        watchers[name] = online.on_outcomes(name, make, update, reference, delay, wrong)
    return watchers


if __name__ == "__main__":
    contract.main(["frouros"], KINDS, prepare)

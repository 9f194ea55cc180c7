"""How detectors that take one value at a time are run, for River and Frouros alike."""

import copy
from collections.abc import Callable

import contract
import numpy as np

Update = Callable[[object, float], bool]  # Detector, value -> whether it alarms; it resets itself


def alarms(detector: object, update: Update, values: np.ndarray) -> list[int]:
    """The 1-based places of the values at which the detector alarms; NaN is passed over."""
    known = np.flatnonzero(~np.isnan(values))
    return [i + 1 for i in known.tolist() if update(detector, float(values[i]))]


def warmed(make: Callable[[], object], update: Update, values: np.ndarray) -> object:
    """A new detector that has seen the values of the reference."""
    detector = make()
    alarms(detector, update, values)
    return detector


def on_features(
    name: str, make: Callable[[], object], update: Update, reference: dict, columns: dict
) -> Callable[[contract.Table], contract.Alarms]:
    """One detector for each feature and one for the risk; the patients at which any alarms."""
    known = contract.coded(reference, reference, columns)
    ready = {c: warmed(make, update, known[c]) for c in known}

    def watch(stream: contract.Table) -> contract.Alarms:
        values = contract.coded(stream, reference, columns)
        rows = (alarms(copy.deepcopy(ready[c]), update, values[c]) for c in ready)
        return {name: sorted(set().union(*rows))}

    return watch


def on_outcomes(
    name: str, make: Callable[[], object], update: Update, reference: dict, delay: int, wrong: bool
) -> Callable[[contract.Table], contract.Alarms]:
    """One detector on the errors, each of which is known `delay` patients after its own."""
    ready = warmed(make, update, contract.errors(reference, wrong))

    def watch(stream: contract.Table) -> contract.Alarms:
        values = contract.errors(stream, wrong)
        known = values[: max(len(values) - delay, 0)]
        return {name: [row + delay for row in alarms(copy.deepcopy(ready), update, known)]}

    return watch

"""River's drift detectors with their defaults.

On each feature and the risk (levels as numbers): ADWIN, KSWIN, PageHinkley. On the absolute error
of the risk: the same. On whether a risk of 0.5 or more was the wrong call: DDM, EDDM, HDDM_A and
HDDM_W. After an alarm each goes on as River does it. KSWIN draws at random: its seed is 0.
"""

import functools
from collections.abc import Callable

import contract
import numpy as np
import online
import scipy
from river import drift
from river.drift import kswin


class FastKS:
    """scipy.stats.ks_2samp for KSWIN, 20 times faster: with sizes fixed, p depends on D alone."""

    def __init__(self) -> None:
        self.pvalue = functools.lru_cache(maxsize=None)(self._pvalue)

    @staticmethod
    def _pvalue(steps: int, n: int) -> float:
        """The exact two-sided p-value of two samples of n with a distance of steps / n."""
        moved = np.arange(n) + steps - 0.5
        return float(scipy.stats.ks_2samp(np.arange(n), moved, method="exact").pvalue)

    def ks_2samp(self, x: list, y: list, method: str) -> tuple[float, float]:
        """Statistic and p-value of two samples of one size."""
        a, b = np.sort(x), np.sort(y)
        both = np.concatenate([a, b])
        above = np.searchsorted(a, both, side="right") - np.searchsorted(b, both, side="right")
        steps = int(np.abs(above).max())
        return steps / len(a), self.pvalue(steps, len(a))


kswin.stats = FastKS()
ANY = {
    "ADWIN": drift.ADWIN,
    "KSWIN": functools.partial(drift.KSWIN, seed=0),
    "PageHinkley": drift.PageHinkley,
}
WRONG = {
    "DDM": drift.binary.DDM,
    "EDDM": drift.binary.EDDM,
    "HDDM_A": drift.binary.HDDMA,
    "HDDM_W": drift.binary.HDDMW,
}
KINDS = {f"River {name}, features": "features" for name in ANY}
KINDS |= {f"River {name}, error": "outcomes" for name in ANY}
KINDS |= {f"River {name}, wrong call": "outcomes" for name in WRONG}


def update(detector: drift.ADWIN, value: float) -> bool:
    """One value more; River's detectors restart themselves with the next one."""
    detector.update(value)
    return detector.drift_detected


def update_binary(detector: drift.binary.DDM, value: float) -> bool:
    """One right or wrong call more."""
    return update(detector, bool(value))


def prepare(reference: dict, columns: dict, batch: int) -> dict[str, Callable]:
    """Every detector of this script, ready for a stream."""
    watchers, delay = {}, columns["delay"]
    for kind, make in ANY.items():
        name = f"River {kind}, features"
        watchers[name] = online.on_features(name, make, update, reference, columns)
        name = f"River {kind}, error"
        watchers[name] = online.on_outcomes(name, make, update, reference, delay, wrong=False)
    for kind, make in WRONG.items():
        name = f"River {kind}, wrong call"
        watchers[name] = online.on_outcomes(name, make, update_binary, reference, delay, wrong=True)
    return watchers


if __name__ == "__main__":
    contract.main(["river"], KINDS, prepare)

"""Kaplan-Meier, inverse-probability weights and Aalen-Johansen, patient by patient."""

from collections.abc import Sequence


def staying(days: Sequence[float], ended: Sequence[bool], before: float) -> float:
    """Kaplan-Meier probability of no loss before a day; losses come last on their day."""
    chance = 1.0
    for t in sorted({d for d, e in zip(days, ended, strict=True) if not e and d < before}):
        lost = sum(d == t and not e for d, e in zip(days, ended, strict=True))
        at_risk = sum(d > t or (d == t and not e) for d, e in zip(days, ended, strict=True))
        chance *= 1 - lost / at_risk
    return chance


def weights(days: Sequence[float], ended: Sequence[bool], horizon: float) -> list[float]:
    """One over the probability of having been followed so long; 0 for the lost."""
    weights_of = []
    for d, e in zip(days, ended, strict=True):
        known = e or d >= horizon
        weights_of.append(1 / staying(days, ended, min(d, horizon)) if known else 0.0)
    return weights_of


def incidence(days: Sequence[float], cause: Sequence[int], horizon: float) -> float:
    """Aalen-Johansen probability of cause 1 by the horizon; cause 0 is a loss, 2 competes."""
    free, risk = 1.0, 0.0
    for t in sorted({d for d, c in zip(days, cause, strict=True) if c and d <= horizon}):
        at_risk = sum(d >= t for d in days)
        here = [c for d, c in zip(days, cause, strict=True) if d == t and c]
        risk += free * here.count(1) / at_risk
        free *= 1 - len(here) / at_risk
    return risk

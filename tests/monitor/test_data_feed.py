"""A feed of outcomes that has stopped is suspected; one that works, or a lower risk, is not."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import typed_features
from lm.model.predict import RiskModel, fit, predict
from lm.monitor.data_feed import FEED_LEVEL, feed_messages, longest_silence, outcome_feed
from lm.monitor.verdict import reach_verdict
from lm.update.decide import Case, _silent, decide_update

START = pd.Timestamp("2020-01-01")
STUDY = load_study("monica")


@pytest.mark.parametrize("ratio", [1.0, 0.6])
def test_a_working_feed_is_rarely_suspected(ratio):
    suspected = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        events = np.sort(rng.uniform(0, 1000, rng.poisson(200 * ratio)))
        _, _, expected, limit = longest_silence(events, np.arange(1001), np.arange(1001) / 5)
        suspected += expected > limit
    assert suspected <= 300 * FEED_LEVEL + 3


def test_a_silence_is_detected_where_it_is():
    events = np.r_[np.arange(0, 300, 5.0), np.arange(600, 1000, 5.0)]
    start, end, expected, limit = longest_silence(events, np.arange(1001), np.arange(1001) / 5)
    assert (start, end) == (295, 600) and expected == pytest.approx(61) and expected > limit


def test_no_patient_is_no_silence():
    study = load_study("monica")
    none = pd.DataFrame({"arrived": pd.to_datetime([]), "risk": [], "y": [], "matured": []})
    assert (
        outcome_feed(study, none, START).empty
        and feed_messages(outcome_feed(study, none, START)) == []
    )


def known(stopped: bool) -> tuple[RiskModel, pd.DataFrame, pd.Timestamp]:
    """A right model, and 1,200 patients whose events of the second half may not be reported."""
    study, rng = load_study("monica"), np.random.default_rng(1)
    rows = read_rows(study)
    model = fit(study, rows[:600])
    frame = rows.iloc[rng.integers(0, len(rows), 1800)].reset_index(drop=True)
    frame["record_id"] = [f"p{i}" for i in range(1800)]
    frame["arrived"] = START + pd.to_timedelta(np.arange(1800) / 2, "D")
    scores = predict(model, typed_features(study, frame))
    frame["y"] = (rng.random(1800) < expit(scores["log_odds"])).astype(float)
    frame = frame.assign(risk=scores["risk"].where(frame.index >= 600), unlike=scores["unlike"])
    if stopped:
        frame["y"] = frame["y"].mask(frame.index >= 1200, 0.0)
    frame = frame.drop(columns=["event", "followed_until", "known_at"], errors="ignore")
    return model, frame.assign(matured=True), frame["arrived"].iloc[-1] + study.horizon


@pytest.mark.parametrize("stopped", [False, True])
def test_no_event_where_many_were_expected_asks_for_a_person_not_for_a_recalibration(stopped):
    model, frame, day = known(stopped)
    since = frame["arrived"].iloc[599]
    verdict = reach_verdict(load_study("monica"), frame, day, since, 1, model, fast=True)
    silent = verdict.evidence["outcome_feed"]
    assert bool(silent) == stopped and _silent(verdict.evidence) == silent
    if stopped:
        assert verdict.evidence["alarms"] and verdict.action == "look at the data"
        assert verdict.reason.startswith("no event between ") and silent[0] in verdict.reason


def test_an_update_is_ready_but_waits_for_a_person_where_the_feed_is_suspected():
    model, frame, day = known(False)
    spared = np.random.default_rng(2).random(len(frame)) < 0.6
    frame["y"] = frame["y"].mask((frame.index >= 600) & spared, 0.0)  # Truly fewer events
    since = frame["arrived"].iloc[599]
    verdict = reach_verdict(STUDY, frame, day, since, 1, model, fast=True).to_dict()
    assert verdict["action"] in ("recalibrate", "retrain")
    case = Case(STUDY, frame, day, model, since)
    sentence = "no event between 2020-11-01 and 2020-12-15, where 30 were expected"
    free, held = (
        decide_update(case, verdict | {"evidence": verdict["evidence"] | {"outcome_feed": silent}})
        for silent in ([], [sentence])
    )
    assert free.model is not None and sentence not in free.beyond_plan
    assert held.action == free.action and held.model.fingerprint() == free.model.fingerprint()
    assert held.beyond_plan == (*free.beyond_plan, sentence)  # What is not empty waits for a person


# A feed that was out from day 560 to day 760 and then sends what it owes; the risk never changes

DAY = pd.Timedelta(days=1)
STOPPED, REPAIRED = START + 560 * DAY, START + 760 * DAY


def stream():
    """A right model, and 1,800 patients as they will be once all is known: y, event, due."""
    rows, rng, n = read_rows(STUDY), np.random.default_rng(0), 1800
    model = fit(STUDY, rows[:600])
    frame = rows.iloc[rng.integers(0, len(rows), n)].reset_index(drop=True)
    frame = frame.assign(
        record_id=[f"p{i}" for i in range(n)],
        arrived=START + pd.to_timedelta(np.arange(n) / 2, "D"),
        lost=False,
    )
    scores = predict(model, typed_features(STUDY, frame))
    y = (rng.random(n) < expit(scores["log_odds"])).astype(float)
    happened = frame["arrived"] + pd.to_timedelta(rng.uniform(0, 27, n), "D")
    frame = frame.assign(y=y, event=happened.where(y == 1), due=frame["arrived"] + STUDY.horizon)
    risk = scores["risk"].where(frame.index >= 600)
    return model, frame.assign(risk=risk, unlike=scores["unlike"], place=rng.random(n))


def reported(frame, way):
    """When each label becomes known, and which are owed at the repair."""
    known = frame["event"].fillna(frame["due"]) + frame["place"] * DAY
    owed = known.between(STOPPED, REPAIRED)
    owed &= frame["y"].eq(1) if way == "survivors first, then corrected" else True
    late = REPAIRED + frame["place"] * (1 if way == "at once" else 21) * DAY
    if way == "events first":
        late = REPAIRED + frame["place"] * DAY + frame["y"].eq(0) * 7 * DAY
    return known.mask(owed, late), owed


def as_known(frame, way, as_of, dated):
    """What the store would give at a moment."""
    known, owed = reported(frame, way)
    y = frame["y"].where(known <= as_of)
    if way == "survivors first, then corrected":
        y = y.mask(owed & (known > as_of) & (frame["due"] <= as_of), 0.0)
    matured = frame["due"] <= as_of
    table = frame.assign(y_early=y, y=y.where(matured), matured=matured)
    table["y_known_at"] = known.where(known <= as_of, frame["due"]).where(y.notna())
    event = frame["event"].where(y == 1)
    dates = {"event": event, "followed_until": event.fillna(frame["due"].clip(upper=as_of))}
    table = table.assign(**dates) if dated else table.drop(columns=["event", "followed_until"])
    return table[frame["arrived"] <= as_of]


@pytest.mark.slow
@pytest.mark.parametrize("dated", [True, False])
@pytest.mark.parametrize(
    "way", ["at once", "events first", "any order", "survivors first, then corrected"]
)
def test_a_backlog_of_a_repaired_feed_is_no_change_of_risk(way, dated):
    model, frame = stream()
    since = frame["arrived"].iloc[599]
    for day in (500, 740, 763, 765, 767, 773, 780, 790, 830, 870):
        as_of = START + day * DAY
        table = as_known(frame, way, as_of, dated)
        verdict = reach_verdict(STUDY, table, as_of, since, 1, model, fast=True, worth=1.0)
        result = verdict.evidence["outcome_feed"]
        assert verdict.action == ("look at the data" if result else "nothing"), (
            day,
            verdict.reason,
        )
        assert bool(result) or not 763 < day < 780, (day, verdict.reason)
    assert not result and not verdict.evidence["alarms"]

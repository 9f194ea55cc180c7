"""One rule decides whether an outcome can be true, and one which of several counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import outcomes as slow
from support.long import much
from support.ward import START, STUDY, patient

from lm.core.errors import LMError
from lm.core.labels import RejectedOutcome, check_outcome
from lm.data.store import Store

NOW = "2020-02-20T12:00"


def iso(minutes, as_day):
    when = START + pd.Timedelta(minutes=minutes)
    return str(when.date()) if as_day else when.isoformat()


# Around arrival, the end of the horizon of 10 days, and now
MINUTES = st.one_of(
    *(st.integers(-1500, 1500).map(lambda m, at=at: at * 1440 + m) for at in (0, 10, 50)),
    st.integers(-3000, 80_000),
)
TIMES = st.builds(iso, MINUTES, st.booleans())
ROWS = st.fixed_dictionaries(
    {"record_id": st.just("p1"), "y": st.sampled_from([0, 1, None]), "known_at": TIMES},
    optional=dict.fromkeys(("event", "followed_until", "competing"), TIMES),
)


@settings(max_examples=600, deadline=None)
@given(row=ROWS, arrived=st.builds(iso, st.integers(-800, 800), st.booleans()))
def test_what_an_outcome_may_say(row, arrived):
    precision = "day" if len(arrived) == 10 else "second"
    try:
        check_outcome(STUDY, row, pd.Timestamp(arrived), precision, pd.Timestamp(NOW))
        accepted = True
    except RejectedOutcome as error:
        accepted = False
        assert "breaks the rule" in str(error) and error.field in row | {"followed_until": 0}
    assert accepted == slow.acceptable(row, arrived, STUDY.horizon_days, NOW)


CONTRADICTIONS = {
    "y = 1, event on day 400": ({"y": 1, "event": 400, "known_at": 406}, "2021-02-04.*2020-01-11"),
    "y = 0, event on day 3": ({"y": 0, "event": 3, "known_at": 40}, "2020-01-04.*2020-01-11"),
    "y = 0, known on day 5": ({"y": 0, "known_at": 5}, "2020-01-06.*2020-01-11"),
    "event before arrival": ({"y": 1, "event": -1, "known_at": 5}, "2019-12-31.*2020-01-01"),
    "lost before arrival": ({"y": None, "followed_until": -1, "known_at": 5}, "2019-12-31"),
    "known in the future": ({"y": 1, "known_at": 44_000}, "2140-06-20.*later than now"),
    "competing after follow-up": (
        {"y": 0, "competing": 8, "followed_until": 5, "known_at": 9},
        "2020-01-09.*2020-01-06.*follow-up had ended",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
@pytest.mark.parametrize("many", [False, True])
def test_a_contradiction_names_both_values(tmp_path, case, many):
    row, text = CONTRADICTIONS[case]
    row = {k: START + pd.Timedelta(days=v) if k != "y" else v for k, v in row.items()}
    with Store(STUDY, tmp_path) as store:
        store.records.append(patient(0), START)
        if many:
            frame = pd.DataFrame([row | {"record_id": "p0"}])
            assert [(n, len(e)) for n, e in [store.outcomes.append_many(frame)]] == [(0, 1)]
        else:
            with pytest.raises(LMError, match=text):
                store.outcomes.append("p0", **row)
        assert store.queries.table("outcomes").empty


def test_a_survivor_to_the_day_of_the_horizon_survived():
    zone = replace(STUDY, folder=Path("."))
    came = pd.Timestamp("2020-01-01T15:30")
    row = {"record_id": "a", "y": 0, "known_at": "2020-01-11"}
    assert check_outcome(zone, row, came)["y"] == 0
    event = {"record_id": "a", "y": 1, "known_at": "2020-01-01", "event": "2020-01-01"}
    assert check_outcome(zone, event, came)["y"] == 1


ENTRIES = st.lists(st.tuples(st.integers(10, 40), st.sampled_from([0, 1])), min_size=1, max_size=8)


@pytest.mark.slow
@settings(max_examples=much(10, 300), deadline=None)
@given(entries=ENTRIES)
def test_the_entry_that_was_made_last_counts_everywhere(tmp_path_factory, entries):
    with Store(STUDY, tmp_path_factory.mktemp("store")) as store:
        store.records.append(patient(0), START)
        stored = []
        for day, y in entries:
            when = START + pd.Timedelta(days=day)
            store.outcomes.append("p0", y, when)
            if not stored or stored[-1][1:3] != (when, y):  # The same again is stored once
                stored.append((len(stored) + 1, when, y, None))
        for day in range(9, 42, 3):
            as_of = START + pd.Timedelta(days=day)
            chosen = slow.counting(stored, as_of)
            y = store.queries.as_of(as_of)["y_early"].item()
            assert np.isnan(y) if chosen is None else y == chosen[2]
        assert (
            store.queries.visits("p0")["y"].item()
            == stored[-1][2]
            == store.queries.as_of()["y"].item()
        )

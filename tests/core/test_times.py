"""Times: every spelling is the same instant, nothing is guessed, days are compared as days."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import times as slow
from support.long import much

from lm.core.labels import label_outcomes
from lm.core.study import load_study
from lm.core.times import (
    DAY_FORMAT,
    TIME_FORMAT,
    Moment,
    as_days,
    each_before,
    parse_moment,
    parse_time,
    precision,
)

ZONES = ("UTC", "Europe/Berlin", "America/Sao_Paulo", "Asia/Kathmandu", "Africa/Cairo")
FIRST, LAST = datetime(1980, 1, 1), datetime(2026, 1, 1)
INSTANTS = st.datetimes(FIRST, LAST)
SECONDS = INSTANTS.map(lambda when: when.replace(microsecond=0))
QUARTERS = SECONDS.map(lambda w: w.replace(minute=w.minute // 15 * 15, second=0))
OFFSETS = st.integers(-14 * 4, 14 * 4).map(lambda n: timezone(timedelta(minutes=15 * n)))
STUDY = load_study("monica")


@given(when=INSTANTS, offset=OFFSETS, mark=st.sampled_from("T "), comma=st.booleans())
def test_every_spelling_of_an_instant_is_that_instant(when, offset, mark, comma):
    local = when.replace(tzinfo=UTC).astimezone(offset)
    text = local.isoformat(mark)
    texts = [text, f" {text} ", text[:-3] if text.endswith(":00") else text, when.isoformat() + "Z"]
    texts.append(text.replace(".", ",") if comma else text)
    for one in [*texts, local, when, pd.Timestamp(when), np.datetime64(when)]:
        assert parse_time(one, "Europe/Berlin") == pd.Timestamp(when)
        assert precision(one) == "second"


@given(wall=QUARTERS, zone=st.sampled_from(ZONES))
def test_a_local_time_is_its_instant_or_refused_where_the_clock_shows_it_twice_or_never(wall, zone):
    there = slow.instants(wall, zone)
    try:
        assert [parse_time(wall.isoformat(), zone)] == there
    except ValueError as rule:
        assert len(there) != 1 and "its clocks change" in str(rule)
    assume(there)  # With its offset each of them is read
    for one in there:
        offset = (wall - one) / timedelta(minutes=1)
        sign, minutes = "+" if offset >= 0 else "-", abs(int(offset))
        text = f"{wall.isoformat()}{sign}{minutes // 60:02d}:{minutes % 60:02d}"
        assert parse_time(text, zone) == one


@pytest.mark.parametrize("zone", ZONES)
@given(day=st.dates(FIRST.date(), LAST.date()))
def test_a_day_is_its_first_instant(zone, day):
    for one in (day, day.isoformat(), np.datetime64(day)):
        assert parse_time(one, zone) == slow.first_instant(day, zone) and precision(one) == "day"
        assert parse_moment(one, zone).day == day


@given(st.text(st.sampled_from("0123456789-/.:TZ +W,anow"), max_size=26))
def test_what_is_no_iso_time_is_refused(text):
    try:
        when = parse_time(text)
    except ValueError as rule:
        assert str(rule).startswith("a date")
    else:
        assert 1899 < when.year < 2202 and (
            DAY_FORMAT.fullmatch(text.strip()) or TIME_FORMAT.fullmatch(text.strip())
        )


WRONG = ["05/06/2024", "31.12.2024", "24-05-31", "10:30", "now", "today", "2Q2024", "2024-W01-1"]
WRONG += [
    "20240531",
    "2024-152",
    "2024",
    0,
    20240531,
    1.7e18,
    np.int64(5),
    True,
    [],
    {},
    b"2024-05-31",
]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_nothing_is_guessed(value):
    with pytest.raises(ValueError, match="a date such as 2024-05-31"):
        parse_time(value)


def either(value, zone):
    """A date or an instant as a moment."""
    return (
        parse_moment(value, zone)
        if type(value) is date
        else parse_moment(pd.Timestamp(value), zone)
    )


DATED = st.one_of(
    st.dates(date(2024, 3, 25), date(2024, 4, 5)),
    st.datetimes(datetime(2024, 3, 25), datetime(2024, 4, 5)).map(
        lambda when: when.replace(microsecond=0)
    ),
)


@settings(max_examples=300)
@given(a=DATED, b=DATED, zone=st.sampled_from(ZONES))
def test_comparisons_agree_with_a_slow_reading(a, b, zone):
    x, y = either(a, zone), either(b, zone)
    assert (x < y) == slow.before(a, b, zone)
    days = pd.Series([type(a) is date or type(b) is date])
    assert each_before(pd.Series([x.when]), pd.Series([y.when]), days, zone).item() == (x < y)


@pytest.mark.slow
@settings(max_examples=much(80, 3000), deadline=None)
@given(
    rows=st.lists(st.tuples(DATED, *[st.one_of(st.none(), DATED)] * 3), min_size=1, max_size=8),
    days=st.integers(1, 9),
    zone=st.sampled_from(ZONES),
)
def test_labels_agree_with_a_slow_reading(rows, days, zone):
    for arrived, *_ in rows:  # A horizon that ends where the clock shows no such time is left out
        wall = slow.shown(arrived, zone) if type(arrived) is not date else None
        assume(wall is None or slow.instants(wall + timedelta(days=days), zone))
    study = replace(STUDY, horizon_days=days, time_zone=zone)
    columns = ("arrived", "event", "followed_until", "competing")
    frame = pd.DataFrame()
    for column, values in zip(columns, zip(*rows, strict=True), strict=True):
        read = [value and either(value, zone) for value in values]
        times = [one and one.when for one in read]
        frame[column] = pd.Series(times, dtype="datetime64[us]")
        frame[f"{column}_precision"] = [one and one.precision for one in read]
    labelled = label_outcomes(study, frame)
    want = [slow.label(*row, days, zone) for row in rows]
    assert labelled["y"].astype(object).where(labelled["y"].notna(), None).tolist() == want
    known = labelled["known_at"]
    assert known.notna().equals(labelled["y"].notna()) and not (known < frame["arrived"]).any()


def test_a_column_of_midnights_holds_days():
    texts = ["2024-05-31 00:00:00", "", "2024-06-01T00:00"]
    assert as_days(texts) == ["2024-05-31", "", "2024-06-01"]
    for other in ("2024-06-01T00:01", "2024-06-01T00:00Z", "soon"):
        assert as_days([*texts, other]) == [*texts, other]


def test_a_horizon_of_days_ends_at_the_same_hour_and_one_of_hours_when_they_have_passed():
    before = parse_moment("2024-03-30T10:00", "Europe/Berlin")  # The clocks go forward on the 31st
    assert before.plus(pd.Timedelta(days=1)).wall == pd.Timestamp("2024-03-31T10:00")
    assert before.plus(pd.Timedelta(hours=30)).wall == pd.Timestamp("2024-03-31T17:00")
    assert str(Moment(before.when, "day", "Europe/Berlin")) == "2024-03-30 (Europe/Berlin)"

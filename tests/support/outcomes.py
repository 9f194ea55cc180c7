"""Slow, plain implementation of what an outcome may say and which one counts: the oracle."""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo


def moment(value, zone="UTC"):
    """ISO text as (UTC time without zone, whether it is a day only)."""
    day = len(value) == 10
    when = datetime.fromisoformat(value)
    if when.tzinfo is None:
        when = when.replace(tzinfo=ZoneInfo(zone))
    return when.astimezone(ZoneInfo("UTC")).replace(tzinfo=None), day


def local_day(when, zone):
    return when.replace(tzinfo=ZoneInfo("UTC")).astimezone(ZoneInfo(zone)).date()


def earlier(a, b, zone="UTC"):
    """Whether a is before b; on local days where one of them is a day."""
    if a[1] or b[1]:
        return local_day(a[0], zone) < local_day(b[0], zone)
    return a[0] < b[0]


def end_of_horizon(arrived, days, zone="UTC"):
    if not arrived[1]:  # The same hour, so many days later
        there = arrived[0].replace(tzinfo=ZoneInfo("UTC")).astimezone(ZoneInfo(zone))
        return moment((there.replace(tzinfo=None) + timedelta(days=days)).isoformat(), zone)[
            0
        ], False
    day = local_day(arrived[0], zone) + timedelta(days=days)
    return moment(day.isoformat(), zone)


def acceptable(row, arrived, days, now, zone="UTC"):
    """Whether an outcome of ISO texts can be true, one rule after the other."""
    arrived = moment(arrived, zone)
    due = end_of_horizon(arrived, days, zone)
    times = {
        field: moment(row[field], zone)
        for field in ("known_at", "event", "followed_until", "competing")
        if row.get(field)
    }
    latest = (moment(now)[0] + timedelta(hours=1), False)
    y, known = row["y"], times.get("known_at")
    if y not in (0, 1, None) or known is None:
        return False
    for when in times.values():
        if earlier(when, arrived, zone) or earlier(latest, when, zone):
            return False
    event, until, competing = (times.get(k) for k in ("event", "followed_until", "competing"))
    if until and any(when and earlier(until, when, zone) for when in (event, competing)):
        return False
    event_counts = event is not None and not earlier(due, event, zone)
    ended = competing is not None and not earlier(due, competing, zone)
    if y is None:
        if event is not None or competing is not None or until is None:
            return False
        return earlier(until, due, zone) and not earlier(known, until, zone)
    if y == 1:
        if event is None:
            return True
        if not event_counts or earlier(known, event, zone):
            return False
        return not (ended and earlier(competing, event, zone))
    if event_counts and not (ended and earlier(competing, event, zone)):
        return False
    if ended:
        return not earlier(known, competing, zone)
    if earlier(known, due, zone):
        return False
    return until is None or not earlier(until, due, zone)


def counting(entries, as_of):
    """Of (number, known_at, y, withdrawn_at) the last entered of those known at `as_of`."""
    known = [e for e in entries if e[1] <= as_of and (e[3] is None or e[3] > as_of)]
    return max(known, key=lambda e: e[0], default=None)

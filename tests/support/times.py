"""A slow, plain reading of times: what `lm.core.times` must agree with."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo


def instants(wall, zone):
    """All instants (UTC, without zone) at which the clock of `zone` shows `wall`."""
    moments = []
    for quarters in range(-15 * 4, 15 * 4 + 1):
        moment = (wall - timedelta(minutes=15 * quarters)).replace(tzinfo=UTC)
        if moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None) == wall:
            moments.append(moment.replace(tzinfo=None))
    return sorted(moments)


def shown(moment, zone):
    """What the clock of `zone` shows at an instant."""
    return moment.replace(tzinfo=UTC).astimezone(ZoneInfo(zone)).replace(tzinfo=None)


def first_instant(day, zone):
    """The first minute of a local day, by walking through the two days around it."""
    moment = datetime(day.year, day.month, day.day) - timedelta(hours=30)
    while shown(moment, zone).date() < day:
        moment += timedelta(minutes=15)
    return moment


def before(a, b, zone):
    """Whether `a` is surely before `b`; each a date, or an instant in UTC."""
    if type(a) is date or type(b) is date:
        days = [v if type(v) is date else shown(v, zone).date() for v in (a, b)]
        return days[0] < days[1]
    return a < b


def day_of(when, zone):
    """The local day of a date or an instant."""
    return when if type(when) is date else shown(when, zone).date()


def against(when, arrived, days, zone):
    """-1, 0 or 1: `when` is before, at or after the end of a horizon of so many days."""
    if date in (type(arrived), type(when)):
        a, b = day_of(when, zone), day_of(arrived, zone) + timedelta(days=days)
    else:
        a, b = when, instants(shown(arrived, zone) + timedelta(days=days), zone)[0]
    return (a > b) - (a < b)


def label(arrived, event, followed, other, days, zone):
    """y of one patient; each time is a date, an instant in UTC, or None."""
    in_time = event is not None and against(event, arrived, days, zone) <= 0
    if in_time and not (other is not None and before(other, event, zone)):
        return 1
    if other is not None and against(other, arrived, days, zone) <= 0:
        return 0
    return 0 if followed is not None and against(followed, arrived, days, zone) >= 0 else None

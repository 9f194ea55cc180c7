"""What a value means, slowly and plainly: the oracle of the property test over entry points."""

import math
import unicodedata
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from zoneinfo import ZoneInfo

DIGITS = "0123456789"


class No(Exception):
    """The value is refused."""


def missing(value, texts):
    """Whether the value is missing."""
    if isinstance(value, str):
        return value.strip() == "" or value.strip() in texts
    return value is None or (isinstance(value, float) and math.isnan(value))


def digits(text):
    """How many plain digits a text begins with."""
    n = 0
    while n < len(text) and text[n] in DIGITS:
        n += 1
    return n


def plain_number(text):
    """Whether a text is -digits[.digits][e+-digits], read letter by letter."""
    text = text.removeprefix("-")
    whole = digits(text)
    text, part = text[whole:], 0
    if text.startswith("."):
        part = digits(text[1:])
        text = text[1 + part :]
    if whole + part == 0:
        return False
    if text[:1] in ("e", "E"):
        text = text[1:]
        text = text[1:] if text[:1] in ("+", "-") else text
        return text != "" and digits(text) == len(text)
    return text == ""


def number(value, low, high):
    """A float within the range."""
    if isinstance(value, str):
        text = value.strip()
        if not plain_number(text) or len(text) > 30:
            raise No
        exponent = text.lower().partition("e")[2] or "0"
        value = Fraction(text.rstrip(".")) if abs(int(exponent)) < 400 else Fraction(0)
        if abs(int(exponent)) >= 400:
            value = Fraction(0) if float(text) == 0 else Fraction(10) ** 400
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction, Decimal)):
        raise No
    if isinstance(value, float) and math.isinf(value):
        raise No
    if not Fraction(low) <= Fraction(value) <= Fraction(high):
        raise No
    return float(value) + 0.0


def word(value, levels):
    """One of the words."""
    if value is True or value is False:
        value = str(value).lower()
    elif isinstance(value, (int, float)):
        value = str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)
    if not isinstance(value, str):
        raise No
    for level in levels:
        if unicodedata.normalize("NFC", value.strip()) == unicodedata.normalize("NFC", level):
            return level
    raise No


def moment(value, zone):
    """UTC of text in one of three shapes, of a date, or of a time with its offset."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None)
    if isinstance(value, date):
        value = value.isoformat()
    if not isinstance(value, str) or not value.isascii():
        raise No
    text = value.strip()
    day, rest = text[:10], text[10:]
    if len(day) != 10 or [day[4], day[7]] != ["-", "-"]:
        raise No
    if not all(letter in DIGITS for letter in day.replace("-", "", 2)):
        raise No
    try:
        midnight = datetime(int(day[:4]), int(day[5:7]), int(day[8:]))
    except ValueError:
        raise No from None
    if rest == "":
        return midnight.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC).replace(tzinfo=None)
    hours, _, offset = rest[1:].replace("Z", "+00:00").partition("+")
    parts = hours.split(":")
    if rest[0] not in "T " or len(parts) not in (2, 3) or any(len(p) != 2 for p in parts):
        raise No
    if not all(letter in DIGITS for part in parts for letter in part):
        raise No
    there = [int(part) for part in parts] + [0] * (3 - len(parts))
    if there[0] > 23 or max(there[1:]) > 59:
        raise No
    when = midnight + timedelta(hours=there[0], minutes=there[1], seconds=there[2])
    if offset:
        return when - timedelta(hours=int(offset[:2]), minutes=int(offset[3:]))
    local = when.replace(tzinfo=ZoneInfo(zone))
    if local.utcoffset() != local.replace(fold=1).utcoffset():
        raise No  # The clock showed it twice, or never
    return local.astimezone(UTC).replace(tzinfo=None)


def features(study, row):
    """The typed features of a row. Raises `No`."""
    values = {}
    for feature in study.features:
        value = row[feature.name]
        if missing(value, study.missing_words):
            if feature.missing == "refused":
                raise No
            values[feature.name] = None
        elif feature.kind == "number":
            values[feature.name] = number(value, feature.low, feature.high)
        else:
            values[feature.name] = word(value, feature.levels)
    return values

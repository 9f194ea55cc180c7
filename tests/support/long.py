"""How far a campaign goes: short in `make test`, long in `make campaigns`."""

import os

LONG = bool(os.environ.get("LM_LONG"))


def much(short, long):
    """How many examples, deaths or patients."""
    return long if LONG else short

"""Lines of the journal as the store writes them."""

import json

from lm.data.journal import framed
from support.ward import START, STUDY, answer, patient, reasons


def line(number, arrived=START, **over):
    """The line of one record with its prediction and explanation."""
    row = patient(number, arrived.isoformat())
    who, when = {"record_id": row["record_id"]}, arrived.isoformat()
    served = {name: row[name] for name in STUDY.feature_names}
    alone = {"why": "champion", "shadow_version": None, "shadow": None}
    parts = {
        "records": row | {"known_at": when, "source": "", "received": "{}"},
        "predictions": who | {"predicted_at": when} | served | alone | answer() | over,
        "explanations": who | {"version": 1} | reasons(),
    }
    return framed(json.dumps(parts).encode())

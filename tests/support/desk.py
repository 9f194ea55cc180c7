"""A client in memory for the pages, and what a reader sees of their widgets."""

import ipywidgets as widgets
import numpy as np
import pandas as pd

from lm.core.errors import LMError
from lm.core.study_rows import read_rows

NASTY = "<script>alert(1)</script>"


class Desk:
    """A client in memory: monica's first patients, one logistic model that knows age only."""

    def __init__(self, study, n=400):
        self.study_ = study
        rows = read_rows(study)
        self.rows = rows[rows.arrived >= study.first_model].head(n).reset_index(drop=True)
        self.decisions = []
        self.updates = [(study.first_model, "first", "enough outcomes", None, 1)]
        self.verdicts = [(rows.arrived.iloc[n], "nothing", "O:E is within its interval", 1)]
        self.outcomes_ = set(self.rows.record_id[self.rows.y.notna()])
        self.champion, self.jobs, self.lost = 1, {}, False

    def _check(self):
        if self.lost:
            raise LMError("the service does not answer")

    def log_odds(self, frame, version=1):
        return -1.7 + 0.06 * (frame["age"] - 58) + 0.3 * (version - 1)

    def status(self):
        self._check()
        n = len(self.rows)
        counts = {"records": n, "predictions": n, "outcomes": len(self.outcomes_), "rejects": 0}
        return {
            **{"study": "monica", "title": "t", "champion": self.champion, "challenger": None},
            **{"since": "1987-01-01T00:00:00", "clock": "1987-12-01T00:00:00"},
            **{"counts": counts | {"decisions": len(self.decisions)}},
        }

    def known(self, as_of=None):
        self._check()
        z = self.log_odds(self.rows)
        return self.rows.assign(
            version=1, risk=1 / (1 + np.exp(-z)), log_odds=z, y_known_at=self.rows.known_at
        )

    def table(self, name, as_of=None, last=None, record_id=None):
        self._check()
        columns = {
            "decisions": ["record_id", "clinician", "action", "reason", "decided_at"],
            "updates": ["as_of", "action", "reason", "from_version", "to_version"],
            "verdicts": ["as_of", "action", "reason", "version"],
        }
        if name == "outcomes":
            return pd.DataFrame({"record_id": sorted(self.outcomes_)})
        return pd.DataFrame(getattr(self, name), columns=columns[name])

    def models(self):
        return pd.DataFrame(
            {
                **{"version": [1, 2], "made_for": pd.to_datetime(["1987-01-01", "1989-01-01"])},
                **{
                    "reason": ["first", NASTY],
                    "aliases": [["champion"], []],
                    "brier": [0.16, 0.15],
                },
            }
        )

    def risks(self, version, as_of=None):
        risk = 1 / (1 + np.exp(-self.log_odds(self.rows, version)))
        columns = {"record_id": self.rows.record_id, "risk": risk, "trained_on": False}
        return pd.DataFrame(columns)

    def explain(self, record_id):
        self._check()
        known = self.known().set_index("record_id")
        if record_id not in known.index:
            raise LMError(f"record {record_id!r} is unknown")
        row = known.loc[record_id]
        features = {name: row[name] for name in self.study_.feature_names}
        shares = dict.fromkeys(features, 0.0) | {"age": row.log_odds + 1.7}
        decisions = [d for d in self.table("decisions").to_dict("records")]
        return {
            **{"record_id": record_id, "arrived": str(row.arrived), "version": 1, "base": -1.7},
            **{"risk": row.risk, "low": row.risk * 0.8, "high": row.risk * 1.2},
            **{"log_odds": row.log_odds, "contributions": shares, "features": features},
            **{"sentence": f"Age matters {NASTY}.", "y": None},
            **{"decisions": [d for d in decisions if d["record_id"] == record_id]},
        }

    def add_decision(self, record_id, clinician, action, reason="", now=None):
        self._check()
        self.decisions.append((record_id, clinician, action, reason, pd.Timestamp("1988-01-01")))

    def has(self, record_id):
        return record_id in set(self.rows.record_id)

    def has_outcome(self, record_id):
        return record_id in self.outcomes_

    def receive(self, row, now=None, source=""):
        self.rows = pd.concat([self.rows, pd.DataFrame([row])], ignore_index=True)
        return {"record_id": row["record_id"]}

    def add_outcomes(self, frame, source=""):
        self.outcomes_ |= set(frame["record_id"])
        return {"accepted": len(frame), "refused": []}

    def run(self, notebook, parameters):
        assert parameters == {"study": "monica"}
        self.jobs[notebook] = 2
        return {"job": notebook, "state": "running"}

    def job(self, job):
        self.jobs[job] -= 1
        if self.jobs[job]:
            return {"job": job, "state": "running"}
        if job == "retrain":
            return {
                "job": job,
                "state": "failed",
                "log": "Traceback\nLMError: no verdict to act on",
            }
        self.verdicts.append((pd.Timestamp("1988-01-01"), "recalibrate", "O:E 0.71", 1))
        return {"job": job, "state": "done"}

    def rollback(self, to=None, reason="", by=""):
        raise LMError("there is no earlier version to go back to")


def html_of(panel):
    """All HTML that a panel holds."""
    texts, todo = [], [panel]
    while todo:
        widget = todo.pop()
        todo += getattr(widget, "children", ())
        if isinstance(widget, widgets.HTML):
            texts.append(widget.value)
    return "\n".join(texts)


def buttons(panel):
    by_label, todo = {}, [panel]
    while todo:
        widget = todo.pop()
        todo += getattr(widget, "children", ())
        if isinstance(widget, widgets.Button):
            by_label[widget.description] = widget
    return by_label

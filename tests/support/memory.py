"""A store as a plain Python list: slow, and easy to believe. The oracle of test_corrections."""

from datetime import timedelta


class Memory:
    """Records, outcomes and withdrawals in the order in which they were entered."""

    def __init__(self, horizon_days):
        self.horizon = timedelta(days=horizon_days)
        self.records, self.outcomes, self.withdrawn = [], [], []

    def first(self, name):
        """The first record of a chain of corrections."""
        record = next(r for r in self.records if r["record_id"] == name)
        return name if record["corrects"] is None else self.first(record["corrects"])

    def gone(self, kind, key, as_of):
        return any(
            w["kind"] == kind and w["key"] == key and w["as_of"] <= as_of for w in self.withdrawn
        )

    def counting(self, as_of):
        """Records that count at a moment: of each chain the one entered last."""
        last = {}
        for record in self.records:
            name = record["record_id"]
            if record["known_at"] <= as_of and not self.gone("record", name, as_of):
                last[self.first(name)] = record
        return last

    def outcome(self, first, as_of):
        """The outcome that counts for a chain."""
        entry = [o for o in self.outcomes if self.known_root(o["record_id"], as_of) == first]
        entry = [o for o in entry if o["known_at"] <= as_of]
        entry = [o for o in entry if not self.gone("outcome", o["seq"], as_of)]
        entry = [o for o in entry if not self.gone("record", o["record_id"], as_of)]
        return entry[-1] if entry else None

    def known_root(self, name, as_of):
        """The chain of a record; one that is not known yet stands for itself."""
        record = next(r for r in self.records if r["record_id"] == name)
        return self.first(name) if record["known_at"] <= as_of else name

    def known(self, as_of):
        """record_id -> y where the horizon has passed, None where it is not known."""
        answer = {}
        for first, record in self.counting(as_of).items():
            entries = self.outcome(first, as_of)
            matured = record["arrived"] + self.horizon <= as_of
            answer[record["record_id"]] = entries["y"] if entries and matured else None
        return answer

    def clock(self):
        """The latest moment at which something that is not withdrawn became known."""
        ever = max((w["as_of"] for w in self.withdrawn), default=None)
        known = [
            r["known_at"]
            for r in self.records
            if not (ever and self.gone("record", r["record_id"], ever))
        ]
        known += [
            o["known_at"]
            for o in self.outcomes
            if not (
                ever
                and (
                    self.gone("outcome", o["seq"], ever)
                    or self.gone("record", o["record_id"], ever)
                )
            )
        ]
        return max(known, default=None)

"""Source and trigger: order, no look-ahead, known truth, resuming, rate, stop."""

import threading
from functools import cache

import numpy as np
import pandas as pd
import pytest
from support.waiting import PATIENCE

from lm.core.errors import LMError
from lm.core.labels import label_outcomes
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import check_row
from lm.data.source import Event, outcomes, placed, read_file, read_sql, refusals, stream
from lm.data.synthetic import SCENARIOS, Drift, shuffled, synthetic, true_coefficients
from lm.data.trigger import Trigger
from lm.machine.machine import Machine

STUDIES = ("monica", "rotterdam", "rotterdam_5y", "gbsg")


class Memory:
    """A machine that remembers, and checks that nothing arrives before it is known."""

    def __init__(self, study, broken_at=None):
        self.study, self.records, self.labels, self.calls = study, {}, {}, []
        self.now, self.broken_at = {}, broken_at

    def _hear(self, when, *call):
        assert when >= self.now.get(call[0], when), "time ran backwards"
        if len(self.calls) == self.broken_at:
            self.broken_at = None
            raise LMError("the disk is full")
        self.now[call[0]] = when
        self.calls.append((when, *call))

    def receive(self, row, now=None, source=""):
        check_row(self.study, row)
        assert row["record_id"] not in self.records, "sent twice"
        self._hear(now, "record", row["record_id"])
        self.records[row["record_id"]] = row
        return {"record_id": row["record_id"], "risk": 0.1}

    def add_outcome(self, record_id, y, known_at, event=None, followed_until=None):
        assert (y is None) == (not pd.isna(followed_until)), "followed_until belongs to losses"
        assert record_id in self.records, "outcome of a patient who never came"
        assert record_id not in self.labels, "a second outcome"
        self._hear(known_at, "outcome", record_id)
        self.labels[record_id] = y

    def add_outcomes(self, frame, source=""):
        for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
            self.add_outcome(**row)
        return {"accepted": len(frame), "refused": []}

    def has(self, record_id):
        return record_id in self.records

    def has_outcome(self, record_id):
        return record_id in self.labels


def few(study, n=120):
    return read_rows(study).head(n)


def by_kind(machine):
    """What came, records and outcomes apart: each in the order in which it became known."""
    return [[c for c in machine.calls if c[1] == kind] for kind in ("record", "outcome")]


# ---------------------------------------------------------------- stream


@pytest.mark.parametrize("name", STUDIES)
def test_a_stream_never_uses_the_future(name):
    study = load_study(name)
    rows = read_rows(study).set_index("record_id")
    last, came = pd.Timestamp.min, set()
    for when, kind, row in stream(study):
        assert when >= last
        last = when
        if kind == "record":
            came.add(row["record_id"])
            assert row["arrived"] == when
            assert not {"y", "event", "followed_until", "known_at", "truth"} & row.keys()
        else:
            truth = rows.loc[row["record_id"]]
            assert row["record_id"] in came and when == row["known_at"]
            due = truth["arrived"] + study.horizon
            if row["y"] is None:
                assert when == row["followed_until"] == truth["followed_until"] < due
                assert pd.isna(truth["y"]) and row["event"] is None
                continue
            assert when == truth["known_at"] and row["y"] == truth["y"]
            assert "followed_until" not in row
            assert when == (truth["event"] if row["y"] else due)
            assert (row["event"] is not None) == bool(row["y"])
    assert came == set(rows.index)
    result = outcomes(study, rows.reset_index())
    assert len(result) == len(rows) and (result["y"].isna().to_numpy() == rows["y"].isna()).all()


def test_an_outcome_goes_before_a_new_patient_of_the_same_minute_but_not_before_its_own():
    study = load_study("monica")
    rows = few(study, 2)
    rows["arrived"] = pd.to_datetime(["2000-01-01", "2000-01-29"])
    rows["event"] = pd.to_datetime([None, "2000-01-29"])
    rows["followed_until"] = pd.Timestamp("2000-03-01")
    a, b = rows["record_id"]
    order = [(e.kind, e.row["record_id"]) for e in stream(study, label_outcomes(study, rows))]
    assert order == [("record", a), ("outcome", a), ("record", b), ("outcome", b)]


def test_missing_features_travel_as_none():
    study = load_study("rotterdam")
    rows = few(study, 3)
    rows.loc[0, ["er", "size"]] = None
    row = next(stream(study, rows)).row
    assert row["er"] is None and row["size"] is None and isinstance(row["age"], float)


def test_a_raw_file_keeps_what_stood_in_it(tmp_path):
    study = load_study("rotterdam")
    raw = pd.read_csv(study.rows, dtype=str, keep_default_na=False).head(6)
    raw.loc[2, "arrived"] = "last Tuesday"
    raw.loc[3, "age"] = "forty"
    raw.to_csv(tmp_path / "clinic.csv", index=False)
    machine = Memory(study)
    trigger = Trigger(machine, stream(study, read_file(study, tmp_path / "clinic.csv")))
    assert trigger.until("2100-01-01") == 6
    assert list(trigger.refused) == [raw["record_id"][2], raw["record_id"][3]]
    assert "'last Tuesday'" in trigger.refused[raw["record_id"][2]]
    assert "'forty'" in trigger.refused[raw["record_id"][3]]
    assert len(machine.records) == 4 and machine.labels.keys() <= machine.records.keys()


def test_a_file_in_parquet_and_a_query_give_the_same_stream(tmp_path):
    import duckdb

    study = load_study("gbsg")
    rows = few(study, 20)
    rows.to_parquet(tmp_path / "rows.parquet")
    want = list(stream(study, rows))
    results = list(stream(study, read_file(study, tmp_path / "rows.parquet")))
    assert [event[:2] for event in results] == [event[:2] for event in want]
    for one, other in zip(results, want, strict=True):
        names = ("record_id", *(study.feature_names if one.kind == "record" else ("y", "event")))
        assert [one.row[name] for name in names] == [other.row[name] for name in names]
    with duckdb.connect() as connection:
        query = f"SELECT * FROM '{tmp_path / 'rows.parquet'}'"
        first = next(stream(study, read_sql(query, connection))).row
        assert check_row(study, first)["arrived"] == want[0].row["arrived"]
        with pytest.raises(LMError, match="the query failed"):
            read_sql("SELECT nothing FROM nowhere", connection)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "record_id,arrived\n", "lacks the columns sex, age"),
        ("a.csv", "record_id,arrived,sex,age,premi,smstat,diabetes,highbp,hichol,angina,stroke\n",
         "has no rows"),
        ("a.csv", 'a,b\n"1,2\n3,4,5\n', "line 2: unexpected end"),
        ("a.parquet", "no parquet", "is no Parquet file"),
        ("a.txt", "x", "its name must end in .csv"),
        (None, "", "is not there"),
    ],
)  # fmt: skip
def test_a_bad_file_gets_one_sentence(tmp_path, name, text, sentence):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(LMError, match=sentence) as caught:
        read_file(load_study("monica"), tmp_path / (name or "absent.csv"))
    assert "\n" not in str(caught.value)


def test_an_unreadable_date_of_an_event_is_not_taken_for_no_event():
    study = load_study("rotterdam")
    raw = few(study, 5).drop(columns=["y", "known_at"]).astype({"event": "str"})
    raw.loc[1, "event"] = "in May"
    with pytest.raises(LMError, match="event = 'in May'"):
        stream(study, raw)


# ---------------------------------------------------------------- synthetic


@cache
def unchanged():
    study = load_study("rotterdam")
    return study, synthetic(study, 600, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["sudden", "gradual", "recurring"])
@pytest.mark.parametrize("kind", SCENARIOS)
def test_a_drift_touches_no_patient_before_it_starts_and_some_after(kind, shape):
    study, still = unchanged()
    drift = Drift(kind, start=200, shape=shape, over=100)
    moved = synthetic(study, 600, seed=3, drift=drift)
    assert moved.head(200).equals(still.head(200)) and not moved.equals(still)
    assert moved.equals(synthetic(study, 600, seed=3, drift=drift))
    if shape == "recurring":
        assert moved.iloc[300:400].equals(still.iloc[300:400])
    recorded = kind in ("unit", "unit30", "missing", "level")
    assert moved["truth"].equals(still["truth"]) == recorded
    assert moved["arrived"].equals(still["arrived"])


def test_a_synthetic_study_has_the_shape_of_a_real_one():
    for name in ("monica", "rotterdam"):
        study = load_study(name)
        rows = synthetic(study, 400, seed=5)
        real = read_rows(study)
        assert list(rows) == [*real, "truth"] and rows.drop(columns="truth").dtypes.equals(
            real.dtypes
        )
        assert rows["arrived"].is_unique and rows["arrived"].is_monotonic_increasing
        assert rows["truth"].between(0, 1).all() and rows["y"].notna().all()
        assert label_outcomes(study, rows)[["y", "known_at"]].equals(rows[["y", "known_at"]])
        assert not synthetic(study, 400, seed=6)["truth"].equals(rows["truth"])


def test_outcomes_follow_the_known_risk():
    rows = synthetic(load_study("rotterdam"), 20_000, seed=7, drift=Drift("label", 0))
    p, y = rows["truth"], rows["y"]
    for risks in pd.qcut(p, 5, labels=False).to_frame("fifth").groupby("fifth").groups.values():
        part, seen = p[risks], y[risks]
        assert abs(seen.sum() - part.sum()) < 4 * np.sqrt((part * (1 - part)).sum())


def test_delay_and_pace():
    study = load_study("monica")
    rows = synthetic(study, 2000, seed=1, per_day=10, delay_days=7)
    days = (rows["arrived"].max() - rows["arrived"].min()) / pd.Timedelta(days=1)
    assert 180 < days < 220
    late = rows["known_at"] - label_outcomes(study, rows)["known_at"]
    assert (late == pd.Timedelta(days=7)).all()


def test_the_truth_does_not_depend_on_the_seed_and_drops_censored_patients():
    study = load_study("rotterdam")
    real = read_rows(study)
    assert np.array_equal(true_coefficients(study, real), true_coefficients(study, real))
    known = real[real["y"].notna()]
    assert np.isfinite(true_coefficients(study, known)).all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda s: Drift("storm", 0), "drift kind 'storm'"),
        (lambda s: Drift("unit", 0, shape="round"), "drift shape 'round'"),
        (lambda s: Drift("unit", -1), "start at patient 0"),
        (lambda s: Drift("label", 0, size=0), "size above 0"),
        (lambda s: synthetic(s, 0, 0), "n >= 1"),
        (lambda s: synthetic(s, 5, 0, Drift("unit", 0)), "needs one of age"),
        (lambda s: synthetic(s, 5, 0, Drift("level", 0, feature="age")), "needs one of sex, premi"),
    ],
)
def test_a_drift_that_makes_no_sense_is_refused(make, sentence):
    with pytest.raises(LMError, match=sentence):
        make(load_study("monica"))


def test_shuffling_moves_whole_patients():
    study = load_study("rotterdam")
    rows = read_rows(study)
    mixed = shuffled(rows, seed=4)
    assert mixed["arrived"].equals(rows["arrived"]) and mixed.equals(shuffled(rows, seed=4))
    pair = rows.merge(mixed, on="record_id", suffixes=("", "_new"))
    for name in study.feature_names:
        assert pair[name].equals(pair[name + "_new"])
    for name in ("event", "followed_until", "known_at"):
        assert (pair[name] - pair["arrived"]).equals(pair[name + "_new"] - pair["arrived_new"])
    assert pair["y"].equals(pair["y_new"]) and (pair["arrived"] != pair["arrived_new"]).mean() > 0.9


def test_a_refused_row_is_named_by_where_it_stands_not_by_its_record():
    index = pd.Index([2, 3, 4, 5, 6], name="line")
    rows = pd.DataFrame({"record_id": ["a", " b ", 6.0, None, "a"]}, index)
    bad = "record {!r}: age = 640 breaks the rule: 18 to 110 years"
    names = ["b", "6", "?", "a", "gone"]
    answers = pd.DataFrame({"record_id": names, "error": ["", *map(bad.format, names[1:])]})
    result = placed(rows, answers)
    assert result["place"].tolist() == ["line 3", "line 4", "line 5", "line 2, line 6", ""]
    results = refusals(result)
    assert results[0] == "line 4: age = 640 breaks the rule: 18 to 110 years" and len(results) == 4
    assert refusals(result, 2) == results[:2] and refusals(result[:1]) == []
    without = placed(rows.reset_index(drop=True), answers)["place"]
    assert without.tolist()[:2] == ["row 2", "row 3"]


# ---------------------------------------------------------------- trigger


@pytest.mark.parametrize("name", STUDIES)
def test_send_delivers_what_is_due_and_nothing_else(name):
    study = load_study(name)
    rows = few(study, 300)
    machine = Memory(study)
    trigger = Trigger(machine, stream(study, rows))
    for n in (1, 0, 40, 150):
        before = len(machine.records)
        assert trigger.send(n) == n == len(machine.records) - before
        known_at = rows["known_at"].fillna(rows["followed_until"])
        due = rows[known_at <= trigger.clock]["record_id"]
        assert set(machine.labels) <= set(due)
        before_last = rows[known_at < trigger.clock]["record_id"]
        assert set(before_last) <= set(machine.labels)
    assert trigger.send(10_000) == 300 - 191
    truth = rows.set_index("record_id")["y"].astype(object)
    assert machine.labels == truth.where(truth.notna(), None).to_dict()
    assert trigger.send() == 0
    with pytest.raises(LMError, match="has ended"):
        trigger.step()


def test_a_broken_stream_is_taken_up_where_it_broke():
    study = load_study("monica")
    rows = few(study)
    whole = Memory(study)
    Trigger(whole, stream(study, rows)).until("2100-01-01")
    machine = Memory(study)
    Trigger(machine, stream(study, rows)).send(50)
    Trigger(machine, stream(study, rows)).send(7)
    assert len(machine.records) == 57
    Trigger(machine, stream(study, rows)).until("2100-01-01")
    assert by_kind(machine) == by_kind(whole)


@pytest.mark.parametrize("broken_at", [0, 60, 61, 62, 63])
def test_an_event_that_the_machine_could_not_take_is_sent_again(broken_at):
    study = load_study("monica")
    rows = few(study, 60)
    whole, machine = Memory(study), Memory(study, broken_at=broken_at)
    Trigger(whole, stream(study, rows)).send(61)
    trigger = Trigger(machine, stream(study, rows))
    with pytest.raises(LMError, match="disk is full"):
        trigger.send(61)
    trigger.send(61)
    assert by_kind(machine) == by_kind(whole)


def test_until_is_inclusive_and_the_clock_never_goes_back():
    study = load_study("monica")
    rows = few(study)
    machine = Memory(study)
    trigger = Trigger(machine, stream(study, rows))
    tenth = rows["arrived"].iloc[9]
    assert trigger.until(tenth) == 10 and trigger.clock == tenth
    assert trigger.until(tenth - pd.Timedelta(days=3)) == 0 and trigger.clock == tenth
    assert trigger.until("2100-01-01") == 110 and trigger.peek() is None


def test_a_stream_out_of_order_is_refused():
    study = load_study("monica")
    a, b = list(stream(study, few(study, 2)))[:2]
    trigger = Trigger(Memory(study), [b, a])
    trigger.step()
    with pytest.raises(LMError, match="goes back in time"):
        trigger.step()


def test_a_refused_patient_stops_nothing_and_gets_no_outcome():
    study = load_study("monica")
    rows = few(study, 40)
    bad = [
        Event(e.when, e.kind, e.row | {"sex": "?"}) if i in (0, 5) else e
        for i, e in enumerate(stream(study, rows))
    ]
    machine = Memory(study)
    trigger = Trigger(machine, bad)
    trigger.until("2100-01-01")
    assert len(trigger.refused) == 2 and len(machine.records) == len(machine.labels) == 38
    assert all("sex = '?'" in sentence for sentence in trigger.refused.values())


def stored(machine):
    """Every table but the audit log, whose entries cover as many rows as a transaction has."""
    names = [name for name in machine.store.engine.schema.columns if name != "audit"]
    return {name: machine.store.queries.table(name) for name in names}


@pytest.mark.slow
def test_events_delivered_together_leave_the_store_as_events_delivered_one_by_one(tmp_path):
    """Also a refused record, a refused outcome, a loss, and a patient known on the same minute."""
    study = load_study("rotterdam")
    rows = few(study, 150)
    events = list(stream(study, rows))
    bad = next(i for i, e in enumerate(events) if e.kind == "outcome")
    events[bad] = events[bad]._replace(row=events[bad].row | {"known_at": rows["arrived"].min()})
    other = next(i for i, e in enumerate(events) if e.kind == "record" and i > 20)
    events[other] = events[other]._replace(row=events[other].row | {"age": -1.0})
    with Machine(study, tmp_path / "one") as one, Machine(study, tmp_path / "many") as many:
        triggers = [Trigger(machine, events, ask=False) for machine in (one, many)]
        while triggers[0].peek():
            triggers[0].step()
        for day in pd.date_range(rows["arrived"].min(), periods=40, freq="180D"):
            triggers[1].until(day)
            known = [machine.known(day) for machine in (one, many)]
            pd.testing.assert_frame_equal(*known)  # What a monitoring run of that day sees
        tables = [stored(machine) for machine in (one, many)]
        assert not one.verify() and not many.verify()
    assert len(triggers[0].rejected) == len(triggers[0].refused) == 1
    assert triggers[0].rejected == triggers[1].rejected
    assert triggers[0].refused == triggers[1].refused and triggers[0].last == triggers[1].last
    assert len(tables[0]["outcomes"]) > 100 and len(tables[0]["records"]) == 149
    for name, table in tables[0].items():
        drop = ["received_at"] if name == "rejects" else []
        one, many = (t.drop(columns=drop) for t in (table, tables[1][name]))
        pd.testing.assert_frame_equal(one, many)


def test_what_the_disk_refused_together_comes_again_together(tmp_path, monkeypatch):
    study = load_study("monica")
    rows, ask = few(study, 60), {"ask": False}
    with Machine(study, tmp_path / "a") as whole, Machine(study, tmp_path / "b") as machine:
        Trigger(whole, stream(study, rows), **ask).until("2100-01-01")
        trigger, add = (
            Trigger(machine, stream(study, rows), **ask),
            machine.store.outcomes.append_many,
        )
        with monkeypatch.context() as patch:

            def full(frame):
                raise LMError("the disk is full")

            patch.setattr(machine.store.outcomes, "append_many", full)
            with pytest.raises(LMError, match="disk is full"):
                trigger.until("2100-01-01")
        assert machine.store.outcomes.append_many == add and trigger.clock is None
        trigger.until("2100-01-01")
        assert trigger.peek() is None
        for name in ("records", "outcomes"):
            left, right = (m.store.queries.table(name) for m in (machine, whole))
            pd.testing.assert_frame_equal(left, right)


@pytest.mark.parametrize("busy", [0.0, 0.05, 0.5])
def test_the_rate_holds_unless_the_machine_is_slower(busy):
    study = load_study("monica")
    clock, times = [100.0], []

    def sleep(seconds):
        assert seconds > 0
        clock[0] += seconds

    def on_sent(answer):
        times.append(clock[0] - 100)
        clock[0] += busy

    trigger = Trigger(Memory(study), stream(study, few(study)))
    assert trigger.at_rate(10, n=21, on_sent=on_sent, sleep=sleep, now=lambda: clock[0]) == 21
    assert times == pytest.approx([i * max(0.1, busy) for i in range(21)])


def test_stop_ends_a_long_wait_at_once():
    study = load_study("monica")
    machine, stop = Memory(study), threading.Event()
    trigger = Trigger(machine, stream(study, few(study)))
    runner = threading.Thread(
        target=trigger.at_rate, args=(1e-4,), kwargs={"stop": stop, "on_sent": lambda a: stop.set()}
    )
    runner.start()
    runner.join(timeout=PATIENCE)
    assert not runner.is_alive() and len(machine.records) == 1


def test_at_rate_ends_with_the_stream_and_refuses_nonsense():
    study = load_study("monica")
    trigger = Trigger(Memory(study), stream(study, few(study, 5)))
    assert trigger.at_rate(1e6) == 5
    for rate in (0, -1, float("nan")):
        with pytest.raises(LMError, match="more than 0 patients a second"):
            trigger.at_rate(rate)


def test_two_threads_share_one_stream_without_losing_or_doubling_patients():
    study = load_study("monica")
    machine = Memory(study)
    trigger = Trigger(machine, stream(study, few(study)))
    threads = [threading.Thread(target=trigger.send, args=(30,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(machine.records) == 120

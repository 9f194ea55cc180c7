"""Rates of faults against a slow count of our own, limits against scipy, and the empty cases."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import betabinom, binom, binomtest, fisher_exact

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import check_rows
from lm.data.store import Store
from lm.monitor.data_quality import (
    ALLOWED,
    OWN_FIELDS,
    classify,
    exact_interval,
    faults_of,
    largest_count,
    quality,
    quality_by_period,
    quality_messages,
)

STUDY = load_study("rotterdam")
COLUMNS = ["kind", "record_id", "field", "value", "rule", "message", "source", "received"]
COLUMNS = [*COLUMNS, "received_at"]
SENT = read_rows(STUDY)[["record_id", "arrived", *STUDY.feature_names]].iloc[:600].astype(object)
SENT["source"] = np.where(np.arange(600) % 2, "a", "b")
SINCE = SENT["arrived"].iloc[399]


def refuse(errors):
    """Refusals as the store keeps them."""
    rows = [
        ["record", r["record_id"], e.field, str(e.value), e.rule, str(e), r["source"]]
        for r, e in errors
    ]
    table = pd.DataFrame(rows, columns=COLUMNS[:-2])
    table["received"] = [json.dumps(r, default=str) for r, _ in errors]
    return table.assign(received_at=[r["arrived"] for r, _ in errors])


def arrive(rows):
    """Records and rejects of these rows."""
    good, bad = check_rows(STUDY, rows)
    source = dict(zip(rows["record_id"], rows["source"], strict=True))
    return good.assign(source=good["record_id"].map(source).astype(object)), refuse(bad)


def spoiled(field, value, share=0.3, start=400, source="a"):
    """The stream with a share of one source's values replaced from `start` on."""
    rows = SENT.copy()
    chosen = (np.arange(600) >= start) & (rows["source"] == source).to_numpy()
    chosen &= np.random.default_rng(1).random(600) < share
    rows.loc[chosen, field] = value
    return rows, int(chosen.sum())


def one(table, source, field, what):
    """The row of a table."""
    result = table[
        (table["source"] == source) & (table["field"] == field) & (table["what"] == what)
    ]
    assert len(result) == 1
    return result.iloc[0]


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("age", 340, "out of range"),
        ("age", None, "missing"),
        ("er", None, "missing"),
        ("pgr", "many", "unreadable"),
        ("nodes", True, "unreadable"),
        ("size", "unk", "unseen level"),
        ("arrived", "soon", "unreadable"),
        ("arrived", "1066-10-14", "out of range"),
        ("record_id", None, "missing"),
    ],
)
def test_every_fault_is_detected_counted_and_reported(field, value, what):
    rows, count = spoiled(field, value)
    records, rejects = arrive(rows)
    if field == "arrived":
        rejects["received_at"] = SENT["arrived"].iloc[-1]
    rejects["source"] = "a"
    table = quality(STUDY, records, rejects, since=SINCE)
    row = one(table, "a", field, what)
    assert (row["count"], row["patients"]) == (count, 100)
    assert row["over"] and row["began"] > SINCE
    assert set(table.loc[table["over"], "source"]) == {"a"}
    assert set(table.loc[table["over"], "field"]) <= {field, "row"}
    phrases = quality_messages(table)
    assert f"{count} of 100 patients" in phrases[0] and "source 'a'" in phrases[0]


def test_an_absent_column_is_reported_once():
    rows = SENT.iloc[400:]
    records, rejects = arrive(rows[rows["source"] == "a"].drop(columns="er"))
    table = quality(STUDY, records, rejects, reference=arrive(SENT.iloc[:400]))
    assert one(table, "a", "er", "absent column")["rate"] == 1
    assert (
        len(quality_messages(table)) == 1
        and "the column er is absent in 100 of 100" in quality_messages(table)[0]
    )


def test_a_fault_behind_another_is_detected():
    rows, count = spoiled("pgr", 99999)
    rows["age"] = 500
    table = quality(STUDY, *arrive(rows), since=SINCE)
    assert one(table, "a", "pgr", "out of range")["count"] == count
    assert one(table, "a", "age", "out of range")["rate"] == 1


def test_trying_again_changes_nothing_and_a_corrected_patient_counts_once():
    rows, count = spoiled("pgr", 99999)
    records, rejects = arrive(rows)
    table = quality(STUDY, records, rejects, since=SINCE)
    again = quality(STUDY, records, pd.concat([rejects] * 4), since=SINCE)
    assert again.equals(table)
    corrected = quality(STUDY, arrive(SENT)[0], rejects, since=SINCE)
    row = one(corrected, "a", "pgr", "out of range")
    assert (row["count"], row["patients"]) == (count, 100)


def test_refusals_without_a_name_are_patients_of_their_own():
    rejects = pd.DataFrame([dict.fromkeys(COLUMNS)] * 3).assign(
        kind=["record", "record", "outcome"], field="record_id", value="None"
    )
    rejects = rejects.assign(rule="a name of at most 100 characters", received_at=SINCE)
    table = quality(STUDY, SENT[:0], rejects)
    row = one(table, "", "record_id", "missing")
    assert (row["count"], row["patients"], row["rate"]) == (2, 2, 1)


def test_a_taken_name_is_a_conflict_of_the_name():
    rule = "the record_id is taken by a patient whose age is 44"
    assert classify(STUDY, "age", "45", rule) == "conflict"
    rejects = pd.DataFrame([["record", "x", "age", "45", rule, "", "a", "{}", SINCE]])
    table = quality(STUDY, SENT[:0], rejects.set_axis(COLUMNS, axis=1))
    assert one(table, "a", "record_id", "conflict")["count"] == 1
    assert table.query("field == 'age'")["count"].sum() == 0


def test_rules_of_the_study_are_all_known():
    watched = ALLOWED | OWN_FIELDS
    for feature in STUDY.features:
        for value in (None, "", "?", 1e9, True, float("inf"), [1]):
            row = SENT.iloc[0].to_dict() | {feature.name: value}
            for _, error in check_rows(STUDY, [row])[1]:
                what = classify(STUDY, error.field, error.value, error.rule)
                assert what in watched[feature.kind]
    assert len(set(faults_of(STUDY))) == len(faults_of(STUDY))


@pytest.mark.parametrize("received", ["", None, "no json", "[1, 2]", '"x"'])
def test_what_was_received_may_be_anything(received):
    row = ["record", "x", "age", "340", STUDY.feature("age").rule, "", None, received, SINCE]
    table = quality(STUDY, SENT[:0], pd.DataFrame([row], columns=COLUMNS))
    assert one(table, "", "age", "out of range")["count"] == 1
    assert table["count"].sum() == 2


@pytest.mark.parametrize("then", [(0, 300), (1, 300), (30, 300), (300, 300), (2, 40)])
@pytest.mark.parametrize("now", [1, 60, 400])
def test_limit_is_where_fisher_says(then, now):
    def p(x):
        sides = [[x, now - x], [then[0], then[1] - then[0]]]
        return fisher_exact(sides, alternative="greater").pvalue

    level = 1.7e-4
    most = largest_count(*then, now, level)
    assert p(most) > level
    assert most == now or p(most + 1) <= level


def test_limit_is_the_beta_binomial_prediction_with_one_fault_more():
    for count in (0, 3, 50):
        most = largest_count(count, 500, 200, 1e-4)
        assert betabinom.sf(most - 1, 200, count + 1, 500 - count) > 1e-4
        assert betabinom.sf(most, 200, count + 1, 500 - count) <= 1e-4


def test_the_level_holds_where_jeffreys_prior_exceeds_it():
    rate, then, now, level = 0.0538, 200, 1000, 1e-6
    counts, all_now = np.arange(45), np.arange(now + 1)
    drawn = binom.pmf(counts, then, rate)

    def crossing(limits):
        return drawn @ binom.sf(limits, now, rate) / level

    tails = [betabinom.pmf(all_now, now, c + 0.5, then - c + 0.5)[::-1].cumsum() for c in counts]
    jeffreys = [int(now - np.searchsorted(tail, level, side="right")) for tail in tails]
    assert 1.3 < crossing(jeffreys) < 1.6
    assert crossing([largest_count(int(c), then, now, level) for c in counts]) <= 1


def test_interval_is_that_of_scipy():
    for count, patients in ((0, 9), (1, 9), (4, 9), (9, 9)):
        results = [float(end) for end in exact_interval(count, patients, 0.9)]
        expected = binomtest(count, patients).proportion_ci(0.9, "exact")
        assert np.allclose(results, [expected.low, expected.high], atol=1e-12)
    assert [float(end) for end in exact_interval(0, 0)] == [0, 1]


def test_smaller_budgets_and_rarer_runs_move_the_limit_as_they_should():
    rows = arrive(SENT)
    limits = [
        quality(STUDY, *rows, since=SINCE, budget=budget, every=every)["limit"]
        for budget, every in ((0.001, 50), (0.05, 50), (0.05, 500), (5, 50))
    ]
    for tight, loose in zip(limits[1:], limits, strict=False):
        assert (tight <= loose).all() and (tight < loose).any()


def test_no_use_of_the_future_of_the_reference():
    rows, _ = spoiled("pgr", 99999, start=500)
    limits = [
        quality(STUDY, *arrive(part), since=SINCE)["limit"] * 100
        for part in (SENT, rows)  # The same patients, the second with later faults
    ]
    assert np.allclose(*limits)


def test_sources_are_compared_with_themselves_then_with_all_then_with_nothing():
    rows = SENT.copy()
    rows.loc[400:, "source"] = "c"
    rows.loc[:10, "source"] = "d"
    rows.loc[590:, "source"] = ["a"] * 5 + ["d"] * 5
    table = quality(STUDY, *arrive(rows), since=SINCE)
    result = table.groupby("source")["against"].unique().map(list)
    assert result.to_dict() == {"a": ["itself"], "c": ["all"], "d": ["all"]}
    assert set(table.loc[table["source"] == "c", "then_patients"]) == {400}
    assert set(quality(STUDY, *arrive(rows))["against"]) == {"nothing"}


def test_nothing_at_all_has_an_answer():
    records, rejects = arrive(SENT)
    bare = pd.DataFrame(columns=COLUMNS)
    empty = quality(STUDY, records[:0], bare, since=SINCE)
    assert empty.empty and quality_messages(empty) == [] and "over" in empty
    assert quality_by_period(STUDY, records[:0], bare).empty
    assert quality_messages(quality(STUDY, records[-3:], bare)) == []
    unnamed = quality(STUDY, records.drop(columns="source"), rejects, since=SINCE)
    assert set(unnamed["source"]) == {""} and not unnamed["over"].any()
    lost = records.assign(er=np.nan)
    table = quality(STUDY, lost, bare, since=SINCE)
    assert not table["over"].any() and one(table, "a", "er", "missing")["limit"] == 1
    assert not table.drop(columns="began").isna().any().any()


def test_bad_budgets_are_refused():
    for wrong in ({"budget": 0}, {"budget": -1}, {"budget": np.nan}, {"every": 0}):
        with pytest.raises(LMError, match="breaks the rule"):
            quality(STUDY, SENT[:0], pd.DataFrame(columns=COLUMNS), **wrong)
    with pytest.raises(LMError, match="breaks the rule"):
        quality_by_period(STUDY, SENT[:0], pd.DataFrame(columns=COLUMNS), by="week")


@pytest.mark.parametrize("by", [None, "year", "quarter", "month"])
def test_timeline_is_a_count_by_hand(by):
    rows, _ = spoiled("pgr", 99999)
    records, rejects = arrive(rows)
    table = quality_by_period(STUDY, records, rejects, by)
    unit = {None: "Y", "year": "Y", "quarter": "Q", "month": "M"}[by]
    periods = rows["arrived"].astype("datetime64[us]").dt.to_period(unit).astype(str)
    bad = (rows["pgr"].astype(float) > 6000).groupby([periods, rows["source"]]).agg(["sum", "size"])
    mine = table.query("field == 'pgr' and what == 'out of range'")
    assert mine["count"].tolist() == bad["sum"].tolist()
    assert mine["patients"].tolist() == bad["size"].tolist()
    assert ((table["low"] <= table["rate"]) & (table["rate"] <= table["high"])).all()


def test_known_time_counts_where_it_is_reported():
    records, rejects = arrive(SENT)
    late = records.assign(known_at=SENT["arrived"].iloc[-1] + pd.Timedelta(days=1))
    assert quality(STUDY, late, rejects, since=SENT["arrived"].iloc[-1])["patients"].max() == 300


def test_the_store_gives_what_is_needed(tmp_path):
    rows, count = spoiled("pgr", 99999)
    with Store(STUDY, tmp_path) as store:
        for source, part in rows.groupby("source"):
            good, bad = check_rows(STUDY, part)
            store.records.append_many(good, known_at=good["arrived"], source=source)
            for row, e in bad:
                results = ("record", row["record_id"], e.field, e.value, e.rule, str(e), row)
                store.rejections.append(*results, row["arrived"], source=source)
        known, rejects = store.queries.as_of(), store.queries.table("rejects")
    table = quality(STUDY, known, rejects, since=SINCE)
    assert one(table, "a", "pgr", "out of range")["count"] == count
    assert quality_messages(table) == quality_messages(quality(STUDY, *arrive(rows), since=SINCE))


def test_labels_leave_out_refusals_that_are_named_already():
    rows, _ = spoiled("pgr", 99999)
    table = quality(STUDY, *arrive(rows), since=SINCE)
    assert one(table, "a", "row", "refused")["over"]
    assert len(quality_messages(table)) == 1
    alone = table[table["what"] == "refused"]
    assert "the row is refused" in quality_messages(alone)[0]
    assert quality_messages(table.assign(source=""))[0].find("source") == -1

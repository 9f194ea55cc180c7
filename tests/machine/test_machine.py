"""The machine as a person uses it: patients, outcomes, looks, updates, swaps, crashes."""

import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from support.monica import BY, DAY, FIRST, NEXT, PAST, ROWS, STUDY, learn, shifted
from support.waiting import PATIENCE

import lm.machine.updating
import lm.monitor.run
import lm.update.run
from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import RejectedRecord, typed_features
from lm.core.wording import OOD_LEVEL
from lm.data.events import MachineEvents
from lm.data.records import UnknownRecord
from lm.data.snapshot import read_snapshot
from lm.data.source import outcomes
from lm.data.store import Store
from lm.machine.machine import Machine
from lm.machine.queries import training_data
from lm.model.explain import contributions
from lm.model.predict import predict
from lm.model.registry import Registry
from lm.monitor.false_alarms import FALSE_ALARM_BUDGET
from lm.monitor.run import stored_verdict
from lm.monitor.verdict import reach_verdict
from lm.offline.prequential import known_as_of
from lm.serve.app import background
from lm.serve.client import Client, connect
from lm.update.decide import Decision


def patient(number, **over):
    """A patient as a ward sends it: only what is known on arrival."""
    row = NEXT[["record_id", "arrived", *STUDY.feature_names]].iloc[number].to_dict()
    return row | over


@pytest.fixture
def new(home):
    """A machine without patients."""
    with Machine(STUDY, home) as machine:
        yield machine


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A machine with three versions of which the first serves, shared by tests that add to it."""
    with Machine(STUDY, tmp_path_factory.mktemp("three")) as machine:
        learn(machine)
        shifted(machine, 1.0)
        shifted(machine, -1.0)
        yield machine


# A patient comes


def test_from_the_first_patient_to_the_first_model(new):
    answer = new.receive(patient(0), now="1985-02-01", source="ward 3")
    assert answer["risk"] is answer["version"] is None and "No model" in answer["sentence"]
    assert new.status()["champion"] is None and new.models().empty
    assert new.monitor("1985-03-01")["action"] == "nothing"
    for ask in (new.rollback, lambda: new.promote(1, "try", BY), lambda: stored_verdict(new, 9)):
        with pytest.raises(LMError):
            ask()
    update = learn(new)
    assert (update["action"], update["from_version"], update["to_version"]) == ("first", None, 1)
    status = new.status()
    assert status["champion"] == 1 and status["challenger"] is None
    assert pd.Timestamp(status["since"]) == FIRST and stored_verdict(new)["action"] == "retrain"
    assert new.receive(patient(0))["risk"] is None  # The stored answer stays what it was
    assert new.receive(patient(1))["version"] == 1
    assert new.models()[["version", "aliases"]].values.tolist() == [[1, "champion"]]
    assert new.table("records", record_id=patient(0)["record_id"])["source"].tolist() == ["ward 3"]


def test_an_answer_adds_up_and_is_what_was_stored(three):
    row = patient(2)
    answer = three.receive(row, now=row["arrived"])
    assert answer["base"] + sum(answer["contributions"].values()) == pytest.approx(
        answer["log_odds"], abs=1e-9
    )
    assert answer["risk"] == pytest.approx(expit(answer["log_odds"]), abs=1e-12)
    assert 0 < answer["low"] < answer["risk"] < answer["high"] < 1
    assert answer["average_risk"] == three.registry.load(1).average_risk
    again = three.receive(row, now=row["arrived"] + DAY)
    assert again == answer | {"repeated": True}
    assert three.explain(row["record_id"]) == {k: v for k, v in answer.items() if k != "repeated"}
    stored = three.known().set_index("record_id").loc[row["record_id"]]
    assert stored[["risk", "low", "high", "log_odds"]].tolist() == [
        answer[k] for k in ("risk", "low", "high", "log_odds")
    ]
    assert stored["predicted_at"] == stored["arrived"] == row["arrived"]


def test_a_patient_out_of_distribution_gets_a_warning_then_and_later(three):
    usual = three.receive(patient(30), now=patient(30)["arrived"])
    assert usual["unlike"] >= OOD_LEVEL and "unlike" not in usual["sentence"]
    row = patient(31, age=108)
    answer = three.receive(row, now=row["arrived"])
    text = "This patient is unlike the training patients (above all: age at onset 108"
    assert answer["unlike"] < OOD_LEVEL and text in answer["sentence"]
    assert answer["sentence"].count("trust the number less.") == 1
    assert three.explain(row["record_id"])["sentence"] == answer["sentence"]
    batch = three.receive_many([patient(32, age=108)], now=row["arrived"])
    assert text in three.explain(batch["record_id"][0])["sentence"]
    served = three.known().set_index("record_id")["unlike"]
    assert served[row["record_id"]] == answer["unlike"]


def test_refused_patients_and_outcomes_are_stored_with_their_source(three):
    row = patient(33)
    count = three.status()["counts"]["rejects"]
    with pytest.raises(RejectedRecord):
        three.receive(row | {"age": 340}, now=row["arrived"], source="ward 3")
    three.receive(row, now=row["arrived"], source="ward 3")
    with pytest.raises(RejectedRecord):
        three.receive(row | {"age": 50}, now=row["arrived"], source="ward 4")
    three.receive_many([row | {"age": 51}, row | {"sex": "?"}], source="file")
    with pytest.raises(LMError):
        three.add_outcome(row["record_id"], 2, row["arrived"], source="phone")
    three.add_outcomes(
        pd.DataFrame({"record_id": ["?"], "y": [1], "known_at": [FIRST]}), "registry"
    )
    stored = three.table("rejects")["source"].tolist()[count:]
    assert stored == ["ward 3", "ward 4", "file", "file", "phone", "registry"]


def test_a_patient_who_is_lost_has_no_label_and_may_be_resumed(three):
    row = patient(34)
    name, came = row["record_id"], row["arrived"]
    three.receive(row, now=came)
    with pytest.raises(LMError, match="0 or 1, or empty with followed_until"):
        three.add_outcome(name, None, came + 9 * DAY)
    three.add_outcome(name, None, came + 9 * DAY, followed_until=came + 4 * DAY)
    assert three.has_outcome(name)
    assert (three.explain(name)["y"], three.explain(name)["lost"]) == (None, True)
    assert np.isnan(three.known(came + 90 * DAY).set_index("record_id")["y"][name])
    three.add_outcome(name, 0, came + 100 * DAY)
    assert (three.explain(name)["y"], three.explain(name)["lost"]) == (0, False)


def test_a_taken_name_keeps_its_patient(three):
    row = patient(3)
    before = three.receive(row, now=row["arrived"])
    count = three.status()["counts"]
    with pytest.raises(RejectedRecord, match="taken by a patient whose age"):
        three.receive(row | {"age": row["age"] + 1})
    after = three.status()["counts"]
    assert after == count | {"rejects": count["rejects"] + 1}
    assert three.explain(row["record_id"])["risk"] == before["risk"]


def test_a_mixed_batch_keeps_the_good_and_names_the_bad(three):
    old = three.receive(patient(4), now=patient(4)["arrived"])
    bad = {"old": patient(5, age=340), "level": patient(6, sex="x"), "none": patient(7, age=None)}
    bad["name"] = patient(3, age=patient(3)["age"] + 1)
    three.receive(patient(3), now=patient(3)["arrived"])
    rows = [patient(8), patient(4), *bad.values(), patient(9), patient(9), {"record_id": "lost"}]
    count = three.status()["counts"]
    answer = three.receive_many(rows, now=patient(9)["arrived"], source="file")
    good = answer[answer["error"] == ""].set_index("record_id")
    names = [patient(i)["record_id"] for i in (8, 9)]
    assert len(answer) == len(rows) and set(good.index) == {old["record_id"], *names}
    assert good.loc[old["record_id"], "risk"] == old["risk"] and (good["version"] == 1).all()
    rest = "|".join(answer.loc[answer["error"] != "", "error"])
    for text in ("age = 340", "sex = 'x'", "must not be missing", "taken by a patient", "unique"):
        assert text in rest
    now = three.status()["counts"]
    assert (now["records"], now["rejects"]) == (count["records"] + 2, count["rejects"] + 6)
    stored = three.table("rejects", last=6)
    assert {"age", "sex", "record_id", "arrived"} == set(stored["field"])
    assert (
        stored["message"].isin(answer["error"]).all() and stored["received"].str.len().gt(10).all()
    )
    single = predict(three.registry.load(1), patient(8)).iloc[0]
    assert good.loc[names[0], ["risk", "low", "high"]].tolist() == [
        single[k] for k in ("risk", "low", "high")
    ]


@pytest.mark.parametrize("rows", [[], [None, 7, "m1"], [{}]])
def test_batches_of_nothing_and_of_nonsense(three, rows):
    count = three.status()["counts"]
    answer = three.receive_many(rows)
    assert list(answer.columns)[:2] == ["record_id", "version"] and len(answer) == len(rows)
    now = three.status()["counts"]
    assert now == count | {"rejects": count["rejects"] + len(rows)}


def test_what_a_batch_refuses_is_one_entry_of_the_log(three):
    three.receive(patient(13), now=patient(13)["arrived"])
    rows = [patient(13, age=patient(13)["age"] + n) for n in (1, 2)] + [patient(14, age=340)]
    entries = three.store.audit.head()[0]
    refused = three.receive_many([*rows[:1], None, rows[2]], now=patient(13)["arrived"])
    assert len(refused) == 3 and three.store.audit.head()[0] == entries + 1
    frame = pd.DataFrame({"record_id": ["?"] * 9, "y": 1, "known_at": FIRST})
    assert (
        len(three.add_outcomes(frame)["refused"]) == 9
        and three.store.audit.head()[0] == entries + 2
    )
    log = three.table("audit", last=2)
    assert log["rows"].tolist() == [3, 9] and set(log["kind"]) == {"rejects"}
    assert three.verify() == []


def test_an_answer_says_why_this_version_gave_it(home):
    with Machine(STUDY, home) as machine:
        first = machine.receive(patient(0), now=patient(0)["arrived"])
        assert first["why"] is None and machine.explain(first["record_id"])["why"] is None
        learn(machine)
        second = machine.receive(patient(1), now=patient(1)["arrived"])
        policy = {"kind": "shadow", "challenger": shifted(machine, 0.3)}
        machine.set_rollout(policy, "try", BY)
        third = machine.receive(patient(2), now=patient(2)["arrived"])
        assert second["why"] == "champion" and third["why"].startswith("shadow")
        for one in (second, third):
            assert machine.explain(one["record_id"])["why"] == one["why"]
        stored = machine.table("predictions", record_id=third["record_id"])
        assert stored["why"].tolist() == [third["why"]]


# The truth arrives


def test_a_later_outcome_corrects_an_earlier_one(three):
    row = patient(10)
    name, came = row["record_id"], row["arrived"]
    three.receive(row, now=came)
    assert three.explain(name)["y"] is None
    three.add_outcome(name, 0, came + 28 * DAY)
    three.add_outcome(name, 1, came + 40 * DAY, event=came + 20 * DAY)
    assert three.explain(name)["y"] == 1
    seen = [
        three.known(came + days * DAY).set_index("record_id")["y"][name] for days in (27, 30, 41)
    ]
    assert np.isnan(seen[0]) and seen[1:] == [0.0, 1.0]
    assert three.table("outcomes", record_id=name)["y"].tolist() == [0, 1]


def test_good_outcomes_of_a_file_are_taken_and_bad_ones_stored(three):
    row = patient(11)
    three.receive(row, now=row["arrived"])
    late = row["arrived"] + 28 * DAY
    frame = pd.DataFrame(
        {
            "record_id": [row["record_id"], "absent", row["record_id"], row["record_id"]],
            "y": [0, 1, 3, 1],
            "known_at": [late, late, late, row["arrived"] - DAY],
        }
    )
    count = three.status()["counts"]
    answer = three.add_outcomes(frame)
    assert answer["accepted"] == 1 and len(answer["refused"]) == 3
    now = three.status()["counts"]
    assert now["outcomes"] == count["outcomes"] + 1 and now["rejects"] == count["rejects"] + 3
    assert three.table("rejects", last=3)["kind"].tolist() == ["outcome"] * 3


def test_decisions_are_stored_with_their_reason(three):
    row = patient(12)
    name, count = row["record_id"], three.status()["counts"]
    three.receive(row, now=row["arrived"])
    three.add_decision(name, " Dr. Ada ", "agree", now=row["arrived"])
    three.add_decision(name, "Dr. Ada", "override", "knows the family", now=row["arrived"] + DAY)
    result = three.explain(name)["decisions"]
    assert [d["action"] for d in result] == ["agree", "override"]
    assert {d["clinician"] for d in result} == {"Dr. Ada"}
    for text in (("", "agree", ""), ("Dr. Ada", "override", " "), ("Dr. Ada", "perhaps", "")):
        with pytest.raises(LMError):
            three.add_decision(name, *text)
    with pytest.raises(UnknownRecord):
        three.add_decision("absent", "Dr. Ada", "agree")
    now = three.status()["counts"]
    assert (now["decisions"], now["rejects"]) == (count["decisions"] + 2, count["rejects"] + 4)


def test_an_outcome_that_the_caller_never_dated_is_refused_in_a_sentence(three):
    name = PAST["record_id"].iloc[0]
    for when in (None, "soon", float("nan"), pd.NaT):
        with pytest.raises(LMError, match="known_at"):
            three.add_outcome(name, 1, when)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["1987-01-01", "1992-07-01", "2010-01-01"])
@pytest.mark.parametrize("name", ["rotterdam", "rotterdam_5y", "gbsg"])
def test_the_store_and_the_simulation_know_the_same(name, moment, tmp_path):
    study, moment = load_study(name), pd.Timestamp(moment)
    rows = read_rows(study)
    rng = np.random.default_rng(1)
    served = pd.DataFrame({"risk": rng.random(len(rows)), "unlike": rng.random(len(rows))})
    served = served.assign(low=0.1, high=0.9, log_odds=0.0, version=1)
    with Store(study, tmp_path) as store:
        answers = served.assign(record_id=rows["record_id"])
        store.records.append_many(rows, rows["arrived"], "", answers)
        accepted, refused = store.outcomes.append_many(outcomes(study, rows))
        assert not refused and accepted == len(rows)
        stored = store.queries.as_of(moment)
    memory = known_as_of(study, rows, served, moment)
    assert stored["followed_until"].max() <= moment and stored["event"].dropna().max() <= moment
    assert moment.year < 2000 or stored["lost"].sum() == rows["y"].isna().sum() > 0
    columns = ["record_id", "source", "event", "followed_until", "lost", "y", "matured", "unlike"]
    columns += ["arrived", "risk", *study.feature_names]
    pd.testing.assert_frame_equal(memory[columns], stored[columns], check_dtype=True)


# Train like you serve


def test_features_as_served_are_stored_and_training_reads_those(three):
    row = patient(13, age=str(int(patient(13)["age"])), sex=f" {patient(13)['sex']} ", extra=1)
    three.receive(row, now=row["arrived"])
    served = three.known().set_index("record_id").loc[[row["record_id"]]]
    features = typed_features(STUDY, served)
    assert features["age"].item() == float(row["age"]) and features["sex"].item() == row["sex"][1]
    again = predict(three.registry.load(1), features)
    assert again["risk"].item() == pytest.approx(served["risk"].item(), rel=1e-12)
    column = three.table("predictions", record_id=row["record_id"])[STUDY.feature_names]
    pd.testing.assert_frame_equal(typed_features(STUDY, column), features.reset_index(drop=True))
    frozen = read_snapshot(three.snapshot()["path"]).set_index("record_id")
    pd.testing.assert_frame_equal(typed_features(STUDY, frozen.loc[[row["record_id"]]]), features)


def test_every_stored_prediction_is_its_version_on_its_features(three):
    known = three.known().dropna(subset="risk")
    assert len(known)
    for version, served in known.groupby("version"):
        again = predict(three.registry.load(int(version)), typed_features(STUDY, served))
        for column in again:
            np.testing.assert_allclose(again[column], served[column], rtol=1e-12)
        risks = three.risks(int(version)).set_index("record_id")["risk"]
        np.testing.assert_allclose(risks[served["record_id"]], served["risk"], rtol=1e-12)


def test_risks_say_on_whom_a_version_was_fitted(three):
    known = three.known().set_index("record_id")
    result = three.risks(1).set_index("record_id")["trained_on"]
    assert set(training_data(three, 1)["record_id"]) <= set(result.index[result])
    assert 0 < result.sum() < len(result) and known.loc[result.index[result], "y"].notna().all()
    assert not result[known.index[known["version"] == 1]].any()  # Its own patients judge it


# Swaps


def test_promote_roll_back_and_roll_back_again(three):
    before = three.status()
    three.promote(2, "trial on the ward", BY)
    three.promote(3, "trial on another ward", BY)
    now = three.receive(patient(14), now=patient(14)["arrived"])
    assert three.status()["champion"] == now["version"] == 3
    assert three.rollback()["to_version"] == 2
    assert three.rollback(reason="the first was better")["to_version"] == 1
    with pytest.raises(LMError, match="no earlier version"):
        three.rollback()
    with pytest.raises(LMError, match="not on the way back from version 1"):
        three.rollback(to=3)  # It was rolled back itself
    three.promote(3, "found good after all", BY)
    assert three.rollback(to=1, by="Ada")["from_version"] == 3
    assert three.status()["champion"] == before["champion"] == 1
    assert three.registry.alias("champion") == 1
    assert three.explain(patient(14)["record_id"])["version"] == 3
    for version, reason in ((1, "again"), (99, "no such"), (2, "  ")):
        with pytest.raises(LMError):
            three.promote(version, reason, BY)
    assert three.status()["champion"] == 1
    updates = three.table("updates")
    assert updates["seq"].is_monotonic_increasing and updates["as_of"].is_monotonic_increasing
    assert (updates["from_version"].iloc[1:].values == updates["to_version"].iloc[:-1].values).all()


def test_an_update_made_for_another_champion_is_not_adopted(three):
    base = {"as_of": three.store.clock.data_time(), "action": "refit", "reason": "made elsewhere"}
    count = three.status()["counts"]["updates"]
    for change in (
        {"from_version": 2, "to_version": 3},
        {"from_version": None, "to_version": 2},
        {"from_version": 1, "to_version": 77},
    ):
        with pytest.raises(LMError):
            three.adopt(base | change)
    assert three.status()["champion"] == 1 and three.status()["counts"]["updates"] == count


@pytest.mark.parametrize("evidence", ["", "{}", [], 1, True, {"outside": "x"}, {"outside": [[]]}])
def test_evidence_that_is_no_object_is_refused(three, evidence):
    day, count = three.store.clock.data_time(), three.status()["counts"]
    step = {"as_of": day, "action": "keep", "reason": "x", "from_version": 1, "to_version": None}
    with pytest.raises(LMError, match=r"^the update's evidence"):
        three.adopt(step | {"evidence": evidence})
    verdict = {"as_of": day, "action": "nothing", "reason": "x", "version": 1}
    for verb in (three.record_verdict, three.update):
        with pytest.raises(LMError, match=r"^the verdict's evidence"):
            verb(verdict | {"evidence": evidence})
    assert three.status()["counts"] == count


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"as_of": None}, "as_of = ''"),
        ({"as_of": "soon"}, "as_of = 'soon'"),
        ({"as_of": []}, "as_of = "),
        ({"version": "1"}, "version = '1' must be a whole number"),
        ({"version": True}, "version = True must be"),
        ({"version": 1.5}, "version = 1.5 must be"),
        ({"version": float("inf")}, "version = inf must be"),
        ({"version": [1]}, "must be a whole number"),
        ({"version": 10**400}, "the verdict is about version 1000"),
        ({"version": None}, "about version None, but version 1 serves"),
        ({"version": 2.0}, "about version 2, but version 1 serves"),
        ({"action": None}, "action = None must be one of nothing, look at the data"),
        ({"action": ["retrain"]}, "must be one of nothing"),
        ({"action": "refit"}, "action = 'refit' must be one of nothing"),
        ({"reason": None}, "lacks its reason"),
    ],
)
def test_a_verdict_that_is_none_is_refused_before_anything_is_tried(three, change, text):
    verdict = {
        "as_of": three.store.clock.data_time(),
        "action": "nothing",
        "reason": "x",
        "version": 1,
    }
    entries = three.store.audit.head()
    with pytest.raises(LMError, match=text):
        three.update(verdict | change)
    with pytest.raises(LMError, match="as_of = ''"):
        three.update({})
    assert three.store.audit.head() == entries


@pytest.mark.parametrize("version", [1, 1.0, np.int64(1)])
def test_a_version_from_a_table_is_a_version(three, version):
    day = max(three.store.clock.data_time(), pd.Timestamp(three.status()["since"])) + DAY
    verdict = {"as_of": day, "action": "nothing", "reason": "all is well", "version": version}
    assert three.update(verdict)["action"] == "keep"


def test_a_decision_to_keep_is_stored_and_swaps_nothing(three):
    verdict = three.monitor(pd.Timestamp(three.status()["since"]) + DAY)
    stored = three.update(verdict)
    assert verdict["action"] in ("nothing", "look at the data") and stored["action"] == "keep"
    assert stored["to_version"] is None and len(stored["reason"]) > 20
    last = three.table("updates", last=1).iloc[0]
    assert last["action"] == "keep" and last["snapshot"] == verdict["snapshot"]
    assert three.status()["champion"] == 1


@pytest.mark.parametrize("action", ["wait", "reject"])
def test_what_only_a_machine_or_a_person_decides_is_no_update(three, action):
    update = {"as_of": three.status()["since"], "action": action, "reason": "x", "from_version": 1}
    with pytest.raises(LMError, match="is what the machine or a person makes"):
        three.adopt(update | {"evidence": {"proposed": [1]}})
    assert three.pending_approvals().empty


@pytest.mark.slow
def test_a_run_without_a_date_is_never_about_an_earlier_champion(home):
    with Machine(STUDY, home) as machine:
        learn(machine)
        later = pd.Timestamp(machine.status()["clock"]) + 30 * DAY
        machine.settings.plan = replace(machine.plan, cool_down_days=0)
        update = {"as_of": later, "action": "refit", "reason": "of a later day", "from_version": 1}
        machine.adopt(update | {"to_version": shifted(machine, 0.5)})
        verdict = machine.monitor(fast=True)
        assert verdict["version"] == 2 and pd.Timestamp(verdict["as_of"]) == later
        assert machine.update(verdict)["action"] in ("keep", "recalibrate", "refit")


@pytest.mark.slow
def test_the_champion_of_an_earlier_time_can_be_read_and_a_reopened_store_serves_on(home):
    with Machine(STUDY, home) as machine:
        learn(machine)
        row = patient(200)
        machine.receive(row, now=row["arrived"])
        machine.promote(shifted(machine, 0.5), "later", BY)
        expected = machine.receive(patient(201), now=patient(201)["arrived"])
        status = machine.status()

        def champion(day):
            return machine.table("updates", as_of=day)["to_version"].dropna().tolist()[-1:]

        assert champion(FIRST - DAY) == []
        assert champion(FIRST) == champion(row["arrived"] - DAY) == [1]
        assert champion(row["arrived"]) == [2]
    with Machine(STUDY, home) as machine:
        assert machine.status() == status and status["champion"] == 2
        assert machine.receive(patient(201)) == expected | {"repeated": True}
        machine.registry.set_alias("champion", 1)  # A change by hand in MLflow's pages
    with Machine(STUDY, home) as machine:
        assert machine.status()["champion"] == machine.registry.alias("champion") == 2


def test_no_patient_is_answered_by_half_of_two_models(three):
    """Eight threads receive while another swaps twenty times: no risk mixes two versions."""
    errors, over, ids = [], threading.Event(), []

    def receive(first):
        try:
            sent = 0
            while sent < 20 or not over.is_set():
                row = patient(first + sent % 20, record_id=f"swap {first} {sent}")
                three.receive(row, now=row["arrived"])
                ids.append(row["record_id"])
                sent += 1
                time.sleep(0.005)
        except Exception as error:
            errors.append(error)

    def swap():
        try:
            for _ in range(10):
                three.promote(2, "swap", BY)
                time.sleep(0.02)
                three.rollback(reason="swap back")
        except Exception as error:
            errors.append(error)
        over.set()

    work = [threading.Thread(target=receive, args=(300 + 20 * k,)) for k in range(8)]
    work.append(threading.Thread(target=swap))
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert not errors
    known = three.known().set_index("record_id").loc[ids]
    reasons = three.table("explanations").set_index("record_id").loc[ids]
    assert set(known["version"]) == {1, 2} and (reasons["version"] == known["version"]).all()
    for version, served in known.groupby("version"):
        model = three.registry.load(int(version))
        again = predict(model, typed_features(STUDY, served))
        base, shares = contributions(model, typed_features(STUDY, served))
        for column in again:
            np.testing.assert_allclose(again[column], served[column], rtol=1e-12)
        stored = reasons.loc[served.index, STUDY.feature_names]
        np.testing.assert_allclose(stored, shares, rtol=0, atol=1e-12)
        np.testing.assert_allclose(reasons.loc[served.index, "base"], base, rtol=1e-12)


# Crashes


def better(case, verdict):
    """A decision that always brings a model."""
    model = case.champion.recalibrated(0.1)
    return Decision(case.as_of, "recalibrate", "crash test", model, {"recipe": {}})


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def last_text(function):
    def call(*inputs, **named):
        function(*inputs, **named)
        die()

    return call


POINTS = {
    "before the model": (Registry, "register", die),
    "before the challenger": (Registry, "set_alias", die),
    "before the update": (MachineEvents, "append_update", die),
    "after the update": (MachineEvents, "append_update", last_text(MachineEvents.append_update)),
    "at any moment": (lm.update.run, "decide_on", better),
}


def update_until_death(home, point, opened):
    """In a process of its own: one update after the other, and the end at `point`."""
    lm.update.run.decide_on = better
    lm.machine.updating.beyond_plan, lm.update.run.cool_down = (lambda *_: []), (lambda *_: "")
    with Machine(STUDY, home) as machine:
        setattr(*POINTS[point])
        opened.set()
        while True:
            verdict = {"as_of": FIRST + 20 * DAY, "action": "recalibrate", "reason": "crash"}
            machine.update(machine.record_verdict(verdict))


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything already, but hold no connection of this one."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["lm.machine.machine", "mlflow.tracking", "mlflow.models", "skops.io"]
    )
    return context


def killed(processes, home, point, delay):
    """Run updates in another process until it is killed."""
    opened = processes.Event()
    child = processes.Process(target=update_until_death, args=(home, point, opened))
    child.start()
    assert opened.wait(PATIENCE)
    if point == "at any moment":
        time.sleep(delay)
        child.kill()
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_machine_killed_during_an_update_serves_the_old_or_the_new_model(home, processes):
    delays = random.Random(4)
    with Machine(STUDY, home) as machine:
        learn(machine)
        old, count = 1, machine.status()["counts"]["records"]
    for point in [*POINTS, "at any moment"]:
        killed(processes, home, point, 0.05 + delays.random())
        with Machine(STUDY, home) as machine:
            new, updates = machine.status()["champion"], machine.table("updates")
            assert machine.status()["counts"]["records"] == count == len(machine.known())
            assert new == updates["to_version"].iloc[-1] == machine.registry.alias("champion")
            if point != "at any moment":
                assert (new == old) is (point != "after the update"), point
            for version in machine.models()["version"]:
                machine.registry.load(int(version))
            old = new
    with Machine(STUDY, home) as machine:
        answer = machine.receive(patient(0), now=patient(0)["arrived"])
        model = machine.registry.load(answer["version"])
        assert answer["risk"] == predict(model, patient(0))["risk"].item()


# A machine here or elsewhere


@pytest.mark.slow
def test_embedded_and_served_machines_give_equal_answers(home):
    asked = patient(30)
    with connect("monica") as machine:
        assert type(machine) is Machine
        learn(machine)
        machine.receive(asked, now=asked["arrived"])
        here = machine.explain(asked["record_id"]), machine.monitor(FIRST + 20 * DAY)
        known, status = machine.known(), machine.status()
        with background(machine), connect("monica") as client:
            assert type(client) is Client
            there = client.explain(asked["record_id"]), client.monitor(FIRST + 20 * DAY)
            assert client.receive(asked) == machine.receive(asked)
            pd.testing.assert_frame_equal(client.known(), known, check_exact=True)
            pd.testing.assert_frame_equal(client.models(), machine.models())
            pd.testing.assert_frame_equal(client.risks(1), machine.risks(1), check_exact=True)
            assert client.snapshot() == machine.snapshot()
            assert client.status()["champion"] == status["champion"] == 1
            client.promote(shifted(machine, 0.2), "from elsewhere", BY)
            assert machine.status()["champion"] == 2
            assert client.rollback()["to_version"] == machine.status()["champion"] == 1
            with pytest.raises(LMError, match="needs a running service"):
                machine.run("monitor", {})
        assert here[0] == there[0]
        heads = [verdict["evidence"].pop("audit")["entry"] for verdict in (here[1], there[1])]
        assert here[1] | {"seq": 0} == there[1] | {"seq": 0} and heads[0] < heads[1]
    with connect("monica") as machine:
        assert type(machine) is Machine and machine.status()["champion"] == 1


# A monitoring run counts the new patients only


@pytest.mark.slow
def test_limits_and_counts_are_stored_and_later_runs_count_the_new_patients_only(home, monkeypatch):
    later = ROWS[ROWS["arrived"] > FIRST][:400]
    counted = []
    real = lm.monitor.run.bin_codes
    monkeypatch.setattr(
        lm.monitor.run, "bin_codes", lambda c, f: counted.append(len(f)) or real(c, f)
    )
    with Machine(STUDY, home) as machine:
        learn(machine)
        machine.receive_many(later[:230], on_arrival=True)
        first = machine.monitor(later["arrived"].iloc[229])
        machine.receive_many(later[230:], on_arrival=True)
        last = machine.monitor(later["arrived"].iloc[399])
        stored = machine.table("sketches")
        assert stored["kind"].tolist() == ["limits", "blocks", "blocks"]
        assert stored["patients"].tolist()[1:] == [225, 175] and counted == [230, 175]
        known, since = machine.known(last["as_of"]), machine.table("updates")["as_of"].iloc[0]
        fresh = reach_verdict(STUDY, known, last["as_of"], since, 1, machine.registry.load(1))
        assert [r["p"] for r in fresh.evidence["drift"]] == [
            r["p"] for r in last["evidence"]["drift"]
        ]
        assert fresh.evidence["alarms"] == last["evidence"]["alarms"]
    with Machine(STUDY, home) as machine:
        again = machine.monitor(last["as_of"])
        assert again["reason"] == last["reason"] and counted[2:] == [0]
        assert len(machine.table("sketches")) == 3 and first["seq"] < again["seq"]


@pytest.mark.slow
def test_another_budget_has_limits_of_its_own(home):
    with Machine(STUDY, home) as machine:
        learn(machine)
        machine.receive_many(ROWS[ROWS["arrived"] > FIRST][:60], on_arrival=True)
        machine.monitor()
        machine.monitor(budget=0.01)
        stored = machine.table("sketches")
        stored = stored[stored["kind"] == "limits"]
        assert stored["budget"].tolist() == [FALSE_ALARM_BUDGET, 0.01]
        charts = [json.loads(text)["charts"]["limits"] for text in stored["content"]]
        assert all(charts[1][name] > charts[0][name] for name in charts[0])

"""A challenger in a rollout: which version answers, what is stored, how it ends, who may begin."""

import json

import numpy as np
import pandas as pd
import pytest
from support.monica import BY, HALF, NEXT, STUDY, begun

from lm.core.errors import LMError
from lm.data.source import outcomes
from lm.machine.machine import Machine
from lm.model.metrics import compare
from lm.model.population import population
from lm.update.rollout import Rollout, assign


@pytest.fixture
def machine(home):
    with begun(home) as machine:
        yield machine


def send(machine, first, last):
    for _, row in NEXT[first:last].iterrows():
        machine.receive(
            row[["record_id", "arrived", *STUDY.feature_names]].to_dict(), row["arrived"]
        )
    return machine.table("predictions", last=last - first)


def test_everybody_gets_the_champion_until_a_person_says_otherwise(machine):
    stored = send(machine, 0, 5)
    assert set(stored["why"]) == {"champion"} and stored["shadow"].isna().all()
    assert machine.rollout()["policy"]["kind"] == "champion"


def test_who_answers_is_the_policy_s_choice_and_is_stored_with_the_other_s_risk(machine):
    result = machine.set_rollout(HALF, "trial", BY)
    policy = Rollout.from_dict(result["policy"])
    stored = send(machine, 0, 60).set_index("record_id")
    results = {name: assign(policy, 1, name) for name in stored.index}
    assert all(
        (row.version, row.why) == tuple(results[name])[:2] for name, row in stored.iterrows()
    )
    assert 15 < (stored["version"] == 2).sum() < 45
    for version, other in ((1, 2), (2, 1)):
        mine = stored[stored["version"] == version]
        assert (mine["shadow_version"] == other).all()
        risks = [m.set_index("record_id")["risk"] for m in map(machine.risks, (version, other))]
        np.testing.assert_allclose(mine["risk"], risks[0][mine.index], rtol=1e-12)
        np.testing.assert_allclose(mine["shadow"], risks[1][mine.index], rtol=1e-12)
    some = stored.index[stored["version"] == 2][0]
    shares = machine.explain(some)
    logit = np.log(shares["risk"] / (1 - shares["risk"]))
    assert np.isclose(shares["base"] + sum(shares["contributions"].values()), logit, atol=1e-9)


@pytest.mark.slow
def test_a_batch_and_one_by_one_are_answered_alike(home):
    answers = []
    for how in ("one", "many"):
        with begun(home / how) as machine:
            machine.set_rollout(HALF, "trial", BY)
            if how == "one":
                send(machine, 0, 40)
            else:
                machine.receive_many(NEXT[:40], on_arrival=True)
            answers.append(machine.table("predictions").set_index("record_id").sort_index())
    names = ["version", "why", "risk", "low", "high", "shadow_version", "shadow"]
    pd.testing.assert_frame_equal(*(a[names] for a in answers), rtol=1e-12)


def test_a_shadow_answers_no_patient(machine):
    machine.set_rollout({"kind": "shadow", "challenger": 2}, "silently", "anybody")
    stored = send(machine, 0, 20)
    assert set(stored["version"]) == {1} and set(stored["shadow_version"]) == {2}
    assert (stored["shadow"] > stored["risk"]).all()


def test_a_challenger_that_fails_costs_no_answer_and_retreats(machine, monkeypatch):
    machine.set_rollout(HALF, "trial", BY)
    load = machine.champion.model_of  # The champion's own model still explains its answers
    monkeypatch.setattr(
        machine.champion, "model_of", lambda version: None if version == 2 else load(version)
    )
    stored = send(machine, 0, 20)
    assert set(stored["version"]) == {1} and stored["why"].str.contains("version 2 failed").all()
    assert machine.rollout()["failed"] == 20
    result = machine.review_rollout()
    assert result["action"] == "retreat" and result["policy"]["kind"] == "champion"


def test_a_review_weighs_patients_for_those_who_were_lost(machine):
    machine.set_rollout({"kind": "shadow", "challenger": 2}, "silently", "anybody")
    came = NEXT[:300]
    machine.receive_many(came, on_arrival=True)
    result = outcomes(STUDY, came)
    gone = result["record_id"].isin(result.loc[result["y"] == 0, "record_id"].iloc[::2])
    early = came.set_index("record_id")["arrived"].loc[result["record_id"]].to_numpy()
    until = pd.Series(early, result.index) + pd.Timedelta(days=2)
    result.loc[gone, ["y", "event"]] = None
    result.loc[gone, "followed_until"] = until[gone]
    assert machine.add_outcomes(result)["accepted"] == len(result)
    asked = machine.table("predictions")[["record_id", "shadow"]].dropna()
    judges = population(machine.known().merge(asked, on="record_id"))
    rows = judges.labelled
    assert judges.unknown == gone.sum() > 50 and rows["ipcw"].max() > 1.2
    weighted = compare(rows["y"], rows["shadow"], rows["risk"], weights=rows["ipcw"]).value
    plain = compare(rows["y"], rows["shadow"], rows["risk"]).value
    results = machine.review_rollout()["reason"]
    assert f"Brier score {weighted:+.4f}" in results and f"{weighted:+.4f}" != f"{plain:+.4f}"
    assert results.endswith(judges.text)


def test_the_policy_outlives_a_restart_and_ends_with_the_champion(home):
    with begun(home) as machine:
        result = machine.set_rollout(HALF, "trial", BY)
    with Machine(STUDY, home) as machine:
        assert machine.rollout() == result
        machine.promote(2, "better", BY)
        assert machine.rollout()["policy"]["kind"] == "champion"
        assert "champion has changed" in machine.rollout()["reason"]
        log = machine.table("audit")
        assert log["kind"].str.contains("rollouts").sum() == 2 and machine.verify() == []
        assert json.loads(machine.table("rollouts")["policy"].iloc[0])["champion"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "reason", "by", "rule"),
    [
        (HALF, "trial", "a passer-by", "may not decide"),
        (HALF, " ", BY, "reason"),
        (HALF | {"challenger": 9}, "trial", BY, "9"),
        (HALF | {"challenger": 1}, "trial", BY, "serves already"),
        (HALF | {"share": 2}, "trial", BY, "share = 2"),
        (HALF | {"shear": 0.5}, "trial", BY, "shear"),
    ],
)
def test_what_may_not_be_is_refused_and_changes_nothing(machine, policy, reason, by, rule):
    with pytest.raises(LMError, match=rule):
        machine.set_rollout(policy, reason, by)
    assert machine.rollout()["policy"]["kind"] == "champion" and machine.table("rollouts").empty


@pytest.mark.slow
def test_the_monitor_judges_the_champion_of_each_version(home):
    reasons = []
    for policy in (None, HALF):
        with begun(home / str(policy is None)) as machine:
            if policy:
                machine.set_rollout(policy, "trial", BY)
            machine.receive_many(NEXT[:300], on_arrival=True)
            machine.add_outcomes(outcomes(STUDY, NEXT[:300]))
            verdict = machine.monitor(fast=True)
            reasons.append((verdict["version"], verdict["reason"]))
            if policy:
                assert machine.known()["version"].dropna().nunique() == 2
                assert machine.update(verdict | {"action": "retrain"})["action"] in (
                    "keep",
                    "refit",
                )
    assert reasons[0] == reasons[1]


@pytest.mark.slow
def test_a_worse_challenger_is_sent_back_by_its_outcomes(machine):
    model = machine.registry.load("champion").recalibrated(2.5)
    machine.registry.register(model, {}, {}, {}, "far off")
    canary = {"kind": "canary", "challenger": 3, "steps": [0.2, 1.0]}
    machine.set_rollout(canary, "trial", BY)
    machine.receive_many(NEXT[:500], on_arrival=True)
    machine.add_outcomes(outcomes(STUDY, NEXT[:500]))
    result = machine.review_rollout()
    assert result["action"] == "retreat" and machine.rollout()["policy"]["kind"] == "champion"
    assert "version 3" in result["reason"] or "challenger" in result["reason"]

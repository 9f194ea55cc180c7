"""What the plan forbids waits for a named person, and no one gets round it."""

import contextlib
import shutil
from dataclasses import replace

import pytest
from support.monica import BY, DAY, STUDY, learn, shifted

import lm.update.run
from lm.core.errors import LMError
from lm.machine.machine import Machine
from lm.update.decide import Decision, cool_down

HEAD = "head of cardiology"  # Who alone may approve a reselection


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A home in which the first model serves."""
    folder = tmp_path_factory.mktemp("learned")
    with Machine(STUDY, folder) as machine:
        learn(machine)
    return folder


@pytest.fixture
def machine(learned, home):
    """A machine of its own, at the study's first day."""
    shutil.copytree(learned, home)
    with Machine(STUDY, home) as machine:
        yield machine


def tries(monkeypatch, action="refit", why=(), by=0.1):
    """Let every decision bring a model, with the findings of the plan."""

    def decision(case, verdict):
        model = case.champion.recalibrated(by)
        return Decision(case.as_of, action, "it is better", model, {"recipe": {}}, tuple(why))

    monkeypatch.setattr(lm.update.run, "decide_on", decision)


def renewed(machine, days=100):
    """An update so many days after the machine's clock."""
    verdict = {
        "as_of": machine.store.clock.data_time() + days * DAY,
        "action": "recalibrate",
        "reason": "x",
    }
    return machine.update(machine.record_verdict(verdict))


def plan(machine, **over):
    """Another plan in force in this machine."""
    machine.settings.plan = replace(machine.plan, **over)


BOUNDS = {
    "is not automatic": {"automatic": ("first",)},
    "a model of the kind logistic is not among splines": {"learners": ("splines",)},
    "updates in the last 365 days": {"max_updates_per_year": 0},
}


@pytest.mark.parametrize("text", BOUNDS)
def test_each_bound_of_the_plan_lets_an_update_wait(machine, monkeypatch, text):
    tries(monkeypatch)
    plan(machine, **BOUNDS[text])
    update = renewed(machine)
    assert (update["action"], update["to_version"]) == ("wait", None) and text in update["reason"]
    assert machine.status()["champion"] == 1 and machine.pending_approvals()["action"].tolist() == [
        "refit"
    ]
    done = machine.approve(BY, "seen by the board")
    assert (
        (done["action"], done["to_version"]) == ("refit", 2) == ("refit", machine.champion.version)
    )
    assert machine.pending_approvals().empty and machine.verify() == []


def test_the_cool_down_between_two_updates_lets_the_second_wait(machine, monkeypatch):
    tries(monkeypatch)
    assert renewed(machine)["to_version"] == 2
    soon = renewed(machine, 1)
    assert soon["action"] == "wait" and "the last change (refit) was 1 days ago" in soon["reason"]


@pytest.mark.parametrize("why", ["the intercept 1.40 is outside", "the decision changes for 60 %"])
def test_what_the_decision_noted_outside_the_plan_waits(machine, monkeypatch, why):
    tries(monkeypatch, "recalibrate", [why])
    update = renewed(machine)
    assert update["action"] == "wait" and why in update["reason"]
    assert update["evidence"]["outside"] == [why] and machine.status()["champion"] == 1


def test_only_a_named_person_with_a_reason_decides_and_only_once(machine, monkeypatch):
    tries(monkeypatch, "reselect")
    renewed(machine)
    for ask in (machine.approve, machine.reject):
        for name, reason in ((BY, "fine"), ("a stranger", "fine"), (HEAD, "  "), ("", "fine")):
            with pytest.raises(LMError):
                ask(name, reason)
        with pytest.raises(LMError, match="nothing waits for approval as 99"):
            ask(HEAD, "fine", 99)
    assert machine.status()["champion"] == 1 and len(machine.pending_approvals()) == 1
    done = machine.approve(" Head of  Cardiology", "fine")
    assert done["to_version"] == 2 and done["evidence"]["approved_by"] == HEAD
    for ask in (machine.approve, machine.reject):
        with pytest.raises(LMError, match="nothing waits"):
            ask(HEAD, "again")
    log = machine.table("audit")
    assert log.loc[log["kind"] == "approval", "actor"].tolist() == [HEAD]
    assert (log["kind"] == "attempt").any() and machine.verify() == []


def test_a_rejected_update_is_gone_and_rests(machine, monkeypatch):
    tries(monkeypatch, "reselect")
    renewed(machine)
    assert machine.status()["challenger"] == 2
    done = machine.reject(HEAD, "not understood")
    assert (done["action"], done["to_version"]) == ("reject", None) and HEAD in done["reason"]
    assert machine.pending_approvals().empty and machine.status()["challenger"] is None
    count = machine.status()["counts"]["updates"]
    rest = renewed(machine, 1)
    assert rest["action"] == "keep" and "the next try is" in rest["reason"] and "seq" not in rest
    assert machine.status()["counts"]["updates"] == count


def test_what_waited_for_another_champion_waits_no_more(machine, monkeypatch):
    tries(monkeypatch, "reselect")
    renewed(machine)
    machine.promote(shifted(machine, 0.4), "by hand", BY)
    assert machine.pending_approvals().empty
    with pytest.raises(LMError, match="nothing waits"):
        machine.approve(HEAD, "too late")


def test_resting_uses_the_serving_version_only(machine):
    clock, updates = machine.store.clock.data_time(), machine.table("updates")
    for action in ("keep", "wait", "reject"):
        row = updates.iloc[:1].assign(action=action, from_version=1, as_of=clock)
        assert cool_down(machine.plan, row, 1, clock + 89 * DAY)
        assert not cool_down(machine.plan, row, 1, clock + 90 * DAY)
        assert not cool_down(machine.plan, row, 2, clock) and not cool_down(
            machine.plan, row, None, clock
        )


# Round the plan


def test_a_rollback_goes_to_a_version_that_has_served(machine, monkeypatch):
    tries(monkeypatch, "reselect")
    renewed(machine)
    with pytest.raises(LMError):
        machine.rollback(to=2)
    assert machine.status()["champion"] == 1 and len(machine.pending_approvals()) == 1


@pytest.mark.parametrize("action", ["promote", "rollback", "keep", "wait", "reject", "first"])
def test_an_update_under_another_name_does_not_pass_the_plan(machine, action):
    update = {
        "as_of": machine.store.clock.data_time(),
        "action": action,
        "reason": "x",
        "from_version": 1,
    }
    with contextlib.suppress(LMError):
        machine.adopt(update | {"to_version": shifted(machine, 2.0)})
    assert machine.status()["champion"] == 1


def test_a_promotion_of_what_waits_asks_for_the_same_person(machine, monkeypatch):
    tries(monkeypatch, "reselect")
    renewed(machine)
    with pytest.raises(LMError, match=HEAD):
        machine.promote(2, "round the plan", BY)


def test_a_model_promoted_by_hand_serves_for_the_cool_down(machine, monkeypatch):
    machine.promote(shifted(machine, 0.4), "by hand", BY)
    tries(monkeypatch)
    assert renewed(machine, 1)["action"] == "wait"


def test_a_quiet_verdict_does_not_put_off_the_answer_to_an_alarm(machine, monkeypatch):
    day = machine.store.clock.data_time() + 70 * DAY
    quiet = {"as_of": day, "action": "nothing", "reason": "all is well"}
    machine.update(machine.record_verdict(quiet))
    tries(monkeypatch)
    assert renewed(machine, 100)["action"] == "refit"


def test_a_verdict_about_an_earlier_champion_is_not_carried_out(machine, monkeypatch):
    machine.promote(shifted(machine, 0.4), "by hand", BY)
    tries(monkeypatch)
    old = {
        "as_of": machine.store.clock.data_time() - 100 * DAY,
        "action": "recalibrate",
        "reason": "x",
    }
    count = machine.status()["counts"]["updates"]
    with contextlib.suppress(LMError):
        machine.update(machine.record_verdict(old | {"version": 1}))
    swaps = machine.table("updates")
    assert len(swaps) == count or swaps["as_of"].is_monotonic_increasing


@pytest.mark.parametrize("change", [{"as_of": ...}, {"reason": ...}, {"to_version": "x"}])
def test_a_malformed_update_is_one_sentence(machine, change):
    update = {"as_of": machine.store.clock.data_time(), "action": "reselect", "reason": "x"}
    update |= {"from_version": 1, "to_version": shifted(machine, 0.4)} | change
    with pytest.raises(LMError):
        machine.adopt({k: v for k, v in update.items() if v is not ...})


def test_the_attempt_of_a_promotion_names_the_person(machine):
    machine.promote(shifted(machine, 0.4), "by hand", BY)
    log = machine.table("audit")
    assert log.loc[log["kind"] == "attempt", "actor"].iloc[-1] == BY

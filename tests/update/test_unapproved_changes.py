"""No sequence of requests but an approver's leads to another champion outside the plan."""

import json
import re
import shutil
import threading
from contextlib import suppress
from dataclasses import replace

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from support.long import much

import lm.machine.base
import lm.monitor.run
import lm.update.run
from lm.core.errors import LMError, NotFound
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.serve.app import create_app
from lm.serve.auth import Tokens
from lm.serve.routes import JOB, PERMISSIONS, ROLES
from lm.update.change_control import UPDATE_ACTIONS
from lm.update.decide import Case, Decision, decide_update
from lm.update.permission import Forbidden, Grants, way_back

STUDY = load_study("monica")
ROWS = read_rows(STUDY)
PAST = ROWS[ROWS["arrived"] < STUDY.first_model]
NEXT = ROWS[ROWS["arrived"] >= STUDY.first_model].head(600)
LOGGED_REFUSALS = ["record_id", "y", "known_at", "event", "followed_until"]
LEAD, HEAD = "quality manager", "head of cardiology"  # Whom the plan of monica names
FIRST = {"as_of": STUDY.first_model, "action": "first", "reason": "first", "from_version": None}
VERDICT = {"action": "recalibrate", "reason": "a chart is at its limit", "evidence": {}}
RECIPE = {"rung": "refit", "on": "outcomes", "window_days": 730}
GATE = {"rung": "refit", "passed": True, "checks": [{"name": "brier", "passed": True}]}


class Runs:
    """Takes a job with its word and does not run it."""

    def __init__(self):
        self.tokens_of_jobs = []

    def start(self, notebook, parameters, token):
        self.tokens_of_jobs.append((notebook, token))
        return {"job": f"{notebook}-1", "state": "running"}

    def report(self, job):
        raise NotFound(f"job {job!r} is unknown")

    states, cancel = None, report


def made(machine, by, action="refit", recipe=RECIPE):
    """A registered version whose recipe is on record, and the update that a job would hand in."""
    verdict = lm.monitor.run.latest_verdict(machine, machine.status()["champion"])
    snap = machine.snapshot()
    recipe, serves = recipe | {"rung": action}, machine.status()["champion"]
    facts = json.dumps({"from_version": serves, "recipe": recipe})
    model = machine.registry.load(serves).recalibrated(-by)
    params = {"action": action, "made": facts}
    version = machine.registry.register(model, {}, params, snap, "for the test")
    evidence = {"verdict": verdict["seq"], "recipe": recipe, "gates": [GATE | {"rung": action}]}
    update = {"as_of": str(verdict["as_of"]), "action": action, "reason": "better"}
    update |= {"from_version": serves, "to_version": version, "snapshot": snap["id"]}
    return update | {"evidence": evidence}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A home: versions 1 and 2 have served, 3 serves, 4 waits for a person, 5 is registered."""
    home = tmp_path_factory.mktemp("begun")
    with Machine(STUDY, home) as machine:
        model = fit(STUDY, PAST)
        for by in (0.0, 0.3, 0.6):
            machine.registry.register(model.recalibrated(by), {}, {}, {}, "for the test")
        machine.adopt(FIRST | {"to_version": 1})
        machine.receive_many(NEXT.head(30), source="history", on_arrival=True)
        machine.promote(2, "better", LEAD)
        machine.promote(3, "better still", LEAD)
        machine.receive_many(NEXT.tail(-30), source="history", on_arrival=True)
        machine.add_outcomes(NEXT.loc[NEXT["known_at"] <= machine.now(), LOGGED_REFUSALS])
        now = machine.now()
        machine.record_verdict(VERDICT | {"as_of": now, "version": 3})
        machine.adopt(made(machine, 0.1, "reselect"))
        made(machine, 0.2)
    return home


@pytest.fixture
def machine(begun, home):
    """A machine of its own on a copy of it."""
    shutil.copytree(begun, home)
    with Machine(STUDY, home) as machine:
        machine.settings.plan = replace(machine.plan, cool_down_days=0)
        yield machine


class Web:
    """A service in this process, a token of each role, and tokens of jobs that were caught."""

    def __init__(self, machine, people=None):
        self.machine, self.runs = machine, Runs()
        tokens = Tokens(machine.store.folder, grants=machine.grants)
        if people is None:
            people = {role: tokens.create(f"{role} one", role) for role in ROLES}
            people |= {LEAD: tokens.create(LEAD, "data scientist")}
        self.people = people
        self.tokens = people | {"local": tokens.local(), "anonymous": ""}
        self.file = tokens
        app = create_app(machine, self.runs, tokens=tokens)
        self.client = TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)

    def ask(self, who, path, body, method="POST"):
        word = self.tokens.get(who, who)
        shown = {"authorization": f"Bearer {word}"} if word else {}
        return self.client.request(method, path, json=body, headers=shown)

    def word(self, notebook, parameters=None):
        """The word of a job that the service starts for a data scientist."""
        body = {"notebook": notebook, "parameters": parameters or {}}
        assert self.ask("data scientist", "/v1/jobs", body).status_code == 202
        return self.runs.tokens_of_jobs[-1][1]


@pytest.fixture
def web(machine):
    """The machine behind its routes."""
    return Web(machine)


def state(machine):
    """What must not change: champion, since when, how many updates, who answers."""
    status = machine.status()
    return (
        status["champion"],
        status["since"],
        machine.store.status.counts()["updates"],
        machine.rollout(),
    )


# Holes of before, one by one


def counts(machine):
    """Rows of each table; the audit log keeps what was refused."""
    return {name: n for name, n in machine.store.status.counts().items() if name != "audit"}


@pytest.mark.slow
def test_no_person_hands_in_what_a_job_computes(web):
    bodies = {"/v1/results/updates": {"update": made(web.machine, 0.4) | {"as_of": "2099-01-01"}}}
    bodies |= {"/v1/results/verdicts": {"verdict": VERDICT | {"as_of": "2099-01-01"}}}
    bodies |= {"/v1/results/sketches": {"sketch": {"as_of": "2099-01-01", "version": 3}}}
    before = state(web.machine), counts(web.machine)
    for who in (*ROLES, LEAD, "local"):
        for path, body in bodies.items():
            answer = web.ask(who, path, body)
            assert answer.status_code == 403 and answer.json()["kind"] == "Forbidden"
    assert (state(web.machine), counts(web.machine)) == before


def test_a_job_that_the_service_started_updates_once_and_is_named(web):
    word, update = web.word("retrain"), made(web.machine, 0.4)
    done = web.ask(word, "/v1/results/updates", {"update": update}).json()
    assert done["to_version"] == web.machine.status()["champion"] == update["to_version"]
    log = web.machine.table("audit")
    name = log.loc[log["kind"].str.contains("updates"), "actor"].iloc[-1]
    assert name.startswith("job retrain-") and name.endswith(" of data scientist one")
    assert done["evidence"]["by"] == name and web.machine.verify() == []
    before = state(web.machine)
    for again in (update, update | {"from_version": update["to_version"]}):
        assert web.ask(word, "/v1/results/updates", {"update": again}).status_code == 403
    assert state(web.machine) == before


def test_a_job_of_the_monitor_hands_in_one_verdict_dated_by_the_machine(web):
    machine, verdict = (
        web.machine,
        VERDICT | {"version": 3, "snapshot": web.machine.snapshot()["id"]},
    )
    now, count = machine.now(), machine.store.status.counts()["verdicts"]
    for change in (
        {"as_of": "2099-01-01"},
        {"as_of": str(now), "version": 2},
        {"as_of": str(now), "snapshot": "0" * 64},
        {"as_of": "1960-01-01"},
    ):
        assert web.ask(
            web.word("monitor"), "/v1/results/verdicts", {"verdict": verdict | change}
        ).is_error
    assert machine.store.status.counts()["verdicts"] == count
    word, good = web.word("monitor"), verdict | {"as_of": str(now)}
    assert (
        web.ask(word, "/v1/results/verdicts", {"verdict": good})
        .json()["evidence"]["by"]
        .startswith("job m")
    )
    assert web.ask(word, "/v1/results/verdicts", {"verdict": good}).status_code == 403
    assert web.ask(word, "/v1/results/updates", {"update": made(machine, 0.4)}).status_code == 403


FALSE = (
    {"as_of": "2099-01-01"},
    {"as_of": "1970-01-01"},
    {"action": "recalibrate"},
    {"to_version": 5},
    {"to_version": 2},
    {"from_version": 2},
    {"snapshot": "0" * 64},
    {"evidence": {}},
    {"evidence": {"verdict": 1, "recipe": RECIPE}},
    {"evidence": {"verdict": 1, "recipe": RECIPE, "gates": [GATE | {"passed": False}]}},
    {"evidence": {"verdict": 99, "recipe": RECIPE, "gates": [GATE]}},
)


@pytest.mark.slow
def test_an_update_of_a_job_is_held_against_what_the_service_knows(web):
    before = state(web.machine)
    for change in FALSE:
        word, update = web.word("retrain"), made(web.machine, 0.4)
        assert web.ask(word, "/v1/results/updates", {"update": update | change}).is_error, change
    assert state(web.machine) == before


@pytest.mark.slow
def test_a_job_s_model_is_put_before_the_gate_by_the_service_whatever_the_job_says(web):
    before = web.machine.status()["champion"]
    for by, doubt in ((-2.0, "acceptance"), (6.0, "calibration")):
        word, update = web.word("retrain"), made(web.machine, by)
        assert update["evidence"]["gates"][-1]["passed"]
        done = web.ask(word, "/v1/results/updates", {"update": update}).json()
        assert done.get("action") == "wait" and done["to_version"] is None, done
        assert f"the registered model, {doubt}: " in done["reason"]
    for recipe in ({"window_days": "x"}, {"window_days": 1}, {"on": "follow-up"}, {"more": 1}):
        word, update = web.word("retrain"), made(web.machine, 0.4, recipe=RECIPE | recipe)
        answer = web.ask(word, "/v1/results/updates", {"update": update})
        assert answer.status_code == 403 or answer.json()["action"] == "wait", answer.text
    assert web.machine.status()["champion"] == before


def test_a_first_model_of_too_few_outcomes_waits_for_a_person(machine):
    known = machine.known()
    for rows, sentences in ((90, ["recent outcomes", "rarer outcome"]), (600, [])):
        case = Case(STUDY, known.head(rows), machine.now(), plan=machine.plan)
        first = decide_update(case, VERDICT)
        assert first.action == "first" and len(first.beyond_plan) == len(sentences)
        assert all(result in why for result, why in zip(sentences, first.beyond_plan, strict=True))


def test_a_word_counts_for_its_job_its_champion_its_study_and_its_process(web, begun, tmp_path):
    update, before = made(web.machine, 0.4), state(web.machine)
    other = Grants().issue("retrain", "Ada", 3, 4, web.machine.now(), {})[0]
    with suppress(LMError):
        web.machine.grants.issue("retrain", "Ada", 3, 4, web.machine.now(), {}, seconds=0)
    for word in (other, "lm_job_x", web.word("facts"), web.word("monitor")):
        assert web.ask(word, "/v1/results/updates", {"update": update}).status_code in (401, 403)
    late = web.word("retrain")
    assert state(web.machine) == before
    web.machine.rollback(by="Ada")
    gone = web.ask(late, "/v1/results/updates", {"update": update | {"from_version": 2}})
    assert gone.status_code == 403 and "start it again" in gone.json()["error"]
    shutil.copytree(begun, tmp_path / "again")
    with Machine(STUDY, tmp_path / "again") as machine:  # Grants end with the process
        assert Web(machine).ask(late, "/v1/results/updates", {"update": update}).status_code == 401


def test_only_who_is_on_the_machine_gets_a_token_for_a_job_of_their_own(web):
    body = {"notebook": "retrain", "parameters": {}, "by": "Ada"}
    for who in (*ROLES, LEAD, "anonymous", web.word("retrain")):
        assert web.ask(who, "/v1/grants", body).status_code in (401, 403)
    word = web.ask("local", "/v1/grants", body).json()["token"]
    done = web.ask(word, "/v1/results/updates", {"update": made(web.machine, 0.4)}).json()
    assert done["evidence"]["by"].endswith(" of Ada") and done["to_version"]


def test_a_run_or_a_snapshot_of_a_day_to_come_is_refused(web):
    before = state(web.machine)
    for path in ("/v1/monitoring/runs", "/v1/snapshots"):
        answer = web.ask("data scientist", path, {"as_of": "2099-01-01"})
        assert answer.status_code == 422 and "not later than now" in answer.json()["error"]
    job = {"notebook": "monitor", "parameters": {"as_of": "2099-01-01"}}
    assert web.ask("data scientist", "/v1/jobs", job).status_code == 422
    assert state(web.machine) == before


def test_a_sent_verdict_is_not_carried_out(web):
    before = state(web.machine)
    for body in ({"verdict": VERDICT | {"version": 3}}, {"verdict": 99}, {"verdict": -1}):
        assert web.ask("data scientist", "/v1/updates", body).status_code == 422
    web.machine.record_verdict({"as_of": web.machine.now(), "version": 3} | VERDICT)
    old = web.ask("data scientist", "/v1/updates", {"verdict": 1})
    assert "is not the latest" in old.json()["error"] and state(web.machine) == before


@pytest.mark.parametrize("who", ["admin", "data scientist"])
def test_none_but_a_person_on_the_machine_signs_for_another(web, who):
    before = state(web.machine)
    for path, body in {
        "/v1/approvals": {"name": HEAD, "reason": "x"},
        "/v1/rejections": {"name": HEAD, "reason": "x"},
        "/v1/promotions": {"version": 5, "reason": "x", "by": LEAD},
        "/v1/rollbacks": {"by": LEAD},
        "/v1/rollout": {"policy": {"kind": "canary", "challenger": 5}, "reason": "x", "by": LEAD},
        "/v1/withdrawals": {"kind": "record", "record_id": "x", "by": LEAD, "reason": "x"},
    }.items():
        answer = web.ask(who, path, body)
        assert answer.status_code == 403 and "cannot sign as" in answer.json()["error"], path
    assert state(web.machine) == before


# Acts have names


def test_every_act_has_the_name_of_its_person_in_store_and_log(web):
    machine, ada = web.machine, "data scientist one"
    web.ask("data scientist", "/v1/rollbacks", {"reason": "worse on the ward"})
    web.ask(
        "data scientist",
        "/v1/rollout",
        {"policy": {"kind": "shadow", "challenger": 5}, "reason": "x"},
    )
    web.ask(LEAD, "/v1/promotions", {"version": 5, "reason": "good", "by": LEAD})
    name = machine.table("records")["record_id"].iloc[0]
    decision = {"record_id": name, "clinician": "", "action": "override", "reason": "seen"}
    web.ask("clinician", "/v1/decisions", decision)
    web.ask("data scientist", "/v1/monitoring/runs", {"fast": True})
    log, updates = machine.table("audit"), machine.table("updates")
    split = log.assign(kind=log["kind"].str.split("+")).explode("kind")
    acts = split.groupby("kind")["actor"].agg(list)
    assert acts["updates"][-2:] == [ada, LEAD]
    assert [json.loads(text)["by"] for text in updates["evidence"][-2:]] == [ada, LEAD]
    assert updates["reason"].iloc[-2] == f"worse on the ward ({ada})"
    assert machine.table("rollouts")["actor"].tolist() == [ada, LEAD]
    assert acts["decisions"] == ["clinician one"] and acts["verdicts"][-1] == ada
    assert "" not in acts["updates"] + acts["verdicts"] + acts["rollouts"]
    assert machine.verify() == []


def test_what_is_done_in_this_process_has_the_name_of_its_user(machine, monkeypatch):
    monkeypatch.setattr(lm.machine.base.getpass, "getuser", lambda: "monica")
    machine.rollback()
    assert (
        machine.table("audit").query("kind.str.contains('updates')")["actor"].iloc[-1] == "monica"
    )

    def unknown():
        raise KeyError("no such user id")

    monkeypatch.setattr(lm.machine.base.getpass, "getuser", unknown)
    machine.rollback()
    assert machine.table("audit").query("kind.str.contains('updates')")["actor"].iloc[-1] == "local"


# The plan in one place


def test_a_recalibration_is_one_and_keeps_its_bounds_whatever_the_sender_says(machine):
    update = made(machine, -3.0, "recalibrate in the large")
    waits = machine.adopt(update)
    assert waits["action"] == "wait" and "the intercept 3.00 is outside" in waits["reason"]
    refit = fit(STUDY, PAST.head(600))
    version = machine.registry.register(refit, {}, {}, {}, "no recalibration")
    machine.settings.plan = replace(machine.plan, automatic=UPDATE_ACTIONS[:3])
    waits = machine.adopt(update | {"to_version": version})
    assert "refit is not automatic" in waits["reason"] and machine.status()["champion"] == 3


def test_a_rollback_goes_back_and_does_not_bring_the_names_of_an_older_plan(machine):
    newest = machine.plan
    older = replace(newest, approvers=("a nurse",), automatic=UPDATE_ACTIONS)
    machine.settings.plan = older
    numbers = machine.settings.numbers
    machine.settings.numbers = numbers | {"settings_latest": numbers["settings"], "settings": 0}
    with pytest.raises(LMError, match="may not decide"):
        machine.promote(5, "round the plan", "a nurse")
    machine.settings.plan = newest


def test_what_waits_is_approved_as_it_was_proposed_or_not_at_all(machine):
    (number,) = machine.pending_approvals()["seq"]
    machine.adopt(made(machine, 0.7, "reselect"))
    with pytest.raises(LMError, match="give the number"):
        machine.approve(HEAD, "seen")
    exchanged = machine.registry.load(5)
    models = machine.champion.models
    models._read[4], models._kinds = exchanged, {}
    with pytest.raises(LMError, match="is not the model that was proposed"):
        machine.approve(HEAD, "seen", number)
    del models._read[4]
    models._kinds = {}
    assert machine.approve(HEAD, "seen", number)["to_version"] == 4


def test_an_alias_that_another_process_moved_is_not_followed(machine, begun, home):
    machine.registry.set_alias("champion", 5)
    assert machine.status()["champion"] == 3
    machine.close()
    with Machine(STUDY, home) as again:
        assert again.status()["champion"] == again.registry.alias("champion") == 3


def test_a_champion_that_was_exchanged_in_the_registry_does_not_serve_again(machine, home):
    import sqlite3

    machine.close()
    with sqlite3.connect(machine.registry.file) as base:
        five = base.execute("SELECT run_id FROM model_versions WHERE version = 5").fetchone()
        base.execute("UPDATE model_versions SET run_id = ? WHERE version = 3", five)
    with pytest.raises(LMError, match="is not the model that update"):
        Machine(STUDY, home)


def test_a_false_date_of_an_older_version_is_counted_anew_once(machine, home):
    row = {"as_of": "2099-01-01", "action": "refit", "reason": "forged", "snapshot": ""}
    machine.store.events.append_update(row | {"from_version": 3, "to_version": 5, "evidence": {}})
    now = machine.now()
    machine.close()
    for _ in range(2):
        with Machine(STUDY, home) as again:
            assert again.status()["champion"] == 5
            assert now <= pd.Timestamp(again.status()["since"]) <= again.now()
            updates = again.table("updates")
            assert len(updates) == 6 and "2099-01-01" in updates["reason"].iloc[-1]
            assert lm.monitor.run.champion_at(again, again.now())[0] == 5
    with Machine(STUDY, home) as again:
        back = again.rollback(by="Ada")
        assert back["to_version"] == 3 and pd.Timestamp(back["as_of"]) < pd.Timestamp("2030-01-01")


# At the same time


def test_of_two_approvals_at_once_one_counts(machine):
    number, done, faults = int(machine.pending_approvals()["seq"].iloc[0]), [], []

    def approve():
        try:
            done.append(machine.approve(HEAD, "seen", number)["seq"])
        except LMError as error:
            faults.append(str(error))

    threads = [threading.Thread(target=approve) for _ in range(4)]
    threads += [threading.Thread(target=lambda: machine.rollback(by="Ada"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) <= 1 and all("nothing waits" in fault for fault in faults)
    steps = [s for s in machine.store.status.updates() if s["to_version"] is not None]
    assert [s["from_version"] for s in steps[1:]] == [s["to_version"] for s in steps[:-1]]


def test_a_token_that_was_revoked_or_is_another_role_decides_nothing(web):
    before = state(web.machine)
    web.file.revoke(LEAD)
    assert (
        web.ask(LEAD, "/v1/promotions", {"version": 5, "reason": "x", "by": LEAD}).status_code
        == 401
    )
    with pytest.raises(LMError, match="is taken"):
        web.file.create(LEAD.title(), "data scientist")
    for name in ("quаlity manager", "Quality  Manager", "job retrain-1 of Ada"):
        with suppress(LMError):  # The first has a Cyrillic letter
            web.tokens[name] = web.file.create(name, "data scientist")
            body = {"version": 5, "reason": "x", "by": name}
            assert web.ask(name, "/v1/promotions", body).is_error
    assert state(web.machine) == before


# Any sequence

TIMES = st.sampled_from(["2099-01-01", "1960-01-01", "1990-01-01", "", "soon", None])
VERSIONS = st.sampled_from([None, 0, 1, 2, 3, 4, 5, 99, "5", True])
NAMES = st.sampled_from(["", LEAD, HEAD, "Quality Manager ", "quаlity manager", "local"])
POLICIES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["shadow", "canary", "ab", "bandit", "champion"])},
    optional={"challenger": VERSIONS, "share": st.sampled_from([0.05, 1.0])},
)
EVIDENCE = st.sampled_from(
    [
        {"verdict": 1, "recipe": RECIPE, "gates": [GATE]},
        {"verdict": 1, "outside": []},
        {},
        None,
        [],
        "x",
    ]
)
UPDATES = st.fixed_dictionaries(
    {
        **{"as_of": TIMES, "from_version": VERSIONS, "to_version": VERSIONS},
        **{"action": st.sampled_from([*UPDATE_ACTIONS, "promote", "rollback", "wait"])},
        **{"reason": st.just("forged"), "snapshot": st.just(""), "evidence": EVIDENCE},
    }
)
VERDICTS = st.fixed_dictionaries(
    {"as_of": TIMES, "action": st.sampled_from(["retrain", "recalibrate"]), "version": VERSIONS}
)
NAMED = st.sampled_from([*NEXT["record_id"].head(2), "new", "../4", "", 5])
ROW = NEXT[["arrived", *STUDY.feature_names]].iloc[-1].astype(object).to_dict()
ROW |= {"arrived": str(ROW["arrived"])}
RECORDS = st.builds(lambda name: ROW | {"record_id": name}, NAMED)
JOB_REQUESTS = [{"notebook": "retrain"}, {"notebook": "monitor"}]
BODIES = {
    "/v1/results/updates": st.fixed_dictionaries({"update": UPDATES}),
    "/v1/results/verdicts": st.fixed_dictionaries({"verdict": VERDICTS}),
    "/v1/results/sketches": st.fixed_dictionaries({"sketch": VERDICTS}),
    "/v1/updates": st.fixed_dictionaries({"verdict": st.one_of(VERDICTS, st.sampled_from([1, 2]))}),
    "/v1/promotions": st.fixed_dictionaries(
        {"version": VERSIONS, "reason": st.just("x"), "by": NAMES}
    ),
    "/v1/approvals": st.fixed_dictionaries(
        {"name": NAMES, "reason": st.just("x"), "number": st.sampled_from([None, 4, 9])}
    ),
    "/v1/rollbacks": st.fixed_dictionaries(
        {"to": VERSIONS, "as_of": TIMES, "by": st.sampled_from(["", LEAD])}
    ),
    "/v1/rollout": st.fixed_dictionaries({"policy": POLICIES, "reason": st.just("x"), "by": NAMES}),
    "/v1/snapshots": st.fixed_dictionaries({"as_of": TIMES}),
    "/v1/audit/notes": st.just({"content": {"what": "promote", "version": 5}}),
    "/v1/grants": st.fixed_dictionaries({"notebook": st.just("retrain"), "by": NAMES}),
    "/v1/jobs": st.sampled_from(JOB_REQUESTS),
    "/v1/monitoring/runs": st.fixed_dictionaries(
        {"fast": st.just(True)}, optional={"as_of": TIMES}
    ),
    "/v1/records": st.fixed_dictionaries({"row": RECORDS, "now": TIMES}),
    "/v1/outcomes": st.fixed_dictionaries({"record_id": NAMED, "y": VERSIONS, "known_at": TIMES}),
    "/v1/decisions": st.fixed_dictionaries(
        {"record_id": NAMED, "clinician": NAMES, "action": st.just("override"), "now": TIMES}
    ),
    "/v1/withdrawals": st.fixed_dictionaries(
        {"kind": st.just("record"), "record_id": NAMED, "by": NAMES, "reason": st.just("x")}
    ),
}
ANY = st.dictionaries(  # What a route without a line above is asked
    st.sampled_from(["version", "to_version", "champion", "policy", "rows", "inputs", "by"]),
    VERSIONS | POLICIES | NAMES | st.lists(RECORDS, max_size=1),
    max_size=3,
)
PLACES = st.sampled_from(["3", "5", "0", "monica", "updates", "..%2f4", "retrain-1", "champion"])
METHODS = ("get", "post", "put", "patch", "delete")
assert {("POST", path) for path in BODIES} <= set(PERMISSIONS)


def operations(app):
    """Method and path of all that the service's OpenAPI document has: no list of ours."""
    paths = app.openapi()["paths"]
    return [(how.upper(), path) for path, has in paths.items() for how in has if how in METHODS]


class Outsiders(RuleBasedStateMachine):
    """Everybody but an approver asks for everything, with words of jobs that they have caught."""

    begun = folder = None  # Set by the test

    def __init__(self):
        super().__init__()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.begun, self.folder)
        self.machine = self.opened()
        self.web, self.began = Web(self.machine), self.machine.now()
        self.steps = len(self.machine.store.status.updates())
        self.tokens_of_jobs = [Grants().issue("retrain", "Ada", 3, 4, self.began, {})[0]]

    def opened(self):
        machine = Machine(STUDY, self.folder)
        machine.settings.plan = replace(machine.plan, cool_down_days=0)
        return machine

    def teardown(self):
        self.machine.close()

    def asks(self, who, method, path, data):
        body = None if method == "GET" else data.draw(BODIES.get(path, ANY))
        place = re.sub(r"\{[^}]*\}", lambda _: data.draw(PLACES), path)
        answer = self.web.ask(who, place, body, method)
        assert answer.status_code < 500, (who, method, place, body, answer.text)
        self.tokens_of_jobs += [
            word for _, word in self.web.runs.tokens_of_jobs if word not in self.tokens_of_jobs
        ]
        return answer

    @rule(role=st.sampled_from([*ROLES, "anonymous"]), data=st.data())
    def ask(self, role, data):
        self.asks(role, "POST", data.draw(st.sampled_from(sorted(BODIES))), data)

    @rule(data=st.data())
    def ask_for_all(self, data):
        """Each operation that there is, in any order, each by any role or by a caught word."""
        whole = operations(self.web.client.app)
        assert len(whole) > 40 and {path for _, path in whole} >= set(BODIES)
        for method, path in data.draw(st.permutations(whole)):
            who = data.draw(st.sampled_from([*ROLES, "anonymous", self.tokens_of_jobs[-1]]))
            self.asks(who, method, path, data)

    @rule(data=st.data())
    def replay(self, data):
        word = data.draw(st.sampled_from(self.tokens_of_jobs))
        path = data.draw(
            st.sampled_from(
                [
                    "/v1/results/updates",
                    "/v1/results/verdicts",
                    "/v1/results/sketches",
                    "/v1/promotions",
                ]
            )
        )
        assert self.asks(word, "POST", path, data).is_error

    @rule()
    def restart(self):
        self.machine.close()
        self.machine = self.opened()
        self.web = Web(self.machine, self.web.people)

    @invariant()
    def the_champion_is_where_the_plan_leads(self):
        steps = [s for s in self.machine.store.status.updates() if s["to_version"] is not None]
        for n, step in enumerate(steps):
            stored = json.loads(step["evidence"])
            if step["seq"] <= self.steps or n == 0:
                continue
            assert stored["by"] and stored["basis"] in ("rollback", "plan"), step
            assert self.began <= pd.Timestamp(step["as_of"]) <= self.machine.now()
            if stored["basis"] == "rollback":
                assert step["to_version"] in way_back(steps[:n])
            else:
                assert stored["gates"][-1]["passed"] and not stored["outside"]
        status = self.machine.status()
        assert status["champion"] == steps[-1]["to_version"]
        assert pd.Timestamp(status["since"]) == pd.Timestamp(steps[-1]["as_of"])
        assert self.machine.live.policy.kind in ("champion", "shadow")


@pytest.mark.slow
def test_no_sequence_of_requests_but_an_approvers_leads_round_the_plan(begun, tmp_path):
    Outsiders.begun, Outsiders.folder = begun, tmp_path / "home"
    checks = list(HealthCheck)
    how = settings(max_examples=much(3, 200), stateful_step_count=8, deadline=None, database=None)
    run_machine(Outsiders, settings=settings(how, suppress_health_check=checks, derandomize=True))


# What is allowed still works


def test_an_approval_by_a_person_whom_the_plan_names_works_and_is_named(web):
    web.tokens[HEAD] = web.file.create(HEAD, "data scientist")
    (number,) = web.machine.pending_approvals()["seq"]
    body = {"name": "", "reason": "seen by the board", "number": int(number)}
    assert web.ask("data scientist", "/v1/approvals", body).is_error
    done = web.ask(HEAD, "/v1/approvals", body).json()
    assert done["to_version"] == 4 and done["evidence"]["approved_by"] == HEAD
    assert (
        web.machine.table("audit").query("kind.str.contains('updates')")["actor"].iloc[-1] == HEAD
    )


def test_a_verdict_is_carried_out_within_the_plan_by_the_service_itself(web, monkeypatch):
    def decided(case, verdict):
        model = case.champion.recalibrated(0.1)
        stored = {"recipe": RECIPE, "gates": [GATE]}
        return Decision(case.as_of, "refit", "it is better", model, stored)

    monkeypatch.setattr(lm.update.run, "decide_on", decided)
    monkeypatch.setattr(lm.update.run, "cool_down", lambda *_: "")  # Something waits since today
    done = web.ask("data scientist", "/v1/updates", {}).json()
    assert done["to_version"] == web.machine.status()["champion"] == 6
    assert done["evidence"]["by"] == "data scientist one"


def test_the_permissions_name_what_a_job_may(web):
    mine = {path for (method, path), who in PERMISSIONS.items() if JOB in who and method == "POST"}
    handed = {"/v1/results/verdicts", "/v1/results/sketches", "/v1/results/updates"}
    assert mine == handed | {
        "/v1/audit/notes",
        "/v1/snapshots",
        "/v1/predictions",
        "/v1/records/batch",
    }
    assert all(PERMISSIONS["POST", path] == {JOB} for path in handed)
    with pytest.raises(Forbidden):
        web.machine.submit_result("update", made(web.machine, 0.4), None)


def test_a_past_run_or_a_second_try_beside_the_first_chooses_no_update(machine, monkeypatch):
    now, before = machine.now(), state(machine)
    early = machine.record_verdict(
        VERDICT | {"as_of": now - pd.Timedelta(days=1), "version": 3, "reason": "it looked back"}
    )
    with pytest.raises(LMError, match="is not the latest"):
        machine.update(early)
    with machine.deciding, pytest.raises(LMError, match="is being decided about"):
        machine.update(lm.monitor.run.latest_verdict(machine, 3))
    assert state(machine) == before

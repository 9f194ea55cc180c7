"""Simulations: no look-ahead, memory and machine agree, and drift is what the gain comes from."""

import json
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from support.long import much

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.source import outcomes, stream
from lm.machine.machine import Machine
from lm.offline.calendar import monitoring_days, monitoring_interval
from lm.offline.live import APPROVALS, declared, live
from lm.offline.policies import UPDATE_POLICIES
from lm.offline.prequential import control, gain, prequential
from lm.offline.story import STORY_FILES, Story, clear_story, side_by_side, story

UNTIL = pd.Timestamp("1989-01-01")  # Monica's first swap is in October 1987


@pytest.fixture(scope="module")
def monica():
    study = load_study("monica")
    return study, read_rows(study)


@cache
def lived(name, policy="triggered"):
    """The simulation of a whole study under a policy, made once."""
    study = load_study(name)
    return prequential(study, read_rows(study), policy)


@pytest.fixture(scope="module")
def real():
    return lived("monica")


@pytest.fixture(scope="module")
def driven(monica, tmp_path_factory):
    """A machine that has lived until 1989, and what it reported to the progress bar."""
    study, rows = monica
    results = []
    with Machine(study, tmp_path_factory.mktemp("driven")) as machine:
        sent = live(machine, rows[rows["arrived"] < UNTIL], progress=results.append)
        yield machine, sent, results


def other_future(study, rows, day, seed=0):
    """The same rows with everything exchanged that cannot be known by `day`."""
    rng = np.random.default_rng(seed)
    later, untold = rows["arrived"] > day, ~(rows["known_at"] <= day)
    changed = rows.copy()
    mixed = rng.permutation(np.flatnonzero(later))
    features = study.feature_names
    changed.loc[later, features] = rows.loc[mixed, features].to_numpy()
    changed.loc[untold, "y"] = 1 - rows.loc[untold, "y"]
    return changed.astype(rows.dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["yearly refit and recalibration", "triggered"])
@pytest.mark.parametrize("name", ["monica", "rotterdam"])
def test_nothing_up_to_a_day_depends_on_what_comes_after_it(name, policy):
    study = load_study(name)
    rows = read_rows(study)
    day = monitoring_days(study, rows)[-6]
    simulations = [lived(name, policy), prequential(study, other_future(study, rows, day), policy)]
    before = [s.predictions[s.predictions["arrived"] <= day] for s in simulations]
    before = [frame.drop(columns=["y", "ipcw"]) for frame in before]  # Scored in the end
    pd.testing.assert_frame_equal(*before, check_exact=True)
    assert len(before[0]) > 500
    updates = [s.updates[s.updates["as_of"] <= day] for s in simulations]
    pd.testing.assert_frame_equal(*updates, check_dtype=False)
    after = [s.predictions.loc[s.predictions["arrived"] > day, "risk"] for s in simulations]
    assert not np.allclose(*after)


@pytest.mark.slow
def test_a_prediction_comes_from_the_version_that_served_when_the_patient_arrived(real, monica):
    study, _ = monica
    swaps = real.updates.dropna(subset="to_version")
    assert len(swaps) >= 1 and (real.predictions["arrived"] > study.first_model).all()
    number = 1 + np.searchsorted(swaps["as_of"], real.predictions["arrived"], side="left")
    np.testing.assert_array_equal(real.predictions["version"], number)


@pytest.mark.slow
def test_the_live_machine_does_what_the_simulation_in_memory_does(driven, monica):
    study, rows = monica
    machine, sent, result = driven
    memory = prequential(study, rows[rows["arrived"] < UNTIL])
    served = machine.known().dropna(subset="risk")
    assert sent == sum(result) == len(served) == len(memory.predictions)
    columns = ["record_id", "arrived", "risk", "low", "high", "log_odds"]
    pd.testing.assert_frame_equal(
        served[columns].reset_index(drop=True),
        memory.predictions[columns].astype({"arrived": served["arrived"].dtype}),
        rtol=1e-12,
    )
    assert served["version"].tolist() == memory.predictions["version"].tolist()
    assert served["version"].nunique() >= 2
    names = ["as_of", "action", "reason", "from_version", "to_version"]
    stored = machine.table("updates")[names]
    assert stored["action"].iloc[0] == "first"
    simulated = memory.updates[names]
    updates = stored.iloc[1:].reset_index(drop=True).astype(simulated.dtypes)
    pd.testing.assert_frame_equal(updates, simulated, check_dtype=False)
    days = monitoring_days(study, rows[rows["arrived"] < UNTIL], follow=True)
    assert len(machine.table("verdicts")) == len(days) >= memory.monitoring_runs + 1


def test_live_refuses_a_store_that_holds_patients(driven, monica):
    with pytest.raises(LMError, match="needs an empty one"):
        live(driven[0], monica[1])


@pytest.mark.slow
def test_patients_stops_early_and_act_hears_of_what_comes_after_the_first_model(monica, home):
    study, rows = monica
    stored = (rows["arrived"] < "1987") | (
        rows.index % 3 == 0
    )  # Rarer, but the feed has not stopped
    rows, asked = rows.assign(y=rows["y"].where(stored, 0)), []
    with Machine(study, home) as machine:
        sent = live(machine, rows, act=asked.append, patients=300)
        counts, verdicts = machine.status()["counts"], machine.table("verdicts")
    after = rows[rows["arrived"] > study.first_model]
    runs = monitoring_days(study, rows)
    reached = next(i for i, day in enumerate(runs) if (after["arrived"] <= day).sum() >= 300)
    assert sent == counts["predictions"] == (after["arrived"] <= runs[reached]).sum()
    assert counts["records"] == sent + (rows["arrived"] <= study.first_model).sum()
    assert counts["verdicts"] == reached + 1 and counts["updates"] == 1
    proposed = verdicts["action"].isin(["recalibrate", "retrain"]) & (verdicts["seq"] > 1)
    assert proposed.any() and [v["seq"] for v in asked] == verdicts["seq"][proposed].tolist()


def test_the_learning_machine_is_better_than_the_frozen_one(real):
    result = gain(real)
    assert result["high"] < 0 and result["difference"] < -0.002
    assert result["updates"] >= 1 and result["patients"] > 2500


@pytest.mark.slow
def test_shuffled_patients_show_no_such_gain(real, monica):
    """What remains without drift is more data and luck: less, and outside the interval."""
    result, chance = gain(real), control(*monica, seeds=range(much(3, 20)))
    left = chance["difference"].mean()
    assert left > 0.75 * result["difference"] and left > result["high"]
    assert (chance["difference"] > result["difference"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", UPDATE_POLICIES)
def test_every_policy_runs_where_outcomes_come_late(policy):
    study = load_study("rotterdam")
    rows = read_rows(study)
    done = lived("rotterdam", policy)
    assert len(done.predictions) == (rows["arrived"] > study.first_model).sum()
    assert done.predictions[["risk", "frozen"]].apply(lambda c: c.between(0, 1).all()).all()
    stored = done.updates["to_version"].isna()
    assert (stored == (done.updates["action"] == "keep")).all()
    assert (done.updates["reason"].str.len() > 10).all()
    if policy == "frozen":
        assert done.updates.empty and (done.predictions["version"] == 1).all()
        assert (done.predictions["risk"] == done.predictions["frozen"]).all()
    else:
        assert (~stored).any()
    if policy == "yearly recalibration":
        assert stored.iloc[0] and not stored.iloc[-1]  # Two years without outcomes, then some


def test_an_unknown_policy_and_a_study_without_a_future_are_refused(monica):
    study, rows = monica
    with pytest.raises(LMError, match="policy 'weekly' is unknown"):
        prequential(study, rows, "weekly")
    with pytest.raises(LMError, match="no patient arrives after"):
        prequential(study, rows[rows["arrived"] <= study.first_model])


@pytest.mark.slow
def test_a_policy_refits_with_the_family_it_gets(monica):
    study, rows = monica
    some = rows[rows["arrived"] < "1989-01-01"]
    done = prequential(study, some, "yearly refit", every_days=182, family="boosting", seed=3)
    assert done.model.family == "boosting" and done.model.seed == 3


# ---------------------------------------------------------------- rhythm


def test_the_rhythm_depends_on_horizon_and_on_arrivals_before_the_first_model_alone(monica):
    study, rows = monica
    free = replace(study, every=None)
    assert monitoring_interval(study, rows) == study.every == 91
    later = rows["arrived"] > study.first_model
    dense = pd.concat([rows, rows[later], rows[later]])
    for some in (rows, dense, rows[~later]):
        assert monitoring_interval(free, some) == 28
    for horizon, longest in ((0.2, 7), (10, 10), (28, 28), (5000, 91)):
        for times in (1, 3, 200):
            result = monitoring_interval(
                replace(free, horizon_days=horizon), pd.concat([rows[~later]] * times)
            )
            assert 1 <= result <= longest
            arrive = result * times * (~later).sum() / 730
            assert result == longest or arrive + 1e-9 >= 50 or result == 1


@pytest.mark.parametrize("every", [0, -7])
def test_a_rhythm_below_a_day_is_refused(monica, every):
    with pytest.raises(LMError, match=f"every = {every} breaks the rule"):
        monitoring_days(*monica, every)


def test_a_simulation_runs_on_until_the_outcomes_in_the_table_are_known(driven, monica):
    study, rows = monica
    machine, _, _ = driven
    rows = rows[rows["arrived"] < UNTIL]
    last = outcomes(study, rows)["known_at"].max()
    assert last > rows["arrived"].max()
    assert machine.table("verdicts")["as_of"].max() >= last
    assert len(machine.table("outcomes")) == len(outcomes(study, rows))
    days = monitoring_days(study, rows, 7, follow=True)
    assert days[: len(monitoring_days(study, rows, 7))] == monitoring_days(study, rows, 7)
    assert days[-2] < last <= days[-1]


def test_outcomes_of_an_interval_are_one_transaction(driven):
    """Of 1,800 outcomes one by one each costs 16 ms."""
    machine, _, _ = driven
    log = machine.table("audit").query("kind != 'snapshot'")  # Its entry counts every table
    wrote = log["content"].str.contains('"outcomes"')
    assert wrote.sum() <= len(machine.table("verdicts"))
    assert len(machine.table("outcomes")) > 20 * wrote.sum()


# ---------------------------------------------------------------- story


def test_every_update_holds_the_number_of_the_verdict_that_it_answers(driven):
    machine, _, _ = driven
    verdicts = machine.table("verdicts").set_index("seq")
    updates = machine.table("updates")
    for row in updates.itertuples():
        answered = verdicts.loc[json.loads(row.evidence)["verdict"]]
        assert answered["as_of"] == row.as_of and answered["action"] in ("recalibrate", "retrain")
        assert answered["reason"] in story(machine, machine.study).text()


def test_a_reason_is_that_of_the_verdict_answered_not_of_the_day(driven):
    """A person has monitored an earlier moment since: it is the last verdict by number."""
    machine, _, _ = driven
    before = story(machine, machine.study).decisions[:-1]
    verdict = {"as_of": machine.study.first_model, "action": "nothing", "reason": "QUITE ANOTHER"}
    machine.record_verdict(verdict | {"version": None, "evidence": {}})
    assert story(machine, machine.study).decisions[:-1] == before
    assert not any("QUITE ANOTHER" in line for line in before)


def test_updates_stored_before_they_held_the_number_find_their_verdict_by_its_snapshot(driven):
    from lm.offline.story import _sentences

    machine, _, _ = driven
    updates, verdicts = machine.table("updates"), machine.table("verdicts")
    stored = [json.loads(text) for text in updates["evidence"]]
    old = updates.assign(
        evidence=[json.dumps({k: v for k, v in e.items() if k != "verdict"}) for e in stored]
    )
    assert _sentences(old, verdicts) == _sentences(updates, verdicts)
    nowhere = _sentences(old.assign(snapshot=""), verdicts)
    assert not any("because" in line for line in nowhere)


def test_a_story_never_shows_what_is_not_there(monica):
    figures = {"difference": np.nan, "low": np.nan, "high": np.nan, "labels": ""}
    figures |= {"rejected_records": 0, "rejected_outcomes": 0, "rejected": []}
    result = Story(monica[0], pd.DataFrame(), [], figures).text()
    assert "no Brier score yet" in result and "nan" not in result
    some = Story(monica[0], pd.DataFrame(), [], figures | {"difference": -0.001}).text()
    assert "-0.0010\n" in some and "nan" not in some


def test_a_story_is_written_whole_and_removed_before_the_next(driven, tmp_path, monkeypatch):
    machine, _, _ = driven
    result = story(machine, machine.study)
    result.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(STORY_FILES)
    broken = Story(result.study, result.table, result.decisions, result.figures | {"x": object()})
    with pytest.raises(TypeError):
        broken.write(tmp_path)
    assert (tmp_path / "story.txt").read_text() == result.text()
    clear_story(tmp_path)
    assert not list(tmp_path.iterdir())


def early_events(rows, share=0.02, seed=0):
    """Rows of which some have an event a year before they arrive."""
    bad = np.random.default_rng(seed).random(len(rows)) < share
    before = rows["arrived"] - pd.Timedelta(days=365)
    dated = rows.assign(event=rows["event"].mask(bad, before), y=rows["y"].mask(bad, 1.0))
    return dated.assign(known_at=dated["known_at"].mask(bad, before)), bad


@pytest.mark.slow
def test_what_was_rejected_is_counted_and_named_by_its_line(monica, home):
    study, rows = monica
    rows, bad = early_events(rows[rows["arrived"] < "1987-06-01"])
    with Machine(study, home) as machine:
        live(machine, rows)
        result = story(machine, study)
        assert len(machine.table("outcomes")) == len(outcomes(study, rows)) - bad.sum()
    assert bad.sum() > 10
    assert result.figures["rejected_outcomes"] == bad.sum()
    assert result.figures["rejected_records"] == 0 and result.figures["keep_decisions"] == 0
    assert f"0 records and {bad.sum()} outcomes were rejected, the first:" in result.text()
    lines = study.rows.read_text().splitlines()
    names = set(rows.loc[bad, "record_id"])
    for sentence in result.figures["rejected"]:
        number = int(sentence.split("line ")[1].split(":")[0])
        assert lines[number - 1].split(",")[0] in names
        assert not any(name in sentence for name in names)
        assert "breaks the rule" in sentence


def test_no_outcome_reaches_a_machine_before_its_record(monica):
    study, rows = monica
    rows, bad = early_events(rows[:200], share=0.2)
    came = set()
    for event in stream(study, rows):
        if event.kind == "record":
            came.add(event.row["record_id"])
        else:
            assert event.row["record_id"] in came
    assert bad.sum() > 20


@pytest.fixture
def asking(monica, tmp_path):
    """Monica under a plan that lets the machine do nothing by itself."""
    study, _ = monica
    folder = tmp_path / "data" / "monica"
    shutil.copytree(study.folder, folder)
    plan = (folder / "plan.toml").read_text()
    start = plan.index("automatic = [")
    end = plan.index("]", start) + 1
    (folder / "plan.toml").write_text(plan[:start] + "automatic = []" + plan[end:])
    return load_study(folder)


@pytest.mark.parametrize("approve", APPROVALS)
def test_approvals_in_a_simulation_are_declared(asking, monica, home, approve):
    rows = monica[1]
    rows = rows[rows["arrived"] < "1987-03-01"]
    with Machine(asking, home) as machine:
        live(machine, rows, approve=approve)
        updates, waits = machine.table("updates"), machine.pending_approvals()
        if approve == "never":
            assert set(updates["action"]) <= {"wait"} and len(waits)
            with pytest.raises(LMError, match=r"no patient has been predicted: .*waits for appro"):
                story(machine, asking)
            return
        assert waits.empty and updates["action"].tolist()[:2] == ["wait", "first"]
        result = story(machine, asking, declared(asking, rows, approve=approve)).text()
    assert f"simulated: {APPROVALS[approve]}" in result
    assert "because no model yet, and" in result  # Of what was approved, too


def test_an_unknown_way_to_approve_is_refused(monica, home):
    with Machine(monica[0], home) as machine, pytest.raises(LMError, match="at once, never"):
        live(machine, monica[1], approve="sometimes")


@pytest.mark.slow
def test_checks_are_a_choice(monica, home):
    study, rows = monica
    rows = rows[rows["arrived"] < "1987-03-01"]
    for checks in (False, True):
        with Machine(study, home / str(checks)) as machine:
            live(machine, rows, every_days=30, checks=checks)
            looked = [json.loads(e) for e in machine.table("verdicts")["evidence"]]
            assert any("drift" in evidence for evidence in looked[1:]) == checks
        assert ("data quality" in declared(study, rows, 30, checks)[0]) == checks


@pytest.mark.parametrize(("patients", "events"), [(1, 0), (1, 1), (2, 1), (3, 0), (3, 3)])
def test_an_interval_that_cannot_be_computed_is_left_out(monica, patients, events):
    y = np.r_[np.ones(events), np.zeros(patients - events)]
    arrived = pd.date_range("1990-01-01", periods=patients)
    frame = pd.DataFrame({"arrived": arrived, "y": y, "risk": 0.2, "frozen": 0.1})
    table = side_by_side(monica[0], frame)
    assert len(table) == 2 and "nan" not in table.to_string()
    assert table.to_string() == table.to_string().replace("<NA>", "")

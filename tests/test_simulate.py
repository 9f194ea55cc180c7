"""Simulations: no look-ahead, memory and machine agree, and drift is what the gain comes from."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

from lm.machine import Machine
from lm.settings import LMError
from lm.simulate import POLICIES, calendar, control, gain, live, prequential
from lm.study import load_study, read_rows

UNTIL = pd.Timestamp("1991-01-01")  # Monica's first swap is in June 1990


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
    """A machine that has lived until 1991, and what it told the progress bar."""
    study, rows = monica
    told = []
    with Machine(study, tmp_path_factory.mktemp("driven")) as machine:
        sent = live(machine, rows[rows["arrived"] < UNTIL], progress=told.append)
        yield machine, sent, told


def other_future(study, rows, day, seed=0):
    """The same rows with everything exchanged that nobody can know by `day`."""
    rng = np.random.default_rng(seed)
    later, untold = rows["arrived"] > day, ~(rows["known_at"] <= day)
    changed = rows.copy()
    mixed = rng.permutation(np.flatnonzero(later))
    features = study.feature_names
    changed.loc[later, features] = rows.loc[mixed, features].to_numpy()
    changed.loc[untold, "y"] = 1 - rows.loc[untold, "y"]
    return changed.astype(rows.dtypes)


@pytest.mark.parametrize("policy", ["yearly refit and recalibration", "triggered"])
@pytest.mark.parametrize("name", ["monica", "rotterdam"])
def test_nothing_up_to_a_day_depends_on_what_comes_after_it(name, policy):
    study = load_study(name)
    rows = read_rows(study)
    day = calendar(study, rows)[-6]
    simulations = [lived(name, policy), prequential(study, other_future(study, rows, day), policy)]
    before = [s.predictions[s.predictions["arrived"] <= day].drop(columns="y") for s in simulations]
    pd.testing.assert_frame_equal(*before, check_exact=True)
    assert len(before[0]) > 500
    updates = [s.updates[s.updates["as_of"] <= day] for s in simulations]
    pd.testing.assert_frame_equal(*updates, check_dtype=False)
    after = [s.predictions.loc[s.predictions["arrived"] > day, "risk"] for s in simulations]
    assert not np.allclose(*after)


def test_a_prediction_comes_from_the_version_that_served_when_the_patient_arrived(real, monica):
    study, _ = monica
    swaps = real.updates.dropna(subset="to_version")
    assert len(swaps) >= 1 and (real.predictions["arrived"] > study.first_model).all()
    number = 1 + np.searchsorted(swaps["as_of"], real.predictions["arrived"], side="left")
    np.testing.assert_array_equal(real.predictions["version"], number)


def test_the_live_machine_does_what_the_simulation_in_memory_does(driven, monica):
    study, rows = monica
    machine, sent, told = driven
    memory = prequential(study, rows[rows["arrived"] < UNTIL])
    served = machine.known().dropna(subset="risk")
    assert sent == sum(told) == len(served) == len(memory.predictions)
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
    assert len(machine.table("verdicts")) == memory.looks + 1


def test_live_refuses_a_store_that_holds_patients(driven, monica):
    with pytest.raises(LMError, match="needs an empty one"):
        live(driven[0], monica[1])


def test_patients_stops_early_and_act_hears_of_what_comes_after_the_first_model(monica, home):
    study, rows = monica
    rows, asked = rows.assign(y=rows["y"].where(rows["arrived"] < "1987", 0)), []
    with Machine(study, home) as machine:
        sent = live(machine, rows, act=asked.append, patients=300)
        counts, verdicts = machine.status()["counts"], machine.table("verdicts")
    after = rows[rows["arrived"] > study.first_model]
    looks = calendar(study, rows)
    reached = next(i for i, day in enumerate(looks) if (after["arrived"] <= day).sum() >= 300)
    assert sent == counts["predictions"] == (after["arrived"] <= looks[reached]).sum()
    assert counts["records"] == sent + (rows["arrived"] <= study.first_model).sum()
    assert counts["verdicts"] == reached + 1 and counts["updates"] == 1
    proposed = verdicts["action"].isin(["recalibrate", "retrain"]) & (verdicts["seq"] > 1)
    assert proposed.any() and [v["seq"] for v in asked] == verdicts["seq"][proposed].tolist()


def test_the_learning_machine_is_better_than_the_frozen_one(real):
    found = gain(real)
    assert found["high"] < 0 and found["difference"] < -0.002
    assert found["updates"] >= 1 and found["patients"] > 2500


def test_shuffled_patients_show_no_such_gain(real, monica):
    """What remains without drift is more data and luck: less, and outside the interval."""
    found, chance = gain(real), control(*monica, seeds=range(6))
    left = chance["difference"].mean()
    assert left > 0.75 * found["difference"] and left > found["high"]
    assert (chance["difference"] > found["difference"]).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_where_outcomes_come_late(policy):
    study = load_study("rotterdam")
    rows = read_rows(study)
    done = lived("rotterdam", policy)
    assert len(done.predictions) == (rows["arrived"] > study.first_model).sum()
    assert done.predictions[["risk", "frozen"]].apply(lambda c: c.between(0, 1).all()).all()
    kept = done.updates["to_version"].isna()
    assert (kept == (done.updates["action"] == "keep")).all()
    assert (done.updates["reason"].str.len() > 10).all()
    if policy == "frozen":
        assert done.updates.empty and (done.predictions["version"] == 1).all()
        assert (done.predictions["risk"] == done.predictions["frozen"]).all()
    else:
        assert (~kept).any()
    if policy == "yearly recalibration":
        assert kept.iloc[0] and not kept.iloc[-1]  # Two years without outcomes, then some


def test_an_unknown_policy_and_a_study_without_a_future_are_refused(monica):
    study, rows = monica
    with pytest.raises(LMError, match="policy 'weekly' is unknown"):
        prequential(study, rows, "weekly")
    with pytest.raises(LMError, match="nobody arrives after"):
        prequential(study, rows[rows["arrived"] <= study.first_model])


def test_a_policy_refits_with_the_learner_it_is_told(monica):
    study, rows = monica
    some = rows[rows["arrived"] < "1989-01-01"]
    done = prequential(study, some, "yearly refit", every_days=182, learner="boosting", seed=3)
    assert done.model.learner == "boosting" and done.model.seed == 3

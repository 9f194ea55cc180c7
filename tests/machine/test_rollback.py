"""Model and settings go back as one; a day can be asked; a version can be made again."""

import re
import shutil

import pytest
from support.monica import BY, DAY, FIRST, learn, shifted

from lm.core.errors import LMError
from lm.core.settings import find_root
from lm.core.study import load_study
from lm.machine.machine import Machine
from lm.machine.queries import state_at
from lm.update.run import reproduce


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A copy of the study whose plan may be edited."""
    folder = tmp_path_factory.mktemp("data") / "monica"
    shutil.copytree(find_root() / "data" / "monica", folder)
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory, data):
    """A home in which the first model serves under the first plan."""
    home = tmp_path_factory.mktemp("learned")
    with Machine(load_study(data), home) as machine:
        learn(machine)
    return home


@pytest.fixture
def opened(learned, data, home):
    """Opens the machine, after an edit of its plan where one is given."""
    shutil.copytree(learned, home)
    path, machines = data / "plan.toml", []
    text = path.read_text()

    def open_(**edits):
        while machines:
            machines.pop().close()
        new = text if edits else path.read_text()
        for name, value in edits.items():
            new = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", new)
        path.write_text(new)
        machines.append(Machine(load_study(data), home))
        return machines[-1]

    yield open_
    while machines:
        machines.pop().close()
    path.write_text(text)


@pytest.mark.slow
def test_an_edited_plan_comes_into_force_with_a_row_of_settings(opened):
    assert opened().plan.cool_down_days == 90
    machine = opened(cool_down_days=7)
    assert machine.plan.cool_down_days == 7 and len(machine.table("settings")) == 2
    assert len(opened().table("settings")) == 2 and machine.store is not None


def test_a_rollback_brings_model_and_plan_back_as_one_until_the_next_edit(opened):
    machine = opened()
    machine.promote(shifted(machine, 0.4), "by hand", BY)
    machine = opened(cool_down_days=7)
    assert (machine.status()["champion"], machine.plan.cool_down_days) == (2, 7)
    machine.rollback()
    assert (machine.status()["champion"], machine.plan.cool_down_days) == (1, 90)
    machine = opened()
    assert (machine.status()["champion"], machine.plan.cool_down_days) == (1, 90)
    with pytest.raises(LMError, match="not on the way back"):
        machine.rollback(to=2)
    machine.promote(2, "found good after all", BY)
    assert (machine.status()["champion"], machine.plan.cool_down_days) == (2, 7)
    machine.rollback(to=1)
    machine = opened(cool_down_days=30)
    assert (machine.status()["champion"], machine.plan.cool_down_days) == (1, 30)
    assert machine.verify() == []


def test_a_broken_plan_is_one_sentence_and_the_store_opens_afterwards(opened):
    opened()
    for value in ('"soon"', "-1", '"x'):
        with pytest.raises(LMError, match=r"plan\.toml") as error:
            opened(cool_down_days=value)
        assert "\n" not in str(error.value)
    machine = opened(cool_down_days=90)
    assert machine.status()["champion"] == 1 and len(machine.table("settings")) == 1


def test_a_day_can_be_asked_after_a_rollback(opened):
    machine = opened()
    machine.promote(shifted(machine, 0.4), "by hand", BY)
    machine = opened(cool_down_days=7)
    machine.rollback()
    state = state_at(machine, machine.study, machine.store.clock.data_time() + DAY)
    assert (state["champion"], state["settings"]) == (1, 1)


def test_a_plan_edited_before_the_first_patient_counts_in_the_past(data, tmp_path):
    text = (data / "plan.toml").read_text()
    try:
        with Machine(load_study(data), tmp_path):
            pass
        (data / "plan.toml").write_text(text.replace("cool_down_days = 90", "cool_down_days = 7"))
        with Machine(load_study(data), tmp_path) as machine:
            learn(machine)
            assert state_at(machine, machine.study, FIRST + DAY)["settings"] == 2
    finally:
        (data / "plan.toml").write_text(text)


def remade(machine, version=1):
    folder = machine.store.folder / "snapshots"
    return reproduce(machine, machine.study, machine.registry, version, folder)


def test_a_version_is_made_again_to_the_bit_or_says_why_not(opened):
    machine = opened()
    result = remade(machine)
    assert result["same"] and result["fingerprint"] == result["again"]
    with pytest.raises(LMError, match="has no recipe"):
        remade(machine, shifted(machine, 0.4))
    for path in (machine.store.folder / "snapshots").glob("*.parquet"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-9] + b"tampered!")
    with pytest.raises(LMError, match="damaged"):
        remade(machine)
    for path in (machine.store.folder / "snapshots").glob("*.parquet"):
        path.unlink()
    with pytest.raises(LMError, match="cannot be read"):
        remade(machine)


def test_a_broken_plan_does_not_stop_a_reproduction(opened, data):
    machine = opened()
    (data / "plan.toml").write_text("[modifications]\nautomatic = ['nonsense']\n")
    assert remade(machine)["same"]


def test_a_study_changed_since_does_not_change_a_version_made_before(opened, data):
    machine, text = opened(), (data / "study.toml").read_text()
    try:
        (data / "study.toml").write_text(text.replace('["f", "m"]', '["f", "m", "d"]'))
        study = load_study(data)
        folder = machine.store.folder / "snapshots"
        assert reproduce(machine, study, machine.registry, 1, folder)["same"]
    finally:
        (data / "study.toml").write_text(text)

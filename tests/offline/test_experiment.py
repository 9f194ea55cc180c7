"""Experiments: apart from the live machine, one name once, submitted as challenger and no more."""

import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.data.snapshot import read_snapshot
from lm.data.source import outcomes
from lm.data.store import Store
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.model.registry import Registry
from lm.model.selection import SCORES, folds, maturity_times
from lm.offline.experiment import RESULT, experiments, find_snapshot, run_experiment, submit
from lm.update.ladder import trainable

STUDY = load_study("monica")
SMALL = {"families": ["logistic", "splines"], "n": 2, "hold_out_days": 250}


def contents(folder):
    """sha256 of every live file: experiments and snapshots left out."""
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    files = [p for p in files if not {"experiments", "snapshots"} & set(p.parts)]
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A machine with a champion, closed; its snapshot; one experiment on it."""
    home, rows = tmp_path_factory.mktemp("live"), read_rows(STUDY).head(1000)
    with Machine(STUDY, home) as machine:
        machine.receive_many(rows, on_arrival=True)
        machine.add_outcomes(outcomes(STUDY, rows))
        snapshot = machine.snapshot("1987-03-01")
        model = fit(STUDY, trainable(machine.known("1987-01-01")))
        first = machine.registry.register(model, {}, {}, snapshot, "the first model")
        machine.registry.set_alias("champion", first)
    before = contents(home)
    made = run_experiment("monica", snapshot["path"], home, "small", **SMALL)
    return {"home": home, "snapshot": snapshot, "made": made, "before": before}


@pytest.fixture
def live(lived):
    return Registry("monica", lived["home"] / "monica" / "registry")


@pytest.mark.slow
def test_the_live_machine_is_not_touched(lived):
    assert contents(lived["home"]) == lived["before"]
    assert len(lived["before"]) > 5
    stored = read_snapshot(lived["snapshot"]["path"])  # Its sha256 is its name
    assert len(stored) == lived["snapshot"]["rows"]


def test_the_same_wish_gives_the_same_model_while_the_machine_is_open(lived):
    with Machine(STUDY, lived["home"]) as machine:
        with pytest.raises(LMError, match="0 files have this id"):
            find_snapshot("monica", "nothing", lived["home"])
        path = find_snapshot("monica", lived["snapshot"]["id"], lived["home"])
        again = run_experiment("monica", path, lived["home"], "open", **SMALL)
        assert machine.registry.alias("champion") == 1
    shutil.rmtree(again.folder)
    assert again.model.fingerprint() == lived["made"].model.fingerprint()
    assert again.search.table.equals(lived["made"].search.table)


def test_the_winner_never_saw_the_hold_out(lived):
    made = lived["made"]
    first = made.held["arrived"].min()
    assert (maturity_times(STUDY, made.search.tested) < first).all()
    known = trainable(read_snapshot(lived["snapshot"]["path"]))
    history = known[maturity_times(STUDY, known) < first]
    assert made.search.best.fit(STUDY, history).fingerprint() == made.model.fingerprint()
    assert len(folds(STUDY, history, 4)) == made.search.n_folds
    assert (made.model.predict_proba(made.held)[:, 1] == made.held["risk"]).all()


def test_its_registry_has_one_version_of_each_family_and_the_record(lived):
    made = lived["made"]
    own = Registry("monica", made.folder / "registry")
    versions = own.versions().set_index("version")
    assert sorted(versions["family"]) == ["logistic", "splines"]
    assert own.alias("best") == made.version and own.alias("champion") is None
    brier = made.performance["brier"]
    noted = versions.loc[made.version]
    assert (noted["hold_out_brier"], noted["hold_out_brier_low"]) == (brier.value, brier.low)
    assert versions["hold_out_brier"].notna().sum() == 1
    files = own.files(made.version)
    assert {"folds.csv", "candidates.csv", "subgroups.csv", "calibration.svg"} <= set(files)
    table = pd.read_csv(files["candidates.csv"])
    assert table["chosen"].tolist() == made.search.table["chosen"].tolist()


def test_its_store_is_its_own(lived):
    with Store(STUDY, lived["made"].folder) as store:
        noted = store.queries.table("updates").iloc[0]
        assert store.status.counts()["records"] == 0
    assert noted["snapshot"] == lived["snapshot"]["id"]
    assert json.loads(noted["evidence"])["name"] == "small"


def test_experiments_are_listed(lived, home):
    table = experiments("monica", lived["home"])
    row = table.set_index("name").loc["small"]
    assert row["finished"] and row["winner"] == str(lived["made"].search.best)
    assert row["brier_low"] < row["brier"] < row["brier_high"]
    assert row["as_of"] == pd.Timestamp("1987-03-01")
    assert experiments("monica", home).empty and experiments("monica").empty


def test_submitting_makes_a_challenger_and_no_champion(lived, live):
    store = {k: v for k, v in contents(lived["home"]).items() if "registry" not in k.parts}
    version = submit(lived["made"].folder, live)
    assert version == 2 and live.alias("challenger") == 2 and live.alias("champion") == 1
    assert live.load(2).fingerprint() == lived["made"].model.fingerprint()
    tags = live.client().get_model_version("monica", "2").tags
    assert tags["experiment"] == "small" and tags["snapshot"] == lived["snapshot"]["id"]
    assert tags["snapshot.id"] == lived["snapshot"]["id"]
    assert "calibration.svg" in live.files(2)
    results = {(name, step) for name, _, step in live.facts(2)["history"] if step}
    assert results == {(f"cv_{name}", fold) for name in SCORES for fold in range(1, 5)}
    after = {k: v for k, v in contents(lived["home"]).items() if "registry" not in k.parts}
    assert after == store
    with pytest.raises(LMError, match="is version 2 already"):
        submit(lived["made"].folder, live)


def test_what_cannot_be_submitted_is_one_sentence(lived, live, tmp_path):
    with pytest.raises(LMError, match="unknown or has no result"):
        submit(tmp_path / "nothing", live)
    with pytest.raises(LMError, match="is of 'monica', not of 'rotterdam'"):
        submit(lived["made"].folder, Registry("rotterdam", tmp_path / "registry"))


def test_an_exchanged_model_is_not_submitted(lived, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(lived["made"].folder, copy)
    facts = json.loads((copy / RESULT).read_text())
    facts["version"] = 3 - facts["version"]  # The other family's
    (copy / RESULT).write_text(json.dumps(facts))
    with pytest.raises(LMError, match="is not the one that it registered"):
        submit(copy, Registry("monica", tmp_path / "registry"))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"name": "small"}, "exists: choose another name"),
        ({"name": "a/b"}, "is not usable"),
        ({"name": ""}, "is not usable"),
        ({"name": "n", "families": ["magic"]}, "family 'magic' is unknown"),
        ({"name": "n", "families": []}, "no family"),
        ({"name": "n", "n": 1}, "at least one candidate"),
        ({"name": "n", "hold_out_days": 1}, "a hold-out of 1 days"),
        ({"name": "n", "hold_out_days": 9999}, "leaves 0 training patients"),
    ],
)
def test_a_wrong_wish_is_one_sentence_and_leaves_nothing(lived, wrong, text):
    wish = {"families": ["logistic", "boosting"]} | wrong
    with pytest.raises(LMError, match=text):
        run_experiment("monica", lived["snapshot"]["path"], lived["home"], **wish)
    assert not (lived["home"] / "monica" / "experiments" / "n").exists()


def test_no_matured_outcome_and_another_study_are_one_sentence(lived, tmp_path):
    with Machine(STUDY, tmp_path) as machine:
        machine.receive_many(read_rows(STUDY).head(50), on_arrival=True)
        path = machine.snapshot()["path"]
    with pytest.raises(LMError, match="none of its 50 patients has a matured outcome"):
        run_experiment("monica", path, tmp_path, "none", ["logistic"], 1)
    with pytest.raises(LMError, match="is not of 'rotterdam': it lacks meno"):
        run_experiment("rotterdam", path, tmp_path, "other", ["logistic"], 1)
    with pytest.raises(LMError, match="cannot be read"):
        run_experiment("monica", tmp_path / "no.parquet", tmp_path, "gone", ["logistic"], 1)


def test_a_failure_on_the_way_leaves_no_half_experiment(lived, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise LMError("the disk is full")

    monkeypatch.setattr(Registry, "register", broken)
    with pytest.raises(LMError, match="disk is full"):
        run_experiment(
            "monica",
            lived["snapshot"]["path"],
            tmp_path,
            "half",
            ["logistic"],
            1,
            hold_out_days=250,
        )
    assert not list((tmp_path / "monica" / "experiments").iterdir())


def test_one_that_was_cut_off_is_listed_without_a_result(lived, live, tmp_path):
    (tmp_path / "monica" / "experiments" / "cut").mkdir(parents=True)
    assert experiments("monica", tmp_path)["finished"].tolist() == [False]
    with pytest.raises(LMError, match="has no result"):
        submit(tmp_path / "monica" / "experiments" / "cut", live)

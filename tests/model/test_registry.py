"""The registry: safe files, exact round trips, several processes, poor disks, MLflow's own view."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
from support.waiting import PATIENCE

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.model.estimators import estimator_classes
from lm.model.model_files import TRUSTED, read_model, write_model
from lm.model.predict import fit
from lm.model.registry import Registry, store_notebook

STUDY = load_study("monica")
ROWS = read_rows(STUDY)
SNAPSHOT = {"id": "ab" * 32, "path": "x.parquet", "rows": 300, "as_of": pd.Timestamp("1987-01-01")}


@pytest.fixture(scope="module")
def models():
    train = ROWS.head(500)
    return {k: fit(STUDY, train, k, members=3, trees=10) for k in ("logistic", "boosting")}


@pytest.fixture(scope="module")
def registered(models, tmp_path_factory):
    registry = Registry("monica", tmp_path_factory.mktemp("state of Ärzte") / "registry")
    for family in ("logistic", "boosting"):
        registry.register(models[family], {"brier": 0.1}, {}, SNAPSHOT, f"the {family} model")
    registry.set_alias("champion", 1)
    return registry


@pytest.mark.parametrize("family", ["logistic", "boosting"])
def test_round_trip_is_bit_identical(family, models, registered):
    version = {"logistic": 1, "boosting": 2}[family]
    loaded = Registry("monica", registered.folder).load(version)
    model = models[family]
    assert loaded is not model and loaded.fingerprint() == model.fingerprint()
    seen = ROWS.tail(200)
    assert (loaded.log_odds(seen) == model.log_odds(seen)).all()
    assert (loaded.standard_error(seen) == model.standard_error(seen)).all()


def test_trusted_types_are_few_and_named():
    own = [name for name in TRUSTED if name.startswith("lm.model.family_")]
    assert len(TRUSTED) == 5 + len(own) and not any("*" in name for name in TRUSTED)
    assert set(own) == {f"{c.__module__}.{c.__name__}" for c in estimator_classes()}


class Stranger:
    """A type that no model needs."""

    def __init__(self):
        self.number = 1


def test_untrusted_or_damaged_file_is_refused(models, tmp_path):
    import skops.io

    file = tmp_path / "model.skops"
    model = models["logistic"].recalibrated(0.0)
    model.extra_ = Stranger()
    skops.io.dump(model, file)
    with pytest.raises(LMError, match="Stranger, which is not trusted"):
        read_model(file)
    write_model(models["logistic"], file)
    content = file.read_bytes()
    for damaged in (b"", content[:1000], b"no zip at all", content[:2000] + b"x" * 50):
        file.write_bytes(damaged)
        with pytest.raises(LMError, match="cannot be read"):
            read_model(file)
    with pytest.raises(LMError):
        read_model(tmp_path / "absent.skops")


@pytest.mark.slow
def test_mlflow_alone_loads_the_champion(registered, models, tmp_path):
    code = (
        "import mlflow, numpy, sys\n"
        "from lm.core.study import load_study; from lm.core.study_rows import read_rows\n"
        f"mlflow.set_tracking_uri({registered.uri!r})\n"
        "model = mlflow.sklearn.load_model('models:/monica@champion')\n"
        "numpy.save(sys.argv[1], model.predict_proba(read_rows(load_study('monica')).tail(50)))"
    )
    out = tmp_path / "theirs.npy"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, capture_output=True)
    assert (np.load(out) == models["logistic"].predict_proba(ROWS.tail(50))).all()


def pyfunc(registry, version):
    """A version as `mlflow.pyfunc` gives it to a user of MLflow alone."""
    import mlflow

    source = registry.client().get_model_version(registry.study_name, str(version)).source
    return mlflow.pyfunc.load_model(source)


KINDS = {  # How the same ages may come
    **{name: lambda ages, name=name: ages.astype(name) for name in ("int64", "int32", "uint8")},
    **{name: lambda ages, name=name: ages.astype(name) for name in ("float64", "float32", "Int64")},
    "object": lambda ages: ages.astype(int).astype(object),
    "text": lambda ages: ages.astype(int).astype(str),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [1, 2])
def test_mlflows_function_takes_numbers_as_pandas_reads_them(registered, models, kind, version):
    seen = ROWS[STUDY.feature_names].tail(40).reset_index(drop=True)
    expected = models[{1: "logistic", 2: "boosting"}[version]].predict_proba(seen)
    sent = seen.assign(age=KINDS[kind](seen["age"]), sex=seen["sex"].astype("category"))
    predictions = pyfunc(registered, version).predict(sent)
    assert (predictions == expected).all()
    assert (pyfunc(registered, version).predict(sent.iloc[:, ::-1]) == expected).all()


def test_mlflows_function_refuses_what_the_machine_refuses(registered, tmp_path):
    from lm.machine.champion import Models
    from lm.machine.machine import Machine

    whole = ROWS[STUDY.feature_names].tail(3).reset_index(drop=True).astype(object)
    function = pyfunc(registered, 1)
    with Machine("monica", tmp_path) as machine:
        machine.champion.models = Models(registered)
        for field, value in [("age", 340), ("age", None), ("age", True), ("sex", "x"), ("sex", 1)]:
            sent = whole.copy()
            sent.loc[1, field] = value
            with pytest.raises(LMError) as ours:
                machine.score(sent, version=1)
            with pytest.raises(LMError) as theirs:
                function.predict(sent)
            assert str(theirs.value) == str(ours.value) and field in str(ours.value)
    with pytest.raises(LMError, match="age = None breaks the rule: the column must be present"):
        function.predict(whole.drop(columns="age"))
    rows = whole.to_dict("records")
    for form in (rows, whole.to_dict("list")):
        assert (function.predict(form) == function.predict(whole)).all()
    assert function.predict(whole.head(0)).shape == (0, 2)


def test_mlflows_function_knows_the_studys_text_for_missing(models, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "ward"
    folder.mkdir(parents=True)
    text = (STUDY.folder / "study.toml").read_text(encoding="utf-8")
    (folder / "study.toml").write_text(f'missing_words = ["unknown"]\n{text}', encoding="utf-8")
    monkeypatch.setenv("LM_DATA", str(tmp_path / "data"))
    registry = Registry("ward", tmp_path / "registry")
    registry.register(models["logistic"], {}, {}, {}, "words")
    sent = ROWS[STUDY.feature_names].tail(3).astype(object)
    gaps, message = sent.copy(), sent.copy()
    gaps["hichol"], message["hichol"] = None, "unknown"
    expected = models["logistic"].predict_proba(gaps)
    assert (pyfunc(registry, 1).predict(message) == expected).all()


def test_models_made_before_still_load(models, tmp_path):
    """Their folders name MLflow's own loader and a type for each column."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    registry = Registry("monica", tmp_path / "registry")
    registry.register(models["logistic"], {}, {}, SNAPSHOT, "made before")
    (place,) = registry.models.rglob("MLmodel")
    card, kinds = Model.load(str(place)), {"number": "double", "level": "string"}
    card.signature = ModelSignature(
        Schema([ColSpec(kinds[f.kind], f.name) for f in STUDY.features])
    )
    card.flavors["python_function"] = {
        **{"loader_module": "mlflow.sklearn", "model_path": "model.skops"},
        **{"predict_fn": "predict_proba", "python_version": "3.11.7"},
    }
    card.save(str(place))
    seen = ROWS[STUDY.feature_names].tail(40)
    expected = models["logistic"].predict_proba(seen)
    assert (pyfunc(registry, 1).predict(seen) == expected).all()
    assert (Registry("monica", registry.folder).load(1).predict_proba(seen) == expected).all()


def test_lineage_is_recorded(registered):
    client = registered.client()
    run = client.get_run(client.get_model_version("monica", "1").run_id)
    assert run.data.params["features"] == ",".join(STUDY.feature_names)
    assert {"seed", "C", "transforms", "family"} <= run.data.params.keys()
    assert run.data.tags["snapshot.id"] == SNAPSHOT["id"]
    assert {"package.scikit-learn", "fingerprint", "reason"} <= run.data.tags.keys()
    assert run.inputs.dataset_inputs[0].dataset.name == SNAPSHOT["id"][:12]


def test_history_and_files_are_stored_in_one_batch(models, tmp_path, monkeypatch):
    registry, batches = Registry("monica", tmp_path), []
    client = registry.client()
    log = client.log_batch
    monkeypatch.setattr(client, "log_batch", lambda *a, **k: batches.append(k) or log(*a, **k))
    folds = [("brier", 0.2, 0), ("brier", 0.1, 1), ("loss", float("nan"), 3)]
    files = {"folds.csv": "a,b\n", "plots/p.png": b"\x89"}
    metrics = {"brier": 0.15, "oe": (1.0, 0.9, 1.1)}
    version = registry.register(
        models["logistic"], metrics, {"n": 3}, SNAPSHOT, "folds", history=folds, files=files
    )
    assert len(batches) == 1 and len(batches[0]["metrics"]) == 7
    facts = registry.facts(version)
    assert facts["history"][:2] == folds[:2] and np.isnan(facts["history"][2][1])
    assert facts["metrics"] == {"brier": 0.15, "oe": 1.0, "oe_low": 0.9, "oe_high": 1.1}
    assert facts["params"]["n"] == "3" and facts["tags"]["reason"] == "folds"
    assert {n: p.read_bytes() for n, p in registry.files(version).items()} == {
        "folds.csv": b"a,b\n",
        "plots/p.png": b"\x89",
    }
    run = registry.run_id(version)
    assert {item.path for item in client.list_artifacts(run, "plots")} == {"plots/p.png"}
    assert registry.versions()["brier"].tolist() == [0.15]
    for wrong in ("../x", "/x", "model/x", "model", ""):
        with pytest.raises(LMError, match="must stay"):
            registry.register(models["logistic"], {}, {}, {}, "no", files={wrong: "x"})
    for lookup in (registry.facts, registry.files):
        with pytest.raises(LMError, match="unknown"):
            lookup(9)


def test_versions_and_aliases(registered):
    table = registered.versions()
    assert table["version"].tolist() == [1, 2]
    assert table["aliases"].tolist() == ["champion", ""]
    assert table["family"].tolist() == ["logistic", "boosting"]
    official = registered.client().get_model_version_by_alias("monica", "champion")
    assert int(official.version) == registered.alias("champion")
    for wrong in (0, 9, "challenger"):
        with pytest.raises(LMError):
            registered.load(wrong)
    with pytest.raises(LMError):
        registered.set_alias("champion", 9)


def test_tables_are_read_once_until_any_process_writes(registered, monkeypatch):
    mine, theirs, asked = (*(Registry("monica", registered.folder) for _ in range(2)), [])
    read = mine.tables.read
    monkeypatch.setattr(mine.tables, "read", lambda *query: asked.append(query) or read(*query))
    before, champion = mine.versions(), mine.alias("champion")
    once = len(asked)
    assert mine.versions().equals(before) and mine.alias("champion") == champion == 1
    assert len(asked) == once
    for version in (2, None, 2):
        theirs.set_alias("challenger", version)
        assert mine.alias("challenger") == version  # However soon after the last write
    theirs.set_alias("challenger", None)
    with closing(sqlite3.connect(mine.file)) as base:
        assert mine.alias("challenger") is None
        base.execute("PRAGMA journal_mode = wal")
        theirs.set_alias("challenger", 2)
        assert mine.alias("challenger") == 2
        theirs.set_alias("challenger", None)
        assert mine.alias("challenger") is None
        base.execute("PRAGMA journal_mode = delete")
    file = mine.file.read_bytes()
    assert mine.verify() == []
    mine.file.write_bytes(file[:8192])
    assert mine.verify() != []
    mine.file.write_bytes(file)
    assert mine.verify() == [] and mine.versions().equals(before)


def test_nothing_registered_yet(tmp_path):
    registry = Registry("monica", tmp_path / "none")
    assert registry.alias("champion") is None
    assert registry.versions().empty
    with pytest.raises(LMError):
        registry.load("champion")
    assert not (tmp_path / "none").exists()


def test_another_study_in_the_same_registry_counts_for_itself(registered, models, tmp_path):
    shutil.copytree(registered.folder, tmp_path / "r")
    other = Registry("gbsg", tmp_path / "r")
    assert other.register(models["logistic"], {}, {}, {}, "other study") == 1
    assert Registry("monica", tmp_path / "r").versions()["version"].tolist() == [1, 2]


@pytest.mark.slow
def test_two_processes_register_at_once(tmp_path):
    code = (
        "import sys\n"
        "from lm.model.predict import fit\n"
        "from lm.model.registry import Registry\n"
        "from lm.core.study import load_study; from lm.core.study_rows import read_rows\n"
        "s = load_study('monica'); m = fit(s, read_rows(s).head(300))\n"
        "r = Registry('monica', sys.argv[1])\n"
        "for i in range(2):\n"
        "    v = r.register(m.recalibrated(i / 10), {'i': i}, {}, {}, 'at once')\n"
        "    r.set_alias('challenger', v); print(v)"
    )
    asked = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(asked, **pipes) for _ in range(2)]
    answers = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    assert sorted(int(v) for out, _ in answers for v in out.split()) == list(range(1, 5))
    assert not any("mlflow" in err or "alembic" in err for _, err in answers), answers
    registry = Registry("monica", tmp_path)
    assert all(registry.load(v) for v in range(1, 5))


def test_moved_folder_still_loads_everywhere(registered, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(registered.folder, moved)
    registry = Registry("monica", moved)
    assert registry.load("champion").fingerprint() == registered.load(1).fingerprint()
    source = registry.client().get_model_version("monica", "2").source
    assert source.startswith(moved.as_uri())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_gives_one_sentence(models, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LMError, match="cannot"):
        Registry("monica", tmp_path / "r").register(models["logistic"], {}, {}, {}, "no disk")


def test_folder_that_cannot_be_made_gives_one_sentence(models, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LMError, match="cannot open"):
        Registry("monica", tmp_path / "file" / "r").register(models["logistic"], {}, {}, {}, "no")


def test_corrupt_database_gives_one_sentence(models, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    registry = Registry("monica", tmp_path)
    with pytest.raises(LMError, match="cannot read"):
        registry.alias("champion")
    with pytest.raises(LMError, match="cannot"):
        registry.register(models["logistic"], {}, {}, {}, "broken")


def test_the_notebook_of_a_retraining_lies_beside_its_version(tmp_path, home):
    registry = Registry("monica")
    model = fit(load_study("monica"), read_rows(load_study("monica"))[:400])
    version = registry.register(model, {}, {}, {}, "for a test")
    path = tmp_path / "retrain-1.ipynb"
    path.write_text('{"cells": []}')
    run = {"output": path, "record": {"study": "monica", "version": version}}
    assert store_notebook(run) is run
    assert registry.files(version)["retrain.ipynb"].read_text() == path.read_text()
    stored = {"output": path, "record": {"study": "monica", "version": None}}
    assert store_notebook(stored) is stored
    with pytest.raises(LMError, match="unknown"):
        registry.add_files(9, {"a.txt": "a"})
    with pytest.raises(LMError, match="must stay"):
        registry.add_files(version, {"../a.txt": "a"})

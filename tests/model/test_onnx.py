"""The model file: it says what the model says, in any runtime, and a model can be had by name."""

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest

from lm.core.errors import LMError
from lm.core.study import Feature, load_study
from lm.core.study_rows import read_rows
from lm.core.validation import RejectedRecord
from lm.model import onnx as portable_module
from lm.model import predict as answers
from lm.model.onnx import OUTPUTS, Loaded, Portable, export, load_model
from lm.model.predict import FAMILIES, MOST_DISTANCES, RiskModel, fit
from lm.model.registry import Registry

STUDIES = {name: load_study(name) for name in ("monica", "rotterdam")}
ROWS = {name: read_rows(study) for name, study in STUDIES.items()}
CLOSE = 1e-9  # A thousand times closer than asked for


def history(name):
    return ROWS[name][ROWS[name]["arrived"] < STUDIES[name].first_model]


def made(name, family, **how):
    small = {"members": 3, "trees": 40} | how if family in ("boosting", "ensemble") else how
    return fit(STUDIES[name], history(name), family, **small)


def torn(study, rows):
    """Gaps everywhere, and unknown categories."""
    rng, table = np.random.default_rng(1), rows[study.feature_names].astype(object)
    for feature in study.features:
        table.loc[rng.random(len(rows)) < 0.2, feature.name] = np.nan
        if feature.kind == "level":
            table.loc[rng.random(len(rows)) < 0.1, feature.name] = "unheard of"
    return table


def check_same(model, patients):
    """Model and file agree in every result for every patient."""
    portable = Portable(export(model))
    expected = answers.predict(model, patients)
    table = pd.DataFrame(dict(zip(OUTPUTS, portable.run(patients), strict=True)), patients.index)
    pd.testing.assert_frame_equal(table, expected, rtol=0, atol=CLOSE)
    return portable


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", STUDIES)
def test_file_and_model_agree_on_all_real_patients(name, family):
    rows = ROWS[name]
    model = made(name, family).recalibrated(-0.3, 0.8)
    check_same(model, pd.concat([rows, torn(STUDIES[name], rows)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_file_and_model_agree_where_the_family_uses_some_features(family):
    study, rows = STUDIES["rotterdam"], ROWS["rotterdam"].tail(300)
    few = (study.numbers[1], study.levels[0])
    check_same(made("rotterdam", family, selected=few), rows)
    check_same(made("rotterdam", family, selected=(study.levels[-1],)), torn(study, rows))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["number", "level"])
def test_file_and_model_agree_with_features_of_one_kind(family, kind):
    rng = np.random.default_rng(0)
    if kind == "number":
        features = tuple(Feature(n, "number", n, "", 0, 1, transform="log1p") for n in ("a", "b c"))
        X = pd.DataFrame({f.name: rng.random(200) for f in features})
        y = (X["a"] + rng.random(200) > 1).astype(int)
    else:
        features = tuple(Feature(n, "level", n, levels=("x", "y", "é")) for n in ("a", "b c"))
        X = pd.DataFrame({f.name: rng.choice(["x", "y", "é"], 200) for f in features})
        y = ((X["a"] == "x") & (rng.random(200) < 0.8)).astype(int)
    X.iloc[::9, 0] = np.nan
    model = RiskModel(features, family, members=3, trees=5).fit(X, y)
    assert check_same(model, X).features == features


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_that_never_split_and_numbers_that_never_bend(family):
    features = (Feature("a", "number", "a", "", 0, 9), Feature("b", "number", "b", "", 0, 9))
    X = pd.DataFrame({"a": np.full(60, 3.0), "b": np.repeat([1.0, 2.0], 30)})
    y = np.tile([0, 1, 1], 20)
    model = RiskModel(features, family, members=2, trees=3).fit(X, y)
    others = pd.DataFrame({"a": [3.0, 9.0, np.nan], "b": [0.0, np.nan, 9.0]})
    check_same(model, pd.concat([X, others]))


def test_weights_and_many_patients():
    study, rows = STUDIES["monica"], ROWS["monica"]
    many = rows.sample(MOST_DISTANCES + 4000, replace=True, random_state=0)
    weights = np.random.default_rng(0).integers(0, 5, len(many))
    model = fit(study, many, "splines", weights=weights)
    assert len(model.distances_) == MOST_DISTANCES
    far = rows.head(20).assign(age=np.linspace(18, 110, 20))
    check_same(model, pd.concat([rows.head(500), far]))


def test_incremental_model_that_has_learned_on():
    rows = ROWS["monica"].dropna(subset="y")
    model = made("monica", "incremental")
    later = rows.tail(50)
    check_same(model.learned(later, later["y"]), rows.tail(200))


@pytest.mark.parametrize("family", ["splines", "boosting", "forest"])
def test_another_runtime_reads_the_file_too(family):
    """onnx's own reference implementation, written in Python."""
    from onnx.reference import ReferenceEvaluator

    model = made("rotterdam", family, **({"trees": 10} if family != "splines" else {}))
    patients = torn(STUDIES["rotterdam"], ROWS["rotterdam"].head(25))
    feed = {
        f.name: patients[f.name].to_numpy(float)[:, None]
        if f.kind == "number"
        else patients[f.name].fillna("").to_numpy(object)[:, None]
        for f in model.features
    }
    result = ReferenceEvaluator(export(model)).run(list(OUTPUTS), feed)
    expected = answers.predict(model, patients)
    for name, values in zip(OUTPUTS, result, strict=True):
        np.testing.assert_allclose(values[:, 0], expected[name], rtol=0, atol=CLOSE)


def test_the_file_describes_itself_and_passes_the_checker():
    model = made("monica", "logistic")
    content = export(model, "monica", 7, level=0.9)
    assert content == export(model, "monica", 7, level=0.9)
    file = onnx.load_from_string(content)
    onnx.checker.check_model(file, full_check=True)
    results = {p.key: p.value for p in file.metadata_props}
    assert (results["study"], results["version"], results["level"]) == ("monica", "7", "0.9")
    assert results["fingerprint"] == model.fingerprint()
    listed = json.loads(results["features"])
    assert [f["name"] for f in listed] == STUDIES["monica"].feature_names
    assert [f["name"] for f in listed] == [i.name for i in file.graph.input]
    assert listed[0]["levels"] == list(STUDIES["monica"].features[0].levels)
    portable, row = Portable(content), ROWS["monica"].iloc[0].to_dict()
    narrow = answers.predict(model, row, level=0.9)
    pd.testing.assert_frame_equal(portable.predict(row), narrow, rtol=0, atol=CLOSE)


def test_no_rows_one_row_and_any_order_of_columns():
    portable = Portable(export(made("monica", "boosting", trees=5)))
    rows = ROWS["monica"].tail(5)
    assert portable.predict(rows.head(0)).shape == (0, 5)
    assert portable.predict_proba(rows.head(0)).shape == (0, 2)
    backwards = rows[rows.columns[::-1]]
    pd.testing.assert_frame_equal(portable.predict(backwards), portable.predict(rows))
    one = portable.predict(rows.iloc[0].to_dict())
    np.testing.assert_allclose(one, portable.predict(rows.head(1)), rtol=0, atol=1e-12)


def test_file_and_model_refuse_what_every_entry_point_refuses():
    model, row = made("monica", "logistic"), ROWS["monica"].iloc[0].to_dict()
    file = Portable(export(model, missing_words=["n.k."], time_zone="Europe/Berlin"))
    loaded = Loaded(model, ["n.k."], "Europe/Berlin")
    table = pd.DataFrame([row | {"arrived": "1990-05-31"}])
    wrong = {"age": ("old", np.inf, [1, 2], 340, "1,5"), "smstat": ("now and then", 7, True)}
    wrong |= {"arrived": ("31.12.1992", "1990-03-25T02:30", "now", 5)}
    for asked in (file, loaded):
        for ask in (asked.predict, asked.predict_proba):
            for name, values in wrong.items():
                for value in values:
                    with pytest.raises(RejectedRecord, match=f"record 'row 1': {name} = "):
                        ask(row | {name: value})
            with pytest.raises(
                RejectedRecord, match="age = None breaks the rule: the column must be"
            ):
                ask(table.drop(columns="age"))
            with pytest.raises(LMError, match="the table has 2 columns 'age': keep one of them"):
                ask(pd.concat([table, table[["age"]]], axis=1))
        unknown = asked.predict(row | {"smstat": "n.k.", "age": "63"})
        known = asked.predict([row | {"smstat": None, "age": 63}])
        pd.testing.assert_frame_equal(unknown, known)
    assert (
        loaded.predict(ROWS["monica"].tail(3)).index.tolist() == ROWS["monica"].index[-3:].tolist()
    )


def test_one_thread_per_request_and_many_requests_at_once():
    portable = Portable(export(made("monica", "boosting", trees=20)))
    options = portable.session.get_session_options()
    assert options.intra_op_num_threads == options.inter_op_num_threads == 1
    rows = ROWS["monica"].tail(64)
    expected = portable.predict_proba(rows)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: portable.predict_proba(rows.iloc[[i]]), range(64)))
    np.testing.assert_allclose(np.concatenate(results), expected, rtol=0, atol=1e-12)


def test_files_that_are_none_and_text_that_cannot_be_reported_from_gaps():
    content = export(made("monica", "logistic"))
    for wrong in (b"", b"not onnx", content[: len(content) // 2], b"\x00" * 1000):
        with pytest.raises(LMError, match=r"no ONNX model|does not say"):
            Portable(wrong)
    features = (Feature("a", "level", "a", levels=("", "x")),)
    X = pd.DataFrame({"a": ["x", None] * 20})
    with pytest.raises(LMError, match="'a' has an empty category"):
        export(RiskModel(features).fit(X, np.tile([0, 1, 1, 0], 10)))


def test_import_costs_neither_onnx_nor_mlflow():
    top = ast.parse(Path(portable_module.__file__).read_text(encoding="utf-8")).body
    named = {a.name for node in top if isinstance(node, ast.Import) for a in node.names}
    named |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert "numpy" in named and not {n.split(".")[0] for n in named} & {"onnx", "mlflow"}


@pytest.mark.parametrize("which", ["monica", "monica@champion", "monica/2", "gbsg@1"])
def test_a_study_without_models_says_so(which):
    with pytest.raises(LMError, match=r"has no 'champion'|is unknown \(known: none\)"):
        load_model(which)


def test_a_model_by_name():
    registry, model = Registry("monica"), made("monica", "splines")
    snapshot = {"id": "ab" * 32, "rows": 900, "as_of": "1987-01-01"}
    registry.register(model, {}, {}, snapshot, "the first model")
    registry.set_alias("champion", 1)
    row = ROWS["monica"].tail(3)
    names = ("monica", "monica@champion", "monica@1", "monica/1", "models:/monica@champion")
    for name in names:
        assert (load_model(name).predict_proba(row) == model.predict_proba(row)).all()
    file = load_model("monica@champion", form="onnx")
    assert (file.study, file.version, file.fingerprint) == ("monica", 1, model.fingerprint())
    np.testing.assert_allclose(file.predict_proba(row), model.predict_proba(row), atol=CLOSE)
    wrong = {
        "nowhere@champion": r"the study 'nowhere' is unknown \(known studies: gbsg, monica",
        "monica@challenger": "the registry of 'monica' has no 'challenger'",
        "monica/2": r"model version 2 of 'monica' is unknown \(known: 1\)",
        "monica@²": "has no '²'",
        "../monica": "'..' is not usable",
        "": "'' is not usable",
    }
    for name, sentence in wrong.items():
        with pytest.raises(LMError, match=sentence):
            load_model(name)
    with pytest.raises(LMError, match="form 'pickle' is unknown: choose model or onnx"):
        load_model("monica", form="pickle")

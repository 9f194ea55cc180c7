"""One quantity has one definition, one function and one name at every entry point."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from lm.core.study import Feature, load_study
from lm.core.study_rows import read_rows
from lm.core.wording import percent, percentage_points
from lm.machine.machine import Machine
from lm.machine.queries import training_data
from lm.model.explain import contributions, sentence
from lm.model.predict import fit
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client
from lm.ui.clinician_tables import change_html, model_facts_html, waterfall_with_table
from lm.ui.clinician_what_if import WhatIf, what_if_html
from lm.ui.patients_tables import values_html
from lm.update.comparison import change_sentence, patient_change

STUDY = load_study("monica")
ROWS = read_rows(STUDY)
PAST = ROWS[ROWS["known_at"] <= STUDY.first_model]
TRAINED = PAST[PAST["y"].notna() & (PAST["arrived"] + STUDY.horizon <= STUDY.first_model)]
NEXT = ROWS[ROWS["arrived"] > STUDY.first_model].reset_index(drop=True)
COLUMNS = ["record_id", "arrived", *STUDY.feature_names]
STEEP = replace(STUDY, features=(Feature("x", "number", "x", "", -100.0, 100.0),), subgroups=())


def steep(slope, cut, n=300, seed=0):
    """Patients whose risk depends so steeply on one number that means and medians part."""
    rng = np.random.default_rng(seed)
    x = np.round(rng.exponential(2.0, n), 2)
    y = (rng.random(n) < expit(slope * (x - cut))).astype(float)
    y[:2] = 0.0, 1.0
    arrived = pd.date_range("2020-01-01", periods=n, freq="D")
    return pd.DataFrame(
        {"record_id": [f"s{i}" for i in range(n)], "arrived": arrived, "x": x, "y": y}
    )


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 8), st.floats(0.5, 6), st.floats(-2, 2), st.floats(0.3, 4), st.integers(0, 9))
def test_the_average_is_the_mean_risk_and_the_text_follow_it(slope, cut, shift, scale, seed):
    rows = steep(slope, cut, seed=seed)
    model = fit(STEEP, rows).recalibrated(shift, scale)
    risks, mean = model.predict_proba(rows)[:, 1], model.average_risk
    assert mean == pytest.approx(risks.mean(), abs=0.006)  # From 200 quantiles of the log-odds
    row = {"x": 1.0}
    for risk in np.linspace(0.01, 0.99, 15):
        text = sentence(STEEP, row, risk, risk, risk, mean, {"x": 0.0})
        side = re.search(r"(higher than|lower than|close to) the mean risk of the training", text)[
            1
        ]
        assert f"training patients, {percent(mean)}." in text
        near = abs(risk - mean) <= mean / 10 or percent(risk) == percent(mean)
        assert side == ("close to" if near else "higher than" if risk > mean else "lower than")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A machine with a first model that answered 40 patients and a second that answered 10."""
    with Machine(STUDY, tmp_path_factory.mktemp("home")) as machine:
        machine.receive_many(PAST[COLUMNS], on_arrival=True)
        machine.add_outcomes(PAST)
        machine.update(machine.monitor(STUDY.first_model, fast=True))
        machine.receive_many(NEXT[COLUMNS].head(40), on_arrival=True)
        second = machine.registry.load(1).recalibrated(0.7, 1.4)
        version = machine.registry.register(second, {}, {}, machine.snapshot(), "steeper")
        machine.promote(version, "a test", machine.plan.approvers[0])
        machine.receive_many(NEXT[COLUMNS].iloc[40:50], on_arrival=True)
        yield machine


def test_every_entry_point_compares_with_the_same_mean(served):
    with (
        background(served) as url,
        Client(url, token=Tokens(served.store.folder).create("A", "admin")) as client,
    ):
        for number, version in ((3, 1), (45, 2)):
            model, row = served.registry.load(version), NEXT[COLUMNS].iloc[number].to_dict()
            mean = model.predict_proba(TRAINED)[:, 1].mean()
            answers = [middleware.explain(row["record_id"]) for middleware in (served, client)]
            answers.append(served.receive(row, now=row["arrived"]))
            for answer in answers:
                assert answer["version"] == version
                assert answer["average_risk"] == model.average_risk == pytest.approx(mean, abs=2e-3)
                assert answer["base"] == pytest.approx(contributions(model, row)[0])
                assert f"training patients, {percent(mean)}." in answer["sentence"]
            few = [client, served]
            results = {
                d.score([row], version=version, explain=True)["sentence"].iloc[0] for d in few
            }
            many = served.score([row] * 40, version=version, explain=True)["sentence"]
            bare = answers[0]["sentence"].partition(" This patient is unlike")[0]
            assert results | set(many) == {bare}


def test_what_was_stored_before_keeps_its_numbers_and_its_base_is_no_mean(served):
    row = NEXT[COLUMNS].iloc[3].to_dict()
    answer, stored = served.explain(row["record_id"]), served.table("explanations")
    remaining = stored[stored["record_id"] == row["record_id"]].iloc[0]
    assert answer["base"] == remaining["base"]
    assert {k: remaining[k] for k in answer["contributions"]} == answer["contributions"]
    figure, table = waterfall_with_table(STUDY, answer)
    assert "Base value" in figure.layout.yaxis.ticktext
    assert not any("verage" in text for text in figure.layout.yaxis.ticktext)
    steps = [float(text.replace("−", "-")) for text in table["Log-odds"]]
    assert sum(steps) == pytest.approx(answer["log_odds"], abs=0.006)
    assert table["Risk after it"].iloc[-1] == percent(answer["risk"])


def test_a_change_of_risk_is_one_number_at_every_entry_point(served):
    for number in range(8):
        patient = served.explain(NEXT["record_id"].iloc[number])
        state = WhatIf(SimpleNamespace(client=served, patient=patient, study=STUDY))
        state.set_input("age", 45.0 + 5 * number)
        state.predict()
        if not state.inputs:  # The patient's own age
            continue
        model = served.registry.load(1)
        after = patient["features"] | state.inputs
        result = patient_change(model, patient["features"], model, after)
        moved = result.risk_after - result.risk_before
        assert moved == pytest.approx(state.prediction["risk"] - patient["risk"], abs=1e-12)
        size = percentage_points(moved).lstrip("+−")
        results = result.to_dict() | {"sentence": change_sentence(STUDY, result)}
        shown = change_html(STUDY, patient, results)
        assert size in what_if_html(state) or "the same risk" in what_if_html(state)
        assert size in results["sentence"] or "hardly changed" in results["sentence"]
        assert shown.count(percentage_points(moved)) == 2  # Other findings, and both together


def test_the_parts_of_a_change_are_stated_alike_in_categories_and_table(served):
    for number in range(10):
        patient = served.explain(NEXT["record_id"].iloc[number])
        result = served.explain_change(patient["record_id"], version=2)
        assert result["risk_before"] == pytest.approx(patient["risk"], abs=1e-12)
        whole = result["risk_after"] - result["risk_before"]
        assert result["data_risk"] + result["model_risk"] == pytest.approx(whole, abs=1e-12)
        size = percentage_points(result["model_risk"])
        assert size in change_html(STUDY, patient, result)
        assert size.lstrip("+−") in result["sentence"] or "hardly changed" in result["sentence"]


@given(st.floats(-1, 1))
def test_points_are_the_difference_itself(move):
    text = percentage_points(move)
    value = float(text.split()[0].replace("−", "-"))
    assert value == pytest.approx(100 * move, abs=0.0500001) and text.endswith(" percentage points")
    message = percentage_points(move, ("lower", "higher"))
    assert message == "the same risk" if value == 0 else message.startswith(text.lstrip("+−"))


def test_the_training_patients_are_counted_once_and_alike_at_every_entry_point(served):
    with background(served) as url:
        token = Tokens(served.store.folder).create("B", "admin")
        with Client(url, token=token) as client:
            for middleware in (served, client):
                assert middleware.training_summary()["version"] == 2
                assert middleware.facts(1)["training"]["patients"] == len(TRAINED)
    models = served.models().set_index("version")
    assert models.loc[1, "apparent_patients"] == len(TRAINED) == len(training_data(served, 1))
    shown = values_html(STUDY, served.training_summary(), NEXT.iloc[0].to_dict())
    assert f"Beside the {served.training_summary()['n']:,} training patients of version 2" in shown
    page = model_facts_html(served.facts(1))
    assert f"It was trained on {len(TRAINED):,} patients" in page
    known = served.known()
    assert served.status()["counts"]["records"] == len(known) == len(PAST) + 50


def test_earlier_patients_are_those_with_an_outcome_known_then(served):
    record = NEXT["record_id"].iloc[30]
    result, arrived = served.similar(record), NEXT["arrived"].iloc[30]
    then = served.known(arrived)
    earlier = then[(then["arrived"] < arrived) & then["y"].notna()]
    assert result["considered"] == len(earlier)
    assert f"of {len(earlier):,} earlier patients with a known outcome" in result["sentence"]

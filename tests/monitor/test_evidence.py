"""One state: stored verdict, machine, API and computation agree number by number."""

import json
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from support.monica import FIRST, NEXT, ROWS, STUDY, Machine, learn, shifted

from lm.core.errors import LMError
from lm.core.evidence import Evidence, performance_frame, read_evidence, stored_evidence
from lm.data.snapshot import read_snapshot
from lm.model.metrics import by_period, by_subgroups, calibration_curve, performance
from lm.model.population import population, risk_if_known
from lm.monitor import cusum
from lm.monitor.drift_tests import covariate_drift
from lm.monitor.summary import part_of_year
from lm.monitor.verdict import before_and_since, judged_patients, limits_from_json
from lm.serve.app import background
from lm.serve.client import Client


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A first model that has met 700 patients, and one complete monitoring run."""
    with Machine(STUDY, tmp_path_factory.mktemp("home")) as machine:
        learn(machine)
        machine.receive_many(NEXT[:700], on_arrival=True)
        end, known = NEXT["arrived"].iloc[699], ROWS["known_at"]
        sent = ROWS["record_id"].isin(NEXT["record_id"][:700])
        machine.add_outcomes(ROWS[(known > FIRST) & (known <= end) & sent])
        machine.monitor()
        yield machine


@pytest.fixture(scope="module")
def evidence(machine):
    return machine.evidence()


@pytest.fixture
def served(machine, monkeypatch):
    """Start a service of the machine; a client of it."""
    monkeypatch.setenv("LM_HOME", str(machine.store.folder.parent))

    @contextmanager
    def start():
        with background(machine) as url, Client(url) as client:
            yield client

    return start


@pytest.fixture(scope="module")
def seen(machine, evidence):
    """What the run has read: its snapshot and its limits."""
    snapshot = machine.table("verdicts")["snapshot"].iloc[-1]
    known = read_snapshot(machine.store.folder / "snapshots" / f"{snapshot}.parquet")
    sketches = machine.table("sketches")
    return known, limits_from_json(sketches.loc[sketches["kind"] == "limits", "content"].iloc[-1])


@pytest.mark.slow
def test_machine_store_and_api_give_the_same_evidence(machine, evidence, served):
    row = machine.table("verdicts").iloc[-1]
    assert evidence == stored_evidence(machine.table("verdicts"), int(row["seq"]))
    stored = json.loads(row["evidence"])
    plain = read_evidence(stored)
    for name in ("charts", "drift_map", "performance", "faults", "alarms", "oe", "estimate"):
        assert getattr(evidence, name) == getattr(plain, name)
    with served() as client:
        assert client.evidence() == evidence == client.evidence(evidence.verdict)


def test_the_charts_are_those_of_the_alarms(machine, evidence, seen):
    known, limits = seen
    since = pd.Timestamp(evidence.since)
    group = judged_patients(STUDY, known, evidence.as_of, since, 100_000)
    paths = cusum.run_cusum(limits.charts, group["y"], risk_if_known(group), group)
    paths.index = pd.DatetimeIndex(group["arrived"])
    shown = evidence.charts.outcomes
    assert set(cusum.ALL_PATIENTS_CHARTS) < set(shown.paths)
    for name, path in shown.frame().items():
        whole = paths[name]
        assert path.iloc[-1] == whole.iloc[-1] and path.max() == whole.max()
        assert set(zip(path.index, path, strict=True)) <= set(zip(whole.index, whole, strict=True))
        assert shown.limits[name] == limits.charts.limit(name)
    for alarm in evidence.alarms:
        if alarm.chart in shown.paths:
            assert (
                alarm.s == shown.paths[alarm.chart][-1] >= alarm.limit == shown.limits[alarm.chart]
            )


def test_the_charts_of_the_records_are_those_of_the_scan(machine, evidence, seen):
    known, limits = seen
    later = before_and_since(known, pd.Timestamp(evidence.since))[1]
    assert evidence.charts.records.times[-1] == later["arrived"].iloc[len(later) // 25 * 25 - 1]
    table = pd.DataFrame(json.loads(machine.table("verdicts")["evidence"].iloc[-1])["drift"])
    least = table.set_index("feature")["p"]
    for feature, path in evidence.charts.records.paths.items():
        assert np.isclose(path[-1], -np.log10(max(least[feature], 1e-12)), rtol=1e-12)
        limit = evidence.charts.records.limits[feature]
        assert np.isclose(limit, -np.log10(limits.scan.threshold), rtol=1e-12)


def test_performance_is_that_of_the_served_risks(evidence, seen):
    rows = population(seen[0][seen[0]["version"].notna()]).labelled
    served = performance_frame(evidence.performance.served).drop(columns="subgroup")
    pd.testing.assert_frame_equal(served, by_period(STUDY, rows), check_exact=True)
    assert evidence.performance.first_model == ()  # It still serves
    recent = rows[rows["arrived"] > rows["arrived"].max() - pd.Timedelta(days=730)]
    window = evidence.performance.windows["recent"]
    strata = recent["version"].to_numpy()
    whole = performance(recent["y"], recent["risk"], weights=recent["ipcw"], strata=strata)
    assert window.patients == whole["patients"]
    assert window.measures["auroc"] == tuple(whole["auroc"])
    groups = by_subgroups(STUDY, recent)
    assert [g.measures["oe"][0] for g in window.subgroups] == groups["oe"].tolist()
    how_many = int(np.clip(recent["y"].sum() // 8, 3, 10))
    curve = calibration_curve(recent["y"], recent["risk"], how_many, weights=recent["ipcw"])
    assert [p.share for p in window.calibration] == curve.iloc[:, 1].tolist()


def test_the_cells_of_the_drift_map_are_those_of_the_one_engine(evidence, seen):
    known, result = seen[0], evidence.drift_map
    later = known["arrived"] > result.since
    assert (result.reference, result.current) == ((~later).sum(), later.sum())
    names = part_of_year(known["arrived"], 2)
    table = result.frame("halves")
    for period, cells in table.groupby("period"):
        now = known[later & (names == period)]
        alone = covariate_drift(
            STUDY, known.loc[~later, STUDY.feature_names], now[STUDY.feature_names]
        )
        alone = alone.set_index("feature")
        for cell in cells.itertuples():
            assert cell.patients == len(now)
            assert cell.psi == alone.at[cell.feature, "effect"]
            assert cell.moved == alone.at[cell.feature, "moved"]
        shares = result.distribution("halves", "sex", period)
        assert shares["current"].iloc[0] == (now["sex"] == shares["bin"].iloc[0]).mean()


def test_a_run_of_outcomes_only_leaves_the_complete_one_in_view(machine, evidence):
    fast = machine.monitor(fast=True)
    assert machine.evidence() == evidence
    assert machine.evidence(fast["seq"]).drift_map == Evidence().drift_map
    assert machine.evidence(fast["seq"]).charts.outcomes == evidence.charts.outcomes
    with pytest.raises(LMError, match="unknown"):
        machine.evidence(99)


def test_older_verdicts_are_read_too():
    old = pd.DataFrame({"seq": [1], "as_of": [pd.Timestamp("2020-01-01")], "version": [None]})
    assert stored_evidence(old.assign(evidence=None)).verdict == 1
    old = old.assign(evidence='{"patients": 12, "oe": [1.0, null, null], "growth": {}}')
    assert stored_evidence(old).oe == (1.0, None, None)


def test_two_versions_are_compared_by_the_service_as_by_hand(machine, served):
    shifted(machine, 0.5)
    result = machine.compare_versions(1, 2, 100_000)
    known = machine.known()
    rows = population(known[known["version"].notna()]).labelled
    assert (result.judged, result.left_out) == (len(rows), 0)
    other = machine.registry.load(2).predict_proba(rows)[:, 1]
    by_hand = performance(rows["y"], other, weights=rows["ipcw"])
    assert result.measures[2]["brier"] == tuple(by_hand["brier"])
    assert result.patients == len(known) and len(result.flips) == len(STUDY.thresholds)
    risks = {v: machine.registry.load(v).predict_proba(known)[:, 1] for v in (1, 2)}
    for flip in result.flips:
        above = {v: risk >= flip.threshold for v, risk in risks.items()}
        assert flip.up == (above[2] & ~above[1]).sum() and flip.down == 0
    gaps = [pair.other - pair.champion for pair in result.pairs]
    assert gaps == sorted(gaps, reverse=True) and min(gaps) > 0
    with served() as client:
        assert client.compare_versions(1, 2, 100_000) == result
        with pytest.raises(LMError, match="9"):
            client.compare_versions(1, 9)

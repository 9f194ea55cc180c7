"""Update policies side by side: the benchmark in small, River without foresight, its tables."""

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from support.here import run_here

from lm.core.settings import find_root
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.offline.policies import UPDATE_POLICIES
from lm.offline.prequential import gain, prequential

pytestmark = pytest.mark.slow  # The fixtures of the module are

ROOT = find_root()
FOLDER = ROOT / "reports" / "policies"
PYTHON = ROOT / ".peers" / "river" / "bin" / "python"
RIVER = ["River logistic regression", "River adaptive random forest"]
SMALL = {"studies": "rotterdam_5y", "scenarios": "", "shuffles": 1, "dear": 0, "null": 0}
SMALL |= {"every_days": 365, "peers": "", "processes": 1}


def regrets(table):
    """Brier score minus the best of the stream, by hand, the oracle apart."""
    challengers = table.drop("oracle", level="policy")["brier"]
    return challengers - challengers.groupby("stream").transform("min")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of the tables and the record of a small run."""
    folder = tmp_path_factory.mktemp("policies")
    notebook = str(ROOT / "nbs" / "benchmarks" / "policies.ipynb")
    return folder, run_here(notebook, SMALL | {"output": str(folder)})


def read(folder):
    """The table as the notebook leaves it."""
    return pd.read_csv(folder / "policies.csv", index_col=[0, 1])


def test_a_small_run_has_every_policy_its_measures_and_its_control(small):
    folder, record = small
    table = read(folder)
    assert list(table.loc["rotterdam_5y"].index) == list(UPDATE_POLICIES) and not record["river"]
    measures = ["difference", "low", "high", "brier", "log loss", "O:E", "O:E low", "AUROC"]
    assert table[[*measures, "AUROC low", "AUROC high", "updates"]].notna().all(axis=None)
    assert (table["low"] <= table["difference"]).all() and (table["high"] >= table["low"]).all()
    frozen = table.loc[("rotterdam_5y", "frozen")]
    assert (frozen[["difference", "low", "high", "updates", "log loss difference"]] == 0).all()
    shuffled = table.xs("rotterdam_5y")["shuffles"]
    assert set(shuffled.dropna().index) == set(UPDATE_POLICIES) - {"frozen", "triggered", "oracle"}
    text = (folder / "policies.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 150 and "not measured" in text


def test_a_small_run_says_what_the_simulation_says(small):
    study = load_study("rotterdam_5y")
    table = read(small[0])
    done = prequential(study, read_rows(study), "yearly refit", every_days=365)
    result, row = gain(done), table.loc[("rotterdam_5y", "yearly refit")]
    for name in ("difference", "low", "high", "patients", "updates"):
        assert row[name] == pytest.approx(result[name], abs=1e-6)
    known = done.predictions.query("ipcw > 0")
    assert len(done.predictions) > len(known) and known["ipcw"].nunique() > 1
    p, w = known["risk"].clip(0.001, 0.999), known["ipcw"]
    loss = -known["y"] * np.log(p) - (1 - known["y"]) * np.log(1 - p)
    assert row["log loss"] == pytest.approx((w * loss).sum() / w.sum(), abs=1e-6)
    squares = (w * (known["risk"] - known["y"]) ** 2).sum() / w.sum()
    assert row["brier"] == pytest.approx(squares, abs=1e-6)
    assert row["O:E"] == pytest.approx((w * known["y"]).sum() / (w * known["risk"]).sum(), abs=1e-6)
    area = roc_auc_score(known["y"], known["risk"], sample_weight=w)
    assert row["AUROC"] == pytest.approx(area, abs=1e-6)


@pytest.mark.parametrize("where", ["small", "committed"])
def test_regret_is_what_the_best_in_hindsight_had_less_and_the_oracle_has_none(where, small):
    table = read(small[0] if where == "small" else FOLDER)
    assert table.xs("oracle", level="policy")["regret"].isna().all()
    regret = table.drop("oracle", level="policy")["regret"]
    assert (regret >= 0).all() and (regret.groupby("stream").min() == 0).all()
    assert np.allclose(regret, regrets(table), atol=2e-6)


def test_the_targets_follow_from_the_table(small):
    for folder in (small[0], FOLDER):
        table = read(folder)
        targets = pd.read_csv(folder / "targets.csv", index_col=0)
        assert list(targets.index) == list(table.index.unique("stream"))
        for name, row in targets.iterrows():
            others = table.loc[name].drop(["triggered", "oracle"])
            assert row["best other"] == others["brier"].idxmin()
            gap = table.loc[(name, "triggered"), "brier"] - others["brier"].min()
            assert row["gap"] == pytest.approx(gap, abs=2e-6)
            assert row["excess"] == pytest.approx(max(gap - 0.0005, 0), abs=2e-6)
            assert row["allowed"] == others.loc[row["best other"], "updates"] / 2


# River


def river_risks(frame, tmp_path, name):
    """Risks of River's models for one stream, by its own program."""
    folder, out = tmp_path / name, tmp_path / f"{name}-out"
    folder.mkdir()
    out.mkdir()
    (folder / "columns.json").write_text(
        json.dumps({"numbers": ["x"], "levels": {"g": ["a", "b"]}})
    )
    frame.to_parquet(folder / "s.parquet", index=False)
    script = ROOT / "nbs" / "benchmarks" / "peers" / "river_policies.py"
    subprocess.run([PYTHON, script, folder, "--out", out], check=True, capture_output=True)
    return pd.read_parquet(out / "s.parquet"), json.loads((out / "learned.json").read_text())


@pytest.mark.skipif(not PYTHON.exists(), reason="River's environment is not built: make peers")
def test_river_uses_an_outcome_only_when_it_is_reported(tmp_path):
    rng, n = np.random.default_rng(0), 300
    day = pd.Timestamp("2000-01-01") + pd.to_timedelta(np.arange(n), unit="D")
    frame = pd.DataFrame({"x": rng.normal(size=n), "g": rng.choice(["a", "b"], n)})
    frame.loc[5, "x"] = np.nan
    frame = frame.assign(y=(frame["x"].fillna(0) > 0).astype(float), arrived=day)
    frame["matured"] = frame["arrived"] + pd.Timedelta(days=50)
    frame.loc[7, ["y", "matured"]] = [np.nan, pd.NaT]
    frame["asked"] = np.arange(n) >= 100
    cut = day[200]
    later = frame.assign(y=frame["y"].where(~(frame["matured"] > cut), 1 - frame["y"]))
    before, answer = river_risks(frame, tmp_path, "before")
    after, _ = river_risks(later, tmp_path, "after")
    assert list(before) == RIVER and len(before) == 200
    same = (frame.loc[frame["asked"], "arrived"] <= cut).to_numpy()
    pd.testing.assert_frame_equal(before[same], after[same], check_exact=True)
    assert (before[~same] != after[~same]).any().all()
    assert set(answer["learned"]["s"].values()) == {299 - 50 - 50}  # Matured on days 101 to 299
    assert (before.iloc[0] != 0.5).all()  # The history has taught


# What is committed


def test_the_committed_table_has_every_policy_on_every_stream():
    table = read(FOLDER)
    assert {"monica", "rotterdam", "rotterdam_5y", "no drift", "label"} <= set(
        table.index.levels[0]
    )
    for name in table.index.unique("stream"):
        assert set(table.loc[name].index) == {*UPDATE_POLICIES, *RIVER}
    made = table[table["error of risk"].notna()]
    assert (made["streams"] >= 3).all() and (made["patients"] > 8000).all()
    rows = table.drop(["frozen", "oracle"], level="policy").loc[["monica", "rotterdam"]]
    assert (rows["shuffles"] >= 8).all()
    text = (FOLDER / "policies.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 150


def test_the_committed_targets_are_stated_as_they_came_out():
    text = (FOLDER / "policies.txt").read_text(encoding="utf-8")
    targets = pd.read_csv(FOLDER / "targets.csv", index_col=0)
    lines = [" ".join(v.split()) + " " for v in text.split("Targets of the")[1].splitlines()]
    for name, row in targets.iterrows():
        line = next(v for v in lines if v.startswith(f"{name} {row['best other']} "))
        assert (f"missed by {row['excess']:.4f}" in line) == (row["excess"] > 0)
        assert line.endswith(f"missed by {row['updates over']:.1f} ") == (row["updates over"] > 0)
    rate = json.loads((FOLDER / "null.json").read_text())
    assert rate["decades"] > 19 and rate["low"] <= rate["rate"] <= rate["high"]
    for result in (rate, rate["alarms"]):
        assert f"{result['updates']} " in text and f", {result['rate']:.2f} each" in text
        assert result["low"] <= result["rate"] <= result["high"]
    quiet = text.split("Without drift")[1].splitlines()[1:3]
    assert [line.endswith(": reached") for line in quiet] == [
        results["rate"] <= 0.5 for results in (rate, rate["alarms"])
    ]


def test_what_came_out_is_what_the_notebook_says():
    table, targets = read(FOLDER), pd.read_csv(FOLDER / "targets.csv", index_col=0)
    within = {"rotterdam", "rotterdam_5y", "no drift", "label", "covariate"}
    assert set(targets.index[targets["excess"] == 0]) == within and len(targets) == 9
    assert targets.loc["label", "gap high"] < 0 and targets["gap"].idxmin() == "label"
    missed = targets["excess"].drop([*within, "label recurring"])
    assert (round(missed.min(), 4), round(missed.max(), 4)) == (0.0002, 0.001)
    assert round(targets.loc["label recurring", "excess"], 4) == 0.0022
    assert set(targets.index[targets["updates over"] > 0]) == {"monica", "rotterdam_5y"}
    assert (targets.loc["monica", "updates"], targets.loc["monica", "allowed"]) == (4, 3.5)
    assert targets.loc["rotterdam_5y", "best other"] == "frozen"
    rate = json.loads((FOLDER / "null.json").read_text())
    assert rate["alarms"]["updates"] == 0 and 1.75 < rate["rate"] < 2.25
    regret = table.loc["no drift", "regret"]
    assert round(regret["frozen"], 4) == 0.0011 and regret["incremental"] == 0
    yearly = [p for p in UPDATE_POLICIES if p.startswith("yearly") and "recalibration" in p]
    assert (table.loc[[("label recurring", p) for p in yearly], "low"] > 0).all()
    late = table.loc["rotterdam_5y"].drop(["frozen", "yearly recalibration", "oracle"])
    assert (late["difference"] > 0).all()
    assert (late.loc[["yearly refit", "yearly refit and recalibration"], "low"] < 0).all()
    line, forest = (table.xs(name, level="policy") for name in RIVER)
    calendar = table.loc["label"].loc[yearly, "brier"].min()
    assert line.loc["label", "brier"] < calendar + 0.0005 and line.loc["rotterdam_5y", "low"] > 0
    assert (forest["difference"] > 0).all()
    assert set(forest.index[forest["low"] < 0]) == {"monica", "label"}

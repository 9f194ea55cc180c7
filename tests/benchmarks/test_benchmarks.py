"""The benchmarks in small: each runs by papermill, writes its tables, and says what it found."""

import argparse
import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2
from support.here import run_here

from lm.cli import cli
from lm.core.errors import LMError
from lm.core.settings import settings

pytestmark = pytest.mark.slow  # The fixtures of the module are

ROOT = settings().root
SMALL = {
    "detection": {"trials": 1, "null": 2, "peers": "", "processes": 1},
    "real_data": {"studies": "monica", "budgets": "0.05", "shuffles": 1, "processes": 1},
    "ladder": {"streams": 2, "bootstrapped": 1, "trees": 1, "sizes": "200"},
    "performativity": {
        **{"seeds": 1, "learn": 600, "visits": 600, "retrainings": 1, "tested": 500},
        "adherences": "0.5 1.0",
    },
    "cost": {"sizes": "5000x10", "millions": "0.2", "wide": 5, "repeats": 1, "peer": False},
}
CLAIM = (  # Of the README, about the dashboards
    r"paints within ([\d.]+) s, shows its data within ([\d.]+) s, "
    r"its first chart within ([\d.]+) s and a new patient within ([\d.]+) s"
)


@pytest.fixture(scope="module", params=SMALL)
def small(request, tmp_path_factory):
    """Name, folder of the tables and record of one benchmark."""
    folder = tmp_path_factory.mktemp(request.param)
    notebook = str(ROOT / "nbs" / "benchmarks" / f"{request.param}.ipynb")
    record = run_here(notebook, SMALL[request.param] | {"output": str(folder)})
    return request.param, folder, record


def test_a_benchmark_runs_in_small_and_writes_its_table(small):
    name, folder, record = small
    assert len((folder / f"{name}.txt").read_text(encoding="utf-8")) > 200
    if name == "detection":
        table = pd.read_csv(folder / "detection.csv", index_col=0)
        mine = table.loc["this monitor"]
        assert mine["unit"] <= 100 and mine["missing"] <= 100 and record["least_found"] >= 0
    if name == "real_data":
        assert record["first"]["monica 0.05 outcomes"] < "1993"
    if name == "cost":
        assert 0 < record["largest_mb"] < 1000 and record["ratio"] == []


@pytest.mark.parametrize("name", (*cli.BENCHMARKS, "policies"))
def test_the_page_shows_what_is_committed_below_reports(name):
    page = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    block = (ROOT / "reports" / name / f"{name}.txt").read_text(encoding="utf-8")
    assert len(block) > 200 and cli.fill(page, name, block) == page


def test_what_the_page_claims_of_the_dashboards_was_measured():
    folder = ROOT / "reports" / "dashboards"
    opened = pd.read_csv(folder / "opened.csv").groupby(["kernel", "page"])
    opened = opened.median(numeric_only=True).round(2)
    waiting = opened.loc["waiting"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    paint, data, chart, news = map(float, re.search(CLAIM, text).groups())
    assert waiting["first paint, s"].max() <= paint and waiting["data, s"].max() <= data
    assert waiting["chart, s"].max() <= chart and len(waiting) == 3
    assert pd.read_csv(folder / "pressed.csv")["longest, s"][0] <= news
    assert opened["memory, MB"].max() < 300 and opened.loc["cold", "data, s"].max() < 5


def test_what_is_claimed_of_the_detection_stands_in_its_table():
    table = pd.read_csv(ROOT / "reports" / "detection" / "detection.csv", index_col=0)
    mine, target = table.loc["this monitor"], table.loc["target"]
    scenarios = [c for c in table if c not in ("false", "low", "high") and c[-5:] != "found"]
    assert len(scenarios) == 12 and mine["false"] <= target["false"]
    assert (mine[scenarios].astype(float) <= target[scenarios].astype(float)).all()
    assert (mine[[f"{s} found" for s in scenarios]].astype(float) >= 0.92).all()


def test_the_readme_tells_what_the_table_of_the_detection_shows():
    table = pd.read_csv(ROOT / "reports" / "detection" / "detection.csv", index_col=0)
    mine = table.loc["this monitor"].astype(float)
    result = min(mine[c] for c in table if c.endswith(" found"))
    later = [mine[s] for s in ("label", "concept", "treatment")]
    text = [
        f"{mine['false']:.2f} false alarms per 1,000 patients",
        f"interval {mine['low']:.2f} to {mine['high']:.2f}",
        f"at least {int(100 * result)} % of 40 streams",
        f"unit after {mine['unit']:.0f} patients, covariate shift after {mine['covariate']:.0f}",
        f"after {min(later):.0f} to {max(later):.0f} (medians)",
    ]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [w for w in text if w not in readme] == []


def test_what_is_claimed_of_the_cost_stands_in_its_table():
    paired = pd.read_csv(ROOT / "reports" / "cost" / "paired.csv")
    assert (paired["run, MB"] < 300).all() and len(paired) == 2
    large = pd.read_csv(ROOT / "reports" / "cost" / "large.csv")
    assert large["rows, millions"].tolist() == [1, 10, 100] and (large["run, MB"] < 2000).all()


def test_the_versions_of_the_other_libraries_are_written_down():
    stored = json.loads((ROOT / "reports" / "detection" / "versions.json").read_text())
    assert set(stored) == {"nannyml", "river", "frouros", "evidently"} and all(stored.values())


def test_an_unknown_benchmark_is_refused_in_one_sentence():
    with pytest.raises(LMError, match="'speed' is unknown: choose from detection, real_data"):
        cli._benchmarks(argparse.Namespace(names=["speed"], p=[], quiet=True))


def test_score_counts_first_alarms_and_delays_as_a_loop_does():
    notebook = json.loads((ROOT / "nbs" / "benchmarks" / "detection.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    code = next(c for c in cells if "def score(" in c).split("\nscores = ")[0]
    names = {"TARGETS": {"unit": 50}, "ONSET": 500, "AFTER": 1500, "np": np, "chi2": chi2}
    exec(code, names)
    quiet = {"null-1": [1000, 1500], "null-2": []}
    alarms = quiet | {"unit-1": [400, 525], "unit-2": [600], "unit-3": []}
    row = names["score"](alarms)
    assert row["false"] == pytest.approx(1000 * 1 / (1000 + 2000))
    assert row["unit"] == 100 and row["unit found"] == pytest.approx(2 / 3)

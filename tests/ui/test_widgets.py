"""The dashboards' states, charts and command, without a browser."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from support.desk import Desk, html_of

from lm.core.errors import LMError
from lm.core.settings import find_root
from lm.core.study import load_study
from lm.ui import server
from lm.ui.charts import patient as charts
from lm.ui.clinician_page import clinician
from lm.ui.scientist_state import DataScientistState
from lm.ui.sign_in import open_page


@pytest.fixture(scope="module")
def study():
    return load_study("monica")


@pytest.fixture
def desk(study):
    return Desk(study)


# ---------------------------------------------------------------------------------------- a state


def test_state_survives_json(desk):
    state = DataScientistState(desk)
    state.n, state.tab = 7, "Drift"
    again = DataScientistState(desk).from_dict(json.loads(json.dumps(state.to_dict())))
    assert again.to_dict() == state.to_dict()
    for bad in ({"colour": 1}, {"message": "x"}):
        with pytest.raises(LMError, match="no such choice"):
            again.from_dict(bad)


# --------------------------------------------------------------------------------- data scientist


# ----------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize("seed", range(20))
def test_printed_contributions_add_up(seed):
    rng = np.random.default_rng(seed)
    shares = {f"f{i}": float(v) for i, v in enumerate(rng.normal(0, 0.7, rng.integers(0, 15)))}
    base = float(rng.normal(-1, 1))
    figure = charts.waterfall_chart(base, shares)
    printed = [float(t.replace("−", "-")) for t in figure.data[0].text]
    start, end = (float(t.strip(" <b>").split()[0].replace("−", "-")) for t in figure.data[1].text)
    assert round(start + sum(printed), 2) == end == round(base + sum(shares.values()), 2)
    assert np.isclose(figure.data[1].x[1], base + sum(shares.values()))


def test_risk_ticks_stand_where_their_risk_is():
    places, result = charts.risk_ticks(-4, 2)
    risks = [float(word.rstrip(" %")) / 100 for word in result]
    assert np.allclose(1 / (1 + np.exp(-np.array(places))), risks) and len(places) > 4


# --------------------------------------------------------------------------------- serving, files


def test_command_binds_to_this_machine_unless_there_is_a_token(monkeypatch):
    monkeypatch.delenv("LM_DASHBOARD_TOKEN", raising=False)
    command = server.voila_command()
    assert "--Voila.ip=127.0.0.1" in command
    with pytest.raises(LMError, match="LM_DASHBOARD_TOKEN"):
        server.voila_command(ip="0.0.0.0")
    monkeypatch.setenv("LM_DASHBOARD_TOKEN", "secret")
    assert "secret" not in " ".join(server.voila_command(ip="0.0.0.0"))
    names = server.page_addresses(command, "monica")
    assert set(names) >= {"clinician", "data_scientist"}


# The name of a schema's dialect has the form of an address; no page and no editor loads it.
DIALECT = '"$schema": "https://json-schema.org/draft/2020-12/schema"'
HOST = re.compile(r"://[^|\s]")  # A rule for addresses, `https?://|env:`, names no host


def test_assets_name_no_other_host():
    for path in (find_root() / "lm" / "assets").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text(encoding="utf-8")
            if path.parent.name == "schemas":
                assert text.count(DIALECT) == 1, path
                text = text.replace(DIALECT, "")
            assert not HOST.search(text), path


@pytest.mark.parametrize("name", ["patients", "clinician", "data_scientist"])
def test_dashboard_is_a_doorbell(name):
    path = find_root() / "nbs" / "dashboards" / f"{name}.ipynb"
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) <= 4 and sum("".join(c["source"]).count("\n") + 1 for c in cells) <= 25
    assert not any(cell.get("outputs") for cell in cells)


def test_the_dashboards_kernel_stays_light():
    code = "import sys, lm.ui.sign_in, lm.ui.widgets, lm.serve.client\n"
    code += "print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [
        "sklearn",
        "mlflow",
        "shap",
        "evidently",
        "scipy.stats",
        "duckdb",
        "lm.machine.machine",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_unknown_study_is_stated_on_the_page(monkeypatch):
    monkeypatch.setenv("QUERY_STRING", "study=monika<b>")
    assert "monika&lt;b&gt;" in html_of(open_page(clinician))

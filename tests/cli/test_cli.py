"""The command line: exit status, one line per mistake, and what is printed."""

import os
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
from support.waiting import PATIENCE

from lm.cli import cli
from lm.core.settings import find_root, settings
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.machine.machine import Machine
from lm.serve.client import connect
from lm.serve.crontab import crontab


def command(*text, **how):
    text = [sys.executable, "-m", "lm.cli.cli", *map(str, text)]
    return subprocess.run(text, capture_output=True, text=True, cwd=find_root(), **how)


def stated(capsys):
    """One line on stderr."""
    text = capsys.readouterr().err
    assert text.startswith("lm: ") and text.count("\n") == 1
    return text


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom lm.cli import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["pandas", "numpy", "papermill", "httpx", "duckdb", "mlflow"]
    ran = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True)
    assert "usage: lm" in ran.stdout and ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (["status", "monika"], "monika"),
        (["status", "../etc"], "not usable"),
        (["models", "nope"], "nope"),
        (["scheduler", "nope", "--print", "crontab"], "nope"),
        (["predict", "monica", "no.csv"], "'no.csv' does not exist"),
        (["trigger", "monica", "--until", "soon"], "--until 'soon' must be a date"),
        (["trigger", "monica", "--rate", "-1"], "rate"),
        (["rollback", "monica"], "earlier version"),
        (["run", "monitr"], "notebook 'monitr' is unknown"),
        (["run", "no/such.ipynb"], "does not exist"),
        (["mlflow"], "registry is empty"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, text, part):
    assert cli.main(text) == 2
    assert part in stated(capsys)


@pytest.mark.slow
def test_a_locked_store_is_one_line_and_status_2(home, capsys):
    with Machine("monica", home):
        assert cli.main(["status", "monica"]) == 2
    assert "store of study 'monica' is open in this process" in stated(capsys)


def test_trigger_prints_what_was_refused(home, capsys):
    assert cli.main(["trigger", "monica", "--n", "3"]) == 0
    with Machine("monica", home) as machine:
        first = machine.table("records")["record_id"].iloc[0]
        machine.withdraw("record", first, "Dr Lee", "another patient")
    capsys.readouterr()
    assert cli.main(["trigger", "monica", "--until", "1985-04-01"]) == 0
    printed = capsys.readouterr()
    assert "refused        1" in printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith(f"outcome for {first!r}: the store has no such record")


@pytest.mark.slow
def test_trigger_status_snapshot_models(capsys):
    assert cli.main(["trigger", "monica", "--n", "3"]) == 0
    assert cli.main(["trigger", "monica", "--until", "1985-01-10"]) == 0
    assert cli.main(["snapshot", "monica"]) == cli.main(["models", "monica"]) == 0
    assert cli.main(["status", "monica"]) == cli.main(["studies"]) == 0
    printed = capsys.readouterr().out
    assert "patients sent  3" in printed and "monica" in printed and "(none)" in printed
    with connect("monica") as machine:
        assert f'"records": {machine.status()["counts"]["records"]}' in printed


@pytest.mark.slow
def test_status_shows_what_was_known_at_a_time(capsys):
    assert cli.main(["trigger", "monica", "--until", "1985-01-10"]) == 0
    capsys.readouterr()
    assert cli.main(["status", "monica", "--as-of", "1984-01-01"]) == 0
    before = capsys.readouterr().out
    assert cli.main(["status", "monica", "--as-of", "1985-01-10"]) == 0
    after = capsys.readouterr().out
    count = lambda text: int(re.search(r"patients\s+(\d+)", text)[1])  # noqa: E731
    assert count(before) == 0 < count(after)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """What the verbs ask of the pipelines; the monitor proposes what `action` says."""
    calls = []

    def run_notebook(notebook, parameters, **_):
        calls.append((notebook, parameters))
        record = {"action": calls.action, "verdict": 7} if notebook == "monitor" else {}
        return {"notebook": notebook, "output": tmp_path / "x.ipynb", "record": record}

    class Calls(list):
        action = "nothing"

    calls = Calls()
    monkeypatch.setattr(cli, "run_notebook", run_notebook)
    return calls


def test_a_retraining_follows_only_a_verdict_that_proposes_one(runs):
    text = ["monitor", "monica", "--then-retrain", "-p", "window_days", "365"]
    assert cli.main(text) == 0
    assert runs == [("monitor", {"study": "monica", "window_days": "365"})]
    runs.action = "recalibrate"
    assert cli.main(text) == 0
    assert runs[2:] == [("retrain", {"study": "monica", "verdict": 7})]
    assert cli.main(["monitor", "monica", "--exit-code"]) == 10
    runs.action = "look at the data"
    assert cli.main(["monitor", "monica", "--exit-code"]) == 0


def test_predict_passes_absolute_paths(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.csv").write_text("record_id\n")
    assert cli.main(["predict", "monica", "new.csv", "--output", "risks.csv"]) == 0
    files = {"file": str(tmp_path / "new.csv"), "output": str(tmp_path / "risks.csv")}
    assert runs == [("score", {"study": "monica", **files})]
    (tmp_path / "new.sql").write_text("SELECT 1")
    assert cli.main(["predict", "monica", "new.sql", "--reads", "new.csv"]) == 0
    named = {"query": "SELECT 1", "reads": [str(tmp_path / "new.csv")]}
    assert runs[1:] == [("score", {"study": "monica", **named})]


def test_a_simulation_starts_over_but_never_over_somebodys_own_patients(runs, home, capsys):
    assert cli.main(["simulate", "monica", "--patients", "5"]) == 0
    assert runs == [("simulate", {"study": "monica", "patients": 5})]
    assert cli.main(["trigger", "monica"]) == 0
    assert cli.main(["simulate", "monica"]) == 0
    with connect("monica") as machine:
        assert machine.status()["counts"]["records"] == 0
    assert cli.main(["trigger", "rotterdam"]) == 0
    capsys.readouterr()
    assert cli.main(["simulate", "rotterdam"]) == 2
    assert "patients of your own" in stated(capsys)
    with connect("rotterdam") as machine:
        assert machine.status()["counts"]["records"] == 1


def test_how_a_simulation_is_made_is_chosen_on_the_command_line(runs, capsys):
    how = ["--every", "7", "--updates", "notebook", "--checks", "--approve", "never"]
    results = {"every_days": 7, "pipelines": True, "checks": True, "approve": "never"}
    assert cli.main(["simulate", "monica", *how]) == 0
    assert cli.main(["simulate", "monica", "--updates", "process"]) == 0
    assert runs == [("simulate", {"study": "monica"} | results), ("simulate", {"study": "monica"})]
    for wrong in (["--every", "soon"], ["--updates", "later"], ["--approve", "always"]):
        with pytest.raises(SystemExit):
            cli.main(["simulate", "monica", *wrong])


@pytest.mark.slow
def test_a_rare_outcome_ends_with_the_reason_and_leaves_no_old_story(home, tmp_path, monkeypatch):
    """Thirteen events are too few for a model: the last line says how many are needed."""
    study = load_study("monica")
    rows = pd.read_csv(study.rows)
    events = rows.index[rows["event"].notna()]
    rows.loc[events[13:], "event"] = None
    rows["followed_until"] = pd.to_datetime(rows["arrived"]) + pd.Timedelta(days=29)
    folder = tmp_path / "data" / "rare"
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text((study.folder / "study.toml").read_text())
    rows.to_csv(folder / "rows.csv", index=False, date_format="%Y-%m-%dT%H:%M")
    monkeypatch.setenv("LM_DATA", str(tmp_path / "data"))
    stale = settings().runs / "rare" / "story.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier simulation")
    ran = command("simulate", "rare", "--quiet", "--every", "365")
    assert ran.returncode == 2 and not stale.exists()
    last = ran.stderr.strip().splitlines()[-1]
    assert "no patient has been predicted" in last
    assert "13 of the rarer kind, 100 and 20 are needed" in last


@pytest.mark.slow
def test_a_score_names_refused_rows_by_their_line(home, tmp_path):
    """Not by a pseudonym: the record is stored nowhere, so no one could look it up."""
    rows = pd.read_csv(load_study("monica").rows, dtype=str, keep_default_na=False)[:20]
    rows.loc[[3, 11], "age"] = "640"
    rows.to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / "o.csv"
    ran = command("predict", "monica", tmp_path / "new.csv", "--quiet", "--output", out)
    assert ran.returncode == 0, ran.stderr
    shown = next(line for line in ran.stdout.splitlines() if line.startswith("first_refused"))
    for line in (5, 13):
        assert f'"line {line}: age = ' in shown
    assert "p-" not in shown
    scores = pd.read_csv(out)
    bad = scores[scores["error"].notna()]
    assert bad["record_id"].tolist() == rows["record_id"][[3, 11]].tolist()
    assert bad["place"].tolist() == ["line 5", "line 13"]


def test_the_crontab_line_runs_as_cron_would_run_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_REPORTS", str(tmp_path / "50% 'done'"))
    line = crontab("monica").splitlines()[1]
    assert line.startswith("*/5 * * * * ") and line.count("%") == line.count(r"\%")
    shell = line.removeprefix("*/5 * * * * ").replace(r"\%", "%")
    shell = shell.replace("scheduler monica --once", "run nonsense --quiet")
    ran = subprocess.run(
        ["env", "-i", "PATH=/usr/bin:/bin", "/bin/sh", "-c", shell], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", "")
    log = settings().runs / "monica" / "automation.log"
    assert log.read_text().startswith("lm: notebook 'nonsense' is unknown")


def test_a_closed_pipe_is_no_error():
    lm = f"{shlex.quote(sys.executable)} -m lm.cli.cli"
    shell = f"{lm} studies | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=find_root())
    assert (ran.stdout.strip(), ran.stderr) == ("0", "")


def test_no_verb_and_wrong_categories_are_argparses_own_mistakes():
    for text in ([], ["monitr"], ["monitor"], ["trigger", "monica", "--n", "x"]):
        ran = command(*text)
        assert ran.returncode == 2 and "Traceback" not in ran.stderr


@pytest.mark.slow
def test_dashboards_start_together_and_stop_together(tmp_path):
    text = [sys.executable, "-m", "lm.cli.cli", "dashboards", "monica", "--port", "0"]
    process = subprocess.Popen(
        text, cwd=find_root(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines = []
    while not lines or not lines[-1].startswith("stop"):
        lines.append(process.stdout.readline())
        assert lines[-1], "ended early"
    assert any(line.startswith("clinician") and "?study=monica" in line for line in lines)
    with connect("monica") as client:
        assert hasattr(client, "url")
    process.terminate()
    assert process.wait(PATIENCE) == 143
    assert not (settings().study_home("monica") / "service.json").exists()
    with Machine("monica"):
        pass


def test_sources_name_no_place_of_their_makers():
    for path in (find_root() / "lm").rglob("*.py"):
        assert os.path.expanduser("~") + "/" not in path.read_text()


@pytest.mark.slow
def test_compare_shows_where_two_versions_change(home, capsys):
    study = load_study("monica")
    rows = read_rows(study)
    with Machine("monica", home) as machine:
        machine.receive_many(rows[rows["arrived"] <= study.first_model], on_arrival=True)
        machine.add_outcomes(rows[rows["known_at"] <= study.first_model])
        machine.update(machine.monitor(study.first_model, fast=True))
        machine.registry.register(machine.registry.load(1).recalibrated(0.5), {}, {}, {}, "shifted")
        machine.receive_many(rows[rows["arrived"] > study.first_model][:60], on_arrival=True)
        known = len(machine.known())
    assert cli.main(["compare", "monica", "1", "2"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"On {known} patients") and len(output) > 100 and "nan" not in output

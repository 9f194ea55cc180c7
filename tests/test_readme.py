"""What the pages say: numbers as committed, files that exist, verbs that work."""

import json
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from lm.cli import cli
from lm.core.settings import find_root
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.machine.machine import Machine
from lm.offline.calendar import monitoring_days
from lm.offline.prequential import gain, prequential
from lm.offline.story import side_by_side
from lm.serve.app import background
from lm.serve.client import token_for

ROOT = find_root()
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "OPERATIONS.md", "CRON.md", "GLOSSARY.md")
PAGES += ("data/README.md", "reports/README.md", "nbs/index.ipynb")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(page):
    """The words of a page: a Markdown file, or a notebook's Markdown cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if not page.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


# Numbers


@pytest.mark.parametrize(("name", "folder"), [("story", "monica"), ("targets", "policies")])
def test_the_readme_shows_what_is_committed_below_reports(name, folder):
    block = (ROOT / "reports" / folder / f"{name}.txt").read_text(encoding="utf-8")
    assert len(block) > 500 and cli.fill(README, name, block) == README


@cache
def fresh():
    """The simulation in memory, and its predictions with the outcomes known at its last run."""
    study = load_study("monica")
    rows = read_rows(study)
    done, last = prequential(study, rows), monitoring_days(study, rows)[-1]
    table = done.predictions.merge(rows[["record_id", "known_at"]], on="record_id")
    matured = (table["known_at"] <= last) & (table["arrived"] + study.horizon <= last)
    return study, done, table.assign(y=table["y"].where(matured))


@pytest.mark.slow
def test_the_committed_table_is_what_the_machine_gives_today(tmp_path):
    study, _, result = fresh()
    side_by_side(study, result).to_csv(tmp_path / "table.csv")
    committed = ROOT / "reports" / "monica" / "table.csv"
    assert (tmp_path / "table.csv").read_text() == committed.read_text()


def test_the_committed_figures_and_decisions_are_those_of_today():
    _, done, result = fresh()
    figures = json.loads((ROOT / "reports" / "monica" / "figures.json").read_text())
    results = gain(type(done)(**vars(done) | {"predictions": result}))
    for name in ("difference", "low", "high"):
        assert figures[name] == pytest.approx(results[name], abs=1e-12)
    assert figures["patients"] == len(result)
    study, rows = load_study("monica"), read_rows(load_study("monica"))
    days = monitoring_days(study, rows, follow=True)
    assert figures["monitoring_runs"] == len(days) >= done.monitoring_runs + 1
    stored = done.updates["to_version"].isna()
    assert (figures["updates"], figures["keep_decisions"]) == ((~stored).sum(), stored.sum())
    assert figures["rejected_records"] == figures["rejected_outcomes"] == 0
    story = (ROOT / "reports" / "monica" / "story.txt").read_text(encoding="utf-8")
    for update in done.updates.itertuples():
        assert f"{update.as_of.date()}: " in story and update.reason in story


def test_the_committed_policies_agree_with_today():
    _, done, _ = fresh()
    table = pd.read_csv(ROOT / "reports" / "policies" / "policies.csv", index_col=[0, 1])
    result = gain(done)
    row = table.loc[("monica", "triggered")]
    for name in ("difference", "low", "high", "patients", "updates"):
        assert row[name] == pytest.approx(result[name], abs=1e-5)
    assert row["high"] < 0 and row["difference"] < 1.5 * row["shuffled mean"]


@pytest.fixture
def demo_service(home):
    """A service whose champion is the demo's, with the same number."""
    study, done, _ = fresh()
    rows = read_rows(study)
    past = rows[rows["arrived"] <= study.first_model]
    with Machine("monica", home) as machine:
        machine.receive_many(past, source="history", on_arrival=True)
        machine.add_outcomes(rows[rows["known_at"] <= study.first_model])
        machine.update(machine.monitor(study.first_model, fast=True))
        for _ in range(int(done.updates["to_version"].max()) - 1):
            last = machine.registry.register(done.model, {}, {}, {}, "the demo's")
        machine.promote(last, "as in the demo", "quality manager")
        with background(machine) as url:
            yield url


@pytest.mark.slow
def test_the_curl_examples_give_the_printed_answers(demo_service):
    commands, answers = curl_examples()
    assert len(commands) == len(answers) >= 4
    results = {**os.environ, "TOKEN": token_for(demo_service)}
    for command, answer in zip(commands, answers, strict=True):
        command = command.replace("localhost:8008", demo_service.removeprefix("http://"))
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env=results, check=True
        )
        assert json.loads(done.stdout) == approximately(json.loads(answer)), command


def curl_examples():
    """Commands and answers between the marks."""
    block = README.split("<!-- curl -->")[1].split("<!-- /curl -->")[0]
    commands, answers = re.findall(r"```\w+\n(.*?)```", block, re.DOTALL)
    return [part.strip().splitlines() for part in (commands, answers)]


def approximately(value):
    """The same, numbers to nine digits."""
    if isinstance(value, dict):
        return {key: approximately(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [approximately(inner) for inner in value]
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


# Files


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MENTION = re.compile(
    r"`((?:nbs|lm|data|tests|reports|binder|tools)/[\w./-]+|[\w-]+\.(?:md|ini|yml))`"
)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    text, home = text_of(page), (ROOT / page).parent
    links = [link.split("#")[0] for link in LINK.findall(text) if "://" not in link]
    assert links or page in {"CONTRIBUTING.md", "GLOSSARY.md"}
    missing = [link for link in links if not (home / link).exists()]
    named = {name for name in MENTION.findall(text) if "topic" not in name}
    missing += [n for n in sorted(named) if not ((ROOT / n).exists() or (home / n).exists())]
    assert missing == []


def test_the_map_links_every_notebook():
    text = text_of("nbs/index.ipynb")
    linked = {Path(link.split("#")[0]).name for link in LINK.findall(text)}
    notebooks = {
        path.name
        for folder in ("library", "pipelines", "dashboards", "lessons", "benchmarks")
        for path in (ROOT / "nbs" / folder).glob("*.ipynb")
    }
    assert notebooks - linked == set()


# Commands


def stated_commands(page):
    """Lines and inline code of a page that begin with `lm ` or `make `."""
    text = text_of(page)
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", text)
    for command in [*lines, *inline]:
        command = re.sub(r"\$\([^)]*\)", "TODAY", command)
        if re.match(r"(lm|make) [a-z-]", command) and not command.endswith((".", ",", ":", ";")):
            yield command


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_is_understood(page):
    verbs = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in stated_commands(page):
        program, verb, *rest = shlex.split(command)
        if program == "make":
            assert verb in verbs, command
        elif not rest:
            assert verb in {"--help", *cli.VERBS}, command
        else:
            assert callable(cli.parser().parse_args([verb, *rest]).function), command


def test_the_readme_begins_with_the_commands_and_what_they_show():
    first = README.split("## ")[1]
    assert first.startswith("Begin")
    assert re.findall(r"^make ([\w-]+)", first, re.M) == ["demo", "test", "test-quick"]
    assert "<!-- story -->\n```text\n" in first
    badges = README.split("\n## ")[0]
    assert "mybinder.org" in badges and "licence" in badges and "python" in badges

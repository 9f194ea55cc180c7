"""What travels names no patient: tables, sentences, notebooks, logs, files beside a model."""

import hashlib
import hmac
import json
import re

import nbformat
import pandas as pd
import pytest

from lm.cli import cli
from lm.core.errors import LMError
from lm.core.pseudonyms import Pseudonyms
from lm.core.settings import settings
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.jobs.notebook_runner import run_notebook
from lm.machine.machine import Machine

pytestmark = pytest.mark.slow  # The fixtures of the module are


def test_a_pseudonym_is_a_keyed_hash_in_a_short_form(tmp_path):
    ours = Pseudonyms(tmp_path)
    key = (tmp_path / "pseudonyms.key").read_bytes()
    digest = hmac.new(key, b"m17", hashlib.sha256).digest()
    bits = "".join(f"{byte:08b}" for byte in digest)[:60]
    letters = "0123456789abcdefghjkmnpqrstvwxyz"
    drawn = "".join(letters[int(bits[i : i + 5], 2)] for i in range(55, -1, -5))
    assert ours.of("m17") == f"p-{drawn[:4]}-{drawn[4:8]}-{drawn[8:]}"
    assert (tmp_path / "pseudonyms.key").stat().st_mode & 0o777 == 0o600 and len(key) == 32
    assert "m17" not in ours.of("m17") and repr(key)[2:10] not in repr(ours)
    assert ours.of(17) == ours.of("17") != ours.of("17 ") and ours.of("") and ours.of("\ud800")
    for missing in (None, float("nan"), pd.NaT, pd.NA):
        with pytest.raises(LMError, match="missing record_id"):
            ours.of(missing)


def test_a_table_keeps_everything_but_the_names(tmp_path):
    ours, index = Pseudonyms(tmp_path), [5, 6, 7]
    text = "record 'a': record_id = 'a' breaks the rule: the record_id is taken"
    frame = pd.DataFrame(
        {"record_id": ["a", None, "a"], "patient": ["b", "a", "c"], "x": 1.5, "error": text}, index
    )
    for kind in ("object", "str", "category"):
        inputs = frame.astype({"record_id": kind})
        hidden = ours.in_table(inputs)
        assert hidden["record_id"].isna().tolist() == [False, True, False]
        names = [hidden["record_id"][5], hidden["record_id"][7], hidden["patient"][6]]
        assert set(names) == {ours.of("a")}
        assert hidden["error"][5] == text.replace("'a'", f"'{ours.of('a')}'")
        assert hidden.index.tolist() == index and (hidden["x"] == 1.5).all()
        assert inputs["record_id"][5] == "a" and inputs["error"][5] == text
    assert ours.in_table(frame.head(0)).empty
    pd.testing.assert_frame_equal(ours.in_table(frame[["x", "x"]]), frame[["x", "x"]])


@pytest.mark.parametrize("name", ["m1", "O'Neill", 'two "words"', "back\\slash", "61"])
def test_a_sentence_about_a_record_is_about_its_pseudonym(tmp_path, name):
    ours = Pseudonyms(tmp_path)
    hidden = f"'{ours.of(name)}'"
    for result in ("record {}: age = 61 breaks the rule", "outcome for {}: the store has none"):
        assert ours.in_sentence(result.format(repr(name))) == result.format(hidden)
    assert ours.in_sentence("study 'monica' has 61 records") == "study 'monica' has 61 records"


def test_a_key_in_doubt_is_refused_and_never_made_anew(tmp_path):
    path = Pseudonyms(tmp_path).path
    path.chmod(0o604)
    with pytest.raises(LMError, match="chmod 600"):
        Pseudonyms(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"")
    with pytest.raises(LMError, match="damaged"):
        Pseudonyms(tmp_path)
    assert path.read_bytes() == b""
    path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(LMError, match="cannot be read"):
        Pseudonyms(tmp_path)


# What pipelines leave behind

PIPELINES = sorted((settings().root / "nbs" / "pipelines").glob("*.ipynb"))

BODY = """
import pandas as pd
from IPython.display import display
table = pd.DataFrame({"record_id": ["secret7", "secret8"], "age": [61, 8]})
display(table, table["record_id"], table.set_index("record_id"))
assert table["record_id"][0] == "secret7"
"""
FAILS = "from lm.data.records import UnknownRecord\n"
FAILS += "raise UnknownRecord(\"record 'secret7' is unknown\")"


def notebook(path, *cells, study="monica"):
    """A pipeline with these cells."""
    first = nbformat.v4.new_code_cell(f"study: str = {study!r}", metadata={"tags": ["parameters"]})
    page = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    nbformat.write(page, path)
    return path


@pytest.mark.parametrize("study", ["monica", ""])
def test_a_notebook_works_with_numbers_and_shows_pseudonyms(tmp_path, study):
    stored = run_notebook(notebook(tmp_path / "own.ipynb", BODY, study=study))["output"].read_text()
    assert "secret" not in stored.split('"outputs"', 2)[2].split('"source"')[0]
    keys = settings().study_home("monica")
    assert (keys / "pseudonyms.key").exists() == bool(study)
    if study:
        assert stored.count(Pseudonyms(keys).of("secret8")) == 5  # Two pages, three texts
    assert not (settings().home / "all").exists()


def test_a_failed_run_names_a_pseudonym_in_notebook_log_and_sentence(tmp_path):
    with pytest.raises(LMError) as error:
        run_notebook(notebook(tmp_path / "own.ipynb", FAILS))
    name = Pseudonyms(settings().study_home("monica")).of("secret7")
    assert str(error.value) == f"record '{name}' is unknown"
    runs = settings().runs / "monica"
    (failed,) = runs.glob("*.failed.ipynb")
    shown = [cell.get("outputs") for cell in json.loads(failed.read_text())["cells"]]
    assert name in json.dumps(shown) and "secret7" not in json.dumps(shown)
    assert name in (runs / "runs.log").read_text()
    assert "secret7" not in (runs / "runs.log").read_text()


@pytest.fixture
def learned(home):
    """Record ids of a machine after a simulation, whose last verdict asks for a retraining."""
    text = ["simulate", "monica", "--patients", "300", "--quiet"]
    assert cli.main(text) == 0  # It runs two more notebooks: its last retraining and monitor run
    with Machine("monica", home) as machine:
        verdict = machine.monitor(fast=True)
        del verdict["seq"]
        machine.record_verdict({**verdict, "action": "retrain", "reason": "asked for"})
        return machine.table("records")["record_id"].tolist()


def texts(*folders):
    """Every file that travels: not the store, its snapshots, or the scores that were asked for."""
    for folder in folders:
        for path in folder.rglob("*"):
            own = path.name.startswith("store.") or path.parent.name == "snapshots"
            if path.is_file() and not own and path.name != "scores.csv":
                yield path, path.read_bytes().decode("latin-1")


def test_no_pipeline_log_or_model_names_a_patient_and_who_finds_one_again(
    learned, capsys, tmp_path
):
    file = tmp_path / "new.csv"
    rows = read_rows(load_study("monica")).tail(10).astype({"age": object})
    rows.iloc[0, rows.columns.get_loc("age")] = "old"
    rows.to_csv(file, index=False)
    for message in (
        ["retrain", "monica"],
        ["experiment", "monica", "--name", "t", "--families", "logistic", "--candidates", "2"],
        ["facts", "monica"],
        ["predict", "monica", str(file)],
    ):
        assert cli.main([*message, "--quiet"]) == 0
    output = capsys.readouterr()
    names, seen = Pseudonyms(settings().study_home("monica")), []
    for path, text in texts(settings().home, settings().reports):
        assert not re.findall(r"\bm\d{4}\b", text), path
        seen += re.findall(r"p(?:-[0-9a-z]{4}){3}", text)
    assert not re.findall(r"\bm\d{4}\b", output.out + output.err)
    flipped, refused = next(n for n in seen if n in map(names.of, learned)), rows.iloc[0, 0]
    assert names.of(refused) in seen and len(list(settings().runs.rglob("*.ipynb"))) == 7
    ran = {path.stem.partition("-")[0] for path in settings().runs.rglob("*.ipynb")}
    assert ran | {"prepare"} == {path.stem for path in PIPELINES}  # That has a test of its own
    assert cli.main(["reidentify", "monica", flipped]) == 0
    assert names.of(capsys.readouterr().out.strip()) == flipped
    assert cli.main(["audit", "monica", "--kind", "attempt", "--last", "1"]) == 0
    assert flipped in capsys.readouterr().out
    for wrong, word in ((refused, "is no pseudonym"), (names.of("absent"), "none of the patients")):
        assert cli.main(["reidentify", "monica", wrong]) == 2
        assert word in capsys.readouterr().err

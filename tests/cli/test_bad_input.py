"""What a user can get wrong, from end to end: one line, status 2, nothing lost or half-written."""

import json
import os
import shutil
import subprocess
import sys

import httpx
import pandas as pd
import pytest
from support.waiting import UNPROXIED

from lm.cli import cli
from lm.core.settings import find_root, settings
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.core.validation import RejectedRecord, check_row
from lm.machine.machine import Machine
from lm.serve.app import background
from lm.serve.client import token_for

STUDY = load_study("monica")
ROWS = read_rows(STUDY)[["record_id", "arrived", *STUDY.feature_names]].head(6)
EMPTY = dict.fromkeys(("records", "predictions", "outcomes", "decisions", "rejects"), 0)


def lm(*text, limit="unlimited", **variables):
    """The command in a process of its own, with files of at most `limit` KiB."""
    command = [sys.executable, "-m", "lm.cli.cli", *map(str, text)]
    return subprocess.run(
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "lm", *command],
        capture_output=True,
        text=True,
        cwd=find_root(),
        env={**os.environ, **variables},
    )


def one_line(text, *parts):
    """Whether stderr is one sentence that names every part."""
    assert text.startswith("lm: ") and text.count("\n") == 1, text
    assert "Traceback" not in text and "Error:" not in text.replace("TransactionContext Error:", "")
    for part in parts:
        assert part in text, (part, text)


def counts(home):
    with Machine(STUDY, home) as machine:
        return {k: v for k, v in machine.status()["counts"].items() if k in EMPTY}


# A file of patients


def written(tmp_path, change=lambda frame: frame):
    frame = change(ROWS.astype(object).copy())
    path = tmp_path / "new.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["new.csv is empty"]),
        (",".join(ROWS), ["new.csv has no rows"]),
        (ROWS.drop(columns="age").to_csv(index=False), ["new.csv lacks", "age"]),
    ],
    ids=["empty", "only a head", "without a column"],
)
def test_an_unusable_file_is_one_line_and_stores_nothing(home, tmp_path, capsys, text, parts):
    path = tmp_path / "new.csv"
    path.write_text(text)
    assert cli.main(["predict", "monica", str(path), "--quiet"]) == 2
    one_line(capsys.readouterr().err, *parts)
    assert counts(home) == EMPTY and not list(settings().runs.rglob("scores.csv"))


def spoiled(frame):
    """Four ways to be wrong, one right row, and one that comes twice."""
    frame.loc[0, "age"] = "sixty"
    frame.loc[1, "age"] = 340
    frame.loc[2, "sex"] = "x"
    frame.loc[3, "arrived"] = "yesterday"
    return pd.concat([frame.iloc[:5], frame.iloc[[4]]])


@pytest.mark.slow
def test_a_query_is_scored_like_a_file_and_parquet_is_written(home, tmp_path):
    path, out = tmp_path / "some.sql", tmp_path / "risks.parquet"
    path.write_text(f"SELECT * FROM '{STUDY.rows}' LIMIT 7")
    text = ["predict", "monica", str(path), "--output", str(out), "--quiet"]
    assert cli.main(text) == 2 and not out.exists()  # A file without a name
    assert cli.main([*text, "--reads", str(STUDY.rows)]) == 0
    assert len(pd.read_parquet(out)) == 7 and counts(home)["records"] == 7
    path.write_text("SELECT nothing FROM nowhere")
    assert cli.main(["predict", "monica", str(path), "--quiet"]) == 2
    assert counts(home)["records"] == 7


@pytest.mark.slow
def test_bad_rows_of_a_file_are_counted_named_and_stored(home, tmp_path, capsys):
    path, out = written(tmp_path, spoiled), tmp_path / "risks.csv"
    assert cli.main(["predict", "monica", str(path), "--output", str(out), "--quiet"]) == 0
    result = capsys.readouterr().out.split()
    assert result[result.index("rows") + 1] == "6" and result[result.index("refused") + 1] == "5"
    errors = pd.read_csv(out)["error"].dropna()
    for rule in ("age = 'sixty'", "age = '340'", "sex = 'x'", "arrived = 'yesterday'", "unique"):
        assert errors.str.contains(rule, regex=False).sum() == 1
    assert counts(home) == EMPTY | {"records": 1, "rejects": 5}
    with Machine(STUDY, home) as machine:
        stored = machine.table("rejects")
        assert stored["field"].tolist() == ["age", "age", "sex", "arrived", "record_id"]
        received = [json.loads(row) for row in stored["received"]]
        assert received[1]["age"] == "340" and received[0]["record_id"] == ROWS["record_id"][0]
        assert (stored["rule"].str.len() > 3).all() and (stored["kind"] == "record").all()
        assert machine.known()["record_id"].tolist() == [ROWS["record_id"][4]]


# A patient, an outcome, over HTTP


@pytest.fixture
def service(home):
    with (
        Machine(STUDY, home) as machine,
        background(machine) as url,
        httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {token_for(url)}"}, **UNPROXIED
        ) as http,
    ):
        yield machine, http


def sent(**over):
    row = ROWS.iloc[0].to_dict() | over
    return json.loads(json.dumps({"row": row}, default=str))


def test_a_bad_patient_gets_field_value_and_rule_and_is_stored(service):
    machine, http = service
    assert http.post("/v1/records", json=sent()).status_code == 200
    lacking = sent(record_id="b1")
    del lacking["row"]["age"]
    cases = [
        (lacking, "age", "the column must be present"),
        (sent(record_id="b2", age="sixty"), "age", "a number"),
        (sent(record_id="b3", age=340), "age", "18 to 110"),
        (sent(record_id="b4", sex="x"), "sex", "f, m"),
        (sent(record_id=""), "record_id", "a name"),
        (sent(age=19), "age", "taken"),
    ]
    for body, field, rule in cases:
        answer = http.post("/v1/records", json=body)
        payload = answer.json()
        assert (answer.status_code, payload["kind"], payload["field"]) == (
            422,
            "RejectedRecord",
            field,
        )
        assert (
            rule in payload["rule"] and field in payload["error"] and "\n" not in payload["error"]
        )
    stored = machine.table("rejects")
    received = [json.loads(row) for row in stored["received"]]
    assert received[:-1] == [body["row"] for body, _, _ in cases[:-1]] and received[-1]["age"] == 19
    assert stored["field"].tolist() == [field for _, field, _ in cases]
    assert machine.status()["counts"]["records"] == 1


@pytest.mark.parametrize("name", ["half \ud800", "\udfff", "a\ud83d"])
def test_a_name_with_half_a_character_is_refused_in_a_sentence_that_can_be_sent(home, name):
    row = ROWS.iloc[0].to_dict() | {"record_id": name}
    with pytest.raises(RejectedRecord) as caught:
        check_row(STUDY, row)
    error = caught.value
    assert error.field == "record_id" and "?" in error.record_id
    assert str(error).encode() and error.record_id.encode()
    assert check_row(STUDY, row | {"record_id": "Zo\u00eb \U0001f9ea"})["record_id"].startswith(
        "Zo"
    )
    with Machine(STUDY, home) as machine:
        result = machine.receive_many([row, ROWS.iloc[1].to_dict()], now=ROWS["arrived"][1])
        assert result["error"].ne("").tolist() == [False, True] and machine.verify() == []
        assert "record_id" in result["error"][1]


def test_an_outcome_for_no_user_or_before_its_record_is_refused_and_stored(service):
    machine, http = service
    name, came = ROWS["record_id"][0], ROWS["arrived"][0]
    http.post("/v1/records", json=sent() | {"now": str(came)})
    before, after = str(came - pd.Timedelta(days=2)), str(came + pd.Timedelta(days=9))
    outcome = {"record_id": name, "y": 1, "known_at": after, "event": None}
    cases = [
        (outcome | {"record_id": "absent"}, 404, "no such record"),
        (outcome | {"known_at": before}, 422, "before its record"),
        (outcome | {"event": before}, 422, "before its record"),
        (outcome | {"y": 2}, 422, "0 or 1"),
        (outcome | {"y": None}, 422, "0 or 1, or empty with followed_until"),
        (outcome | {"y": None, "followed_until": before}, 422, "followed_until ="),
        (outcome | {"y": None, "followed_until": after, "event": after}, 422, "event ="),
        (outcome | {"known_at": "soon"}, 422, "known_at = 'soon'"),
    ]
    for body, status, text in cases:
        answer = http.post("/v1/outcomes", json=body)
        assert answer.status_code == status and text in answer.json()["error"], answer.text
    stored = machine.table("rejects")
    assert [json.loads(row) for row in stored["received"]] == [body for body, _, _ in cases]
    assert (stored["kind"] == "outcome").all() and machine.status()["counts"]["outcomes"] == 0
    assert http.post("/v1/outcomes", json=outcome).status_code == 200
    assert machine.explain(name)["y"] == 1


# A study


MONICA = f'extends = "{(find_root() / "data" / "monica").as_posix()}"\n'.encode()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'title = "no end', ["study.toml cannot be read"]),
        (b"\xff\xfe\x00title", ["study.toml cannot be read"]),
        (b'title = "a ward"', ["study.toml lacks", "first_model"]),
        (b'extends = "."', ["extends itself"]),
        (MONICA + b'subgroups = ["ward"]', ["subgroups = ['ward'] must be"]),
        (MONICA + b"thresholds = [20]", ["thresholds = [20] must be risks"]),
        (MONICA + b'outcome.reported = "never"', ["outcome.reported = 'never' must be"]),
        (None, ["study.toml cannot be read"]),
    ],
    ids=[
        *("no TOML", "no text", "keys missing", "a circle"),
        *("subgroups", "thresholds", "reported", "a folder"),
    ],
)
def test_an_unreadable_study_is_one_line(home, tmp_path, monkeypatch, capsys, content, parts):
    monkeypatch.setenv("LM_DATA", str(tmp_path / "data"))
    file = tmp_path / "data" / "ward" / "study.toml"
    file.parent.mkdir(parents=True)
    file.mkdir() if content is None else file.write_bytes(content)
    for text in (["status", "ward"], ["trigger", "ward"], ["scheduler", "ward", "--once"]):
        assert cli.main(text) == 2
        one_line(capsys.readouterr().err, "ward", *parts)
    assert not list(home.rglob("*.duckdb"))


ROW_MISTAKES = {
    "not there": lambda path: path.unlink(),
    "no rows": lambda path: path.write_text(path.read_text().split("\n")[0]),
    "lacks age": lambda path: pd.read_csv(path).drop(columns="age").to_csv(path, index=False),
    "line 2: sex": lambda path: path.write_text(path.read_text().replace(",m,", ",man,", 1)),
    "is not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
}


@pytest.mark.parametrize("mistake", ROW_MISTAKES)
def test_an_unusable_table_of_a_study_is_one_line(home, tmp_path, monkeypatch, capsys, mistake):
    shutil.copytree(STUDY.folder, tmp_path / "data" / "ward")
    monkeypatch.setenv("LM_DATA", str(tmp_path / "data"))
    ROW_MISTAKES[mistake](tmp_path / "data" / "ward" / "rows.csv")
    assert cli.main(["trigger", "ward"]) == 2
    one_line(capsys.readouterr().err, "'ward'", mistake)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["snapshot", "monitor", "status"])
def test_a_time_that_is_none_is_one_line(capsys, verb):
    assert cli.main(["trigger", "monica"]) == 0
    quiet = ["--quiet"] if verb == "monitor" else []
    assert cli.main([verb, "monica", "--as-of", "soon", *quiet]) == 2
    one_line(capsys.readouterr().err, "soon", "a date such as")


# The place


HOLDER = "import sys; from lm.data.store import Store; from lm.core.study import load_study\n"
HOLDER += "store = Store(load_study('monica')); print('open', flush=True); sys.stdin.read()"


@pytest.mark.slow
def test_a_store_of_another_process_is_one_line(home, capsys):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER], cwd=find_root(), **pipes) as holder:
        assert holder.stdout.readline() == "open\n"
        assert cli.main(["trigger", "monica"]) == 2
        holder.stdin.close()
    one_line(capsys.readouterr().err, f"open in process {holder.pid}")
    assert counts(home) == EMPTY


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_try_goes_on(home):
    """Patients of before the first model come until the disk is full, and again with space."""
    full = lm("trigger", "monica", "--until", "1986-12-31", limit=120)
    assert full.returncode == 2 and not full.stdout
    one_line(full.stderr, "stored nothing of it", "too large")
    stored = counts(home)
    assert 20 < stored["records"] < 900 and stored["outcomes"] < stored["records"]
    assert stored["predictions"] == stored["rejects"] == 0
    with Machine(STUDY, home) as machine:
        names = machine.table("records")["record_id"].tolist()
    expected = read_rows(STUDY)["record_id"].tolist()
    came = iter(expected)
    assert all(name in came for name in names)  # In order; what was refused was not stored
    absent = [name for name in expected if name not in names]
    assert cli.main(["trigger", "monica", "--n", "3"]) == 0
    assert counts(home)["records"] == len(names) + 3
    with Machine(STUDY, home) as machine:
        assert machine.table("records")["record_id"].tolist() == names + absent[:3]


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_a_home_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_HOME", str(tmp_path / place))
    assert cli.main(["trigger", "monica"]) == 2
    result = "is a file" if place == "file" else "store of study 'monica' cannot be opened"
    one_line(capsys.readouterr().err, result, place)


@pytest.mark.parametrize("text", [["predict"], ["monitor"], ["simulate"]], ids=" ".join)
def test_reports_that_cannot_be_written_are_one_line(home, tmp_path, monkeypatch, capsys, text):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_REPORTS", str(tmp_path / "file"))
    file = [str(written(tmp_path))] if text == ["predict"] else []
    assert cli.main([*text, "monica", *file]) == 2
    one_line(capsys.readouterr().err, "file")
    assert counts(home) == EMPTY


def test_a_read_only_home_is_one_line_and_untouched(home, tmp_path):
    """As a user who may read but not write; root may write everywhere."""
    assert cli.main(["trigger", "monica", "--n", "2"]) == 0
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    code = "import os, sys; home = sys.argv[1]\nif os.geteuid() == 0: os.setuid(65534)\n"
    code += "from lm.cli.cli import main; sys.exit(main(['trigger', 'monica']))"
    folders = [home, *(p for p in home.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        text = [sys.executable, "-c", code, str(home)]
        ran = subprocess.run(text, capture_output=True, text=True, cwd=find_root())
    finally:
        for folder in folders:
            folder.chmod(0o755)
    if "setuid" in ran.stderr or "import" in ran.stderr:
        pytest.skip("no other user may run this Python here")
    assert (ran.returncode, ran.stdout) == (2, "")
    one_line(ran.stderr, "cannot be opened: Permission denied")
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before

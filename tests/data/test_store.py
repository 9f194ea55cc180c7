"""The store: durability, one owner, two clocks, snapshots, honest errors."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from support.paths import TESTS
from support.ward import DAY, HEAD, START, STUDY, answer, fill, lose, patient, reasons, run

from lm.core.errors import LMError
from lm.core.study import Feature
from lm.data.connection import StoreLocked
from lm.data.events import UPDATES
from lm.data.records import Duplicate, UnknownRecord
from lm.data.schema import as_json
from lm.data.snapshot import read_snapshot
from lm.data.store import Store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a ward's [x] folder"


@pytest.fixture
def store(folder):
    with Store(STUDY, folder) as opened:
        yield opened


# One owner


def test_second_opener_sees_who_holds_it(store, folder):
    store.records.append(patient(0), START)
    with pytest.raises(StoreLocked, match="open in this process"):
        Store(STUDY, folder)
    result = run(
        "try: Store(STUDY, folder)\nexcept LMError as e: print(type(e).__name__, e)", folder
    )
    assert (
        result.stdout.count("\n") == 1
        and f"StoreLocked store of study 'ward' is open in process {os.getpid()}" in result.stdout
    )
    store.records.append(patient(1), START)
    assert store.status.counts()["records"] == 2


def test_lock_survives_a_deleted_lock_file(store, folder):
    (folder / "store.lock").unlink()
    result = run(
        "try: Store(STUDY, folder)\nexcept LMError as e: print(type(e).__name__, e)", folder
    )
    assert result.stdout.startswith("StoreLocked")


def test_stale_pid_does_not_block(folder):
    folder.mkdir()
    (folder / "store.lock").write_text(f"{os.getpid()}\n1\nnonsense")
    with Store(STUDY, folder):
        assert (folder / "store.lock").read_text() == f"{os.getpid()}\n"
    with Store(STUDY, folder):
        pass


def test_kill_minus_nine_frees_the_lock(folder):
    code = "store = Store(STUDY, folder); print('open', flush=True); sys.stdin.read()"
    program = HEAD.format(tests=str(TESTS)) + code
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], **pipes) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked) as caught:
            Store(STUDY, folder)
        assert caught.value.pid == holder.pid
        holder.kill()
        holder.wait()
    Store(STUDY, folder).close()


def test_closed_store_says_so_and_closes_twice(folder):
    store = Store(STUDY, folder)
    store.close()
    store.close()
    with pytest.raises(LMError, match="is closed"):
        store.status.counts()


# Durability


WRITER = """
store = Store(STUDY, folder)
i = store.status.counts()["records"]
print("open", flush=True)
while True:
    row = patient(i)
    store.records.append(row, row["arrived"], "", answer(), reasons())
    store.outcomes.append(row["record_id"], 1, row["arrived"] + DAY)
    print(row["record_id"], flush=True)
    i += 1
"""


@pytest.mark.slow
def test_kill_minus_nine_mid_stream_loses_nothing(folder):
    program = HEAD.format(tests=str(TESTS)) + WRITER
    acknowledged, writes = [], random.Random(1)
    for _ in range(5):
        pipes = {"stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", program, str(folder)], **pipes) as writer:
            assert writer.stdout.readline() == "open\n"
            results = [writer.stdout.readline() for _ in range(writes.randint(5, 40))]
            writer.send_signal(signal.SIGKILL)  # In the midst of the next write
            lines = "".join([*results, writer.stdout.read()]).split("\n")
            acknowledged += [line for line in lines[:-1] if line]  # The last may be cut off
    assert len(acknowledged) >= 25
    with Store(STUDY, folder) as store:
        ids = {
            name: store.queries.table(name)["record_id"].tolist()
            for name in ("records", "predictions", "explanations", "outcomes")
        }
    assert set(acknowledged) <= set(ids["records"]) and set(acknowledged) <= set(ids["outcomes"])
    assert ids["records"] == ids["predictions"] == ids["explanations"]
    assert len(ids["records"]) <= len(acknowledged) + 5
    assert set(ids["outcomes"]) <= set(ids["records"])


def test_a_failure_half_way_leaves_nothing(store):
    with pytest.raises(LMError, match="stored nothing of it"):
        store.records.append(patient(0), START, "", answer(), reasons() | {"base": "no number"})
    with pytest.raises(LMError, match="explanations of 'p0' lacks order"):
        bad = reasons()
        del bad["order"]
        store.records.append(patient(0), START, "", answer(), bad)
    frame = pd.DataFrame([patient(1), patient(2)])
    risks = frame[["record_id"]].assign(**answer()).assign(version="one")
    with pytest.raises(LMError):
        store.records.append_many(frame, START, predictions=risks)
    assert set(store.status.counts().values()) == {0}
    store.records.append(patient(0), START, "", answer(), reasons())


@pytest.mark.slow
def test_eight_threads_lose_nothing(store):
    def work(k):
        for i in range(k * 100, k * 100 + 25):
            row = patient(i, START)
            store.records.append(row, START, f"thread {k}", answer(), reasons())
            store.outcomes.append(row["record_id"], 1, START)
            store.queries.as_of(START)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = store.status.counts()
    assert counts["records"] == counts["predictions"] == counts["explanations"] == 200
    assert store.queries.table("outcomes")["seq"].tolist() == list(range(1, 201))


def test_eight_threads_and_one_record_id(store):
    results = []

    def work():
        try:
            store.records.append(patient(7), START)
            results.append("stored")
        except Duplicate:
            results.append("duplicate")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["duplicate"] * 7 + ["stored"]


def test_disk_full_is_one_sentence_and_keeps_what_was_acknowledged(folder):
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(STUDY, folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
stored = 0
try:
    for i in range(5000):
        store.records.append(patient(i), START, "x" * 500, answer(), reasons())
        stored += 1
except LMError as error:
    print(stored); print(error)
try: store.snapshots.take(START); print("ok")
except LMError as error: print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(store.status.counts()["records"], store.status.counts()["predictions"])
store.records.append(patient(6000), START, "", answer(), reasons())
sys.stdout.flush()
os._exit(0)
"""
    result = run(code, folder)
    assert not result.stderr, result.stderr
    lines = result.stdout.splitlines()
    assert "stored nothing of it" in lines[1] and len(lines) == 4
    stored = int(lines[0])
    assert stored > 10 and lines[3] == f"{stored} {stored}"
    with Store(STUDY, folder) as store:
        expected = [f"p{i}" for i in range(stored)] + ["p6000"]
        assert store.queries.table("records")["record_id"].tolist() == expected
        assert store.queries.table("predictions")["record_id"].tolist() == expected


def test_snapshot_on_a_full_disk(folder):
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(STUDY, folder)
fill(store)
store.snapshots.take()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try: store.snapshots.take(START + 8 * DAY)
except LMError as error: print(error)
print(sorted(p.suffix for p in (folder / "snapshots").iterdir()))
"""
    result = run(code, folder)
    assert not result.stderr, result.stderr
    assert result.stdout.splitlines()[0].startswith("store of study 'ward' could not")
    assert result.stdout.splitlines()[1] == "['.parquet']"
    with Store(STUDY, folder) as store:
        assert store.status.counts()["records"] == 30


# Unusable places


def test_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LMError, match="cannot be opened: Not a directory"):
        Store(STUDY, tmp_path / "file" / "ward")


@pytest.mark.skipif(os.geteuid() != 0, reason="drops from root to nobody")
def test_read_only_folder():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        check_read_only(Path(place) / "ward")


def check_read_only(folder):
    with Store(STUDY, folder) as store:
        fill(store)
    code = """
try: os.setuid(65534)
except OSError: sys.exit("cannot")
try: Store(STUDY, folder)
except LMError as error: print(error)
"""
    result = run(code, folder)
    if "cannot" in result.stderr:
        pytest.skip("no other user here")
    assert "cannot be opened: Permission denied" in result.stdout and not result.stderr
    with Store(STUDY, folder) as store:
        assert store.status.counts()["records"] == 30


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_as_user(folder):
    folder.mkdir()
    folder.chmod(0o555)
    with pytest.raises(LMError, match="cannot be opened: Permission denied"):
        Store(STUDY, folder)


def test_damaged_file(folder):
    folder.mkdir()
    (folder / "store.duckdb").write_bytes(b"no database" * 5000)
    with pytest.raises(LMError, match="not a valid DuckDB database") as caught:
        Store(STUDY, folder)
    assert "\n" not in str(caught.value)
    assert (folder / "store.duckdb").read_bytes() == b"no database" * 5000
    (folder / "store.duckdb").unlink()
    Store(STUDY, folder).close()


def test_study_with_other_features(folder):
    with Store(STUDY, folder) as store:
        fill(store, 3)
    crp = Feature("crp", "number", "protein", "mg/l", 0.0, 500.0)
    with pytest.raises(LMError, match="changed or new: crp; changed or gone: age"):
        Store(replace(STUDY, features=(crp, *STUDY.features[1:])), folder)
    as_text = replace(STUDY.features[0], kind="level", levels=("a", "b"))
    with pytest.raises(LMError, match="changed or new: age; changed or gone: age"):
        Store(replace(STUDY, features=(as_text, *STUDY.features[1:])), folder)
    with Store(replace(STUDY, features=STUDY.features[::-1]), folder) as store:
        assert list(store.queries.as_of().columns[3:6]) == STUDY.feature_names[::-1]


# Values


def test_values_come_back_as_they_went(store):
    row = patient(
        1, START, age=np.float64("nan"), **{'grade "G" select': "'; DROP TABLE records; --"}
    )
    store.records.append(
        row,
        START,
        "s'ource",
        answer(3) | {"age": 51.0},
        reasons(),
        received={"a": np.nan, "b": [1]},
    )
    store.records.append(patient(2, START, **{"order": None, 'grade "G" select': None}), START)
    records, known = store.queries.table("records"), store.queries.as_of()
    assert json.loads(records["received"][0]) == {"a": None, "b": [1]}
    assert np.isnan(records["age"][0]) and records['grade "G" select'][0] == row['grade "G" select']
    assert known["age"].tolist() == [51.0, 52.0] and known["version"].tolist()[0] == 3
    assert (
        known["version"].isna()[1]
        and np.isnan(known["order"][1])
        and known['grade "G" select'].isna()[1]
    )
    assert known.dtypes.astype(str).to_dict() == {
        **{"record_id": "str", "arrived": "datetime64[us]", "known_at": "datetime64[us]"},
        **{"age": "float64", 'grade "G" select': "str", "order": "float64", "version": "Int64"},
        **{"predicted_at": "datetime64[us]", "y": "float64", "y_early": "float64"},
        **dict.fromkeys(("risk", "low", "high", "log_odds", "unlike"), "float64"),
        **dict.fromkeys(("y_known_at", "event", "followed_until", "competing"), "datetime64[us]"),
        **{"matured": "bool", "lost": "bool", "source": "str"},
    }


def test_types_do_not_depend_on_what_is_there(store):
    before = store.queries.as_of().dtypes
    tables = {name: store.queries.table(name).dtypes for name in store.status.counts()}
    fill(store, 12)
    now = START + 50 * DAY
    store.events.append_verdict(
        {
            "as_of": now,
            "action": "nothing",
            "version": 1,
            "window_from": START,
            "evidence": {"p": float("inf")},
        }
    )
    store.events.append_update({"as_of": "2020-02-01T00:00:00", "action": "first", "to_version": 1})
    store.decisions.append("p0", "Dr A", "agree", "", now)
    store.rejections.append(
        "record",
        None,
        "age",
        np.nan,
        "rule",
        "message",
        {
            "age": b"\xff",
            1: {
                2,
            },
        },
        now,
    )
    assert (store.queries.as_of().dtypes == before).all()
    for name, kinds in tables.items():
        assert (store.queries.table(name).dtypes == kinds).all(), name


def test_bulk_equals_one_by_one(store, tmp_path):
    fill(store, 20)
    rows = pd.DataFrame([patient(i) for i in range(20)])
    risks, why = (
        rows[["record_id"]].assign(**answer()),
        rows[["record_id"]].assign(version=1, **reasons()),
    )
    truth = store.queries.table("outcomes").drop(columns="seq")
    with Store(STUDY, tmp_path / "bulk") as other:
        other.records.append_many(rows, rows["arrived"], "test", risks, why)
        assert other.outcomes.append_many(truth) == (len(truth), [])
        for name in ("records", "predictions", "explanations", "outcomes"):
            pd.testing.assert_frame_equal(other.queries.table(name), store.queries.table(name))


# The user's mistakes


def refusal(**over):
    """Arguments of `add_reject`."""
    row = dict.fromkeys(("field", "value", "rule", "message"), "x")
    row |= {"kind": "record", "record_id": "p1", "received": {"age": 340}, "received_at": START}
    return row | over


def test_mistakes_are_sentences(store):
    fill(store, 3)
    counts = store.status.counts()
    rows = pd.DataFrame([patient(8), patient(0)])
    texts = {"as_of": START, "origin": "file", "file_sha256": ""}
    cases = [
        (Duplicate, "p1", lambda: store.records.append(patient(1), START)),
        (Duplicate, "'p0' is in", lambda: store.records.append_many(rows, START)),
        (Duplicate, "'p8' is in", lambda: store.records.append_many(rows.iloc[[0, 0]], START)),
        (
            LMError,
            "belong to its records",
            lambda: store.records.append_many(
                rows.head(1), START, predictions=pd.DataFrame([answer() | {"record_id": "p5"}])
            ),
        ),
        (
            LMError,
            "without a time",
            lambda: store.records.append_many(rows, pd.Series([START, pd.NaT])),
        ),
        (UnknownRecord, "no such record", lambda: store.outcomes.append("p99", 1, START)),
        (
            UnknownRecord,
            "no such record",
            lambda: store.decisions.append("p99", "x", "agree", "", START),
        ),
        (UnknownRecord, "no such record", lambda: store.outcomes.append(["p2"], 1, START)),
        (UnknownRecord, "no such record", lambda: store.outcomes.append({"a": 1}, 1, START)),
        (
            UnknownRecord,
            "no such record",
            lambda: store.decisions.append(["p2"], "x", "agree", "", START),
        ),
        (
            LMError,
            "kind 'letter'",
            lambda: store.rejections.append_many([refusal(), refusal(kind="letter")]),
        ),
        (LMError, "not before its record", lambda: store.outcomes.append("p2", 1, START)),
        (
            LMError,
            "before its record",
            lambda: store.outcomes.append("p2", 1, START + 9 * DAY, START),
        ),
        (
            LMError,
            "not before event of",
            lambda: store.outcomes.append("p2", 1, START + 3 * DAY, START + 4 * DAY),
        ),
        (
            LMError,
            "before its record",
            lambda: store.decisions.append("p2", "x", "agree", "", START),
        ),
        (LMError, "0 or 1", lambda: store.outcomes.append("p2", 2, START + 9 * DAY)),
        (LMError, "0 or 1", lambda: store.outcomes.append("p2", np.nan, START + 9 * DAY)),
        (LMError, "known_at", lambda: store.outcomes.append("p2", 1, pd.NaT)),
        (LMError, "0 or 1", lambda: store.outcomes.append("p2", None, START + 9 * DAY)),
        (LMError, "0 or 1", lambda: lose(store, 2, 5, y="")),
        (LMError, "known_at", lambda: lose(store, 2, 5, known_at=None)),
        (LMError, "followed_until = 'soon'", lambda: lose(store, 2, 5, followed_until="soon")),
        (LMError, "before the end of the horizon, 2020-01-13", lambda: lose(store, 2, 10)),
        (LMError, "not before its record of 2020-01-03", lambda: lose(store, 2, -1)),
        (
            LMError,
            "not before followed_until of",
            lambda: lose(store, 2, 5, known_at=START + 6 * DAY),
        ),
        (LMError, "empty where y is empty", lambda: lose(store, 2, 5, event=START + 6 * DAY)),
        (UnknownRecord, "no such record", lambda: lose(store, 99, 5)),
        (
            LMError,
            "agree, override",
            lambda: store.decisions.append("p2", "x", "maybe", "", START + 9 * DAY),
        ),
        (
            LMError,
            "first, keep",
            lambda: store.events.append_update({"as_of": START, "action": "better"}),
        ),
        (
            LMError,
            "unknown columns",
            lambda: store.events.append_verdict({"as_of": START, "action": "x", "why": 1}),
        ),
        (LMError, "as_of", lambda: store.events.append_verdict({"action": "nothing"})),
        (LMError, "settings lacks study, plan", lambda: store.events.append_settings(texts)),
        (
            LMError,
            "file, rollback",
            lambda: store.events.append_settings(
                texts | {"study": "", "plan": "", "origin": "hearsay"}
            ),
        ),
        (
            LMError,
            "is unknown: choose",
            lambda: store.queries.table("patients; DROP TABLE records"),
        ),
        (LMError, "no record_id", lambda: store.queries.table("updates", record_id="p1")),
        (LMError, "last = -1", lambda: store.queries.table("updates", last=-1)),
        (LMError, "as_of", lambda: store.queries.as_of("yesterday, maybe")),
        (
            LMError,
            "lack known_at",
            lambda: store.outcomes.append_many(pd.DataFrame({"record_id": [], "y": []})),
        ),
    ]
    for kind, text, mistake in cases:
        with pytest.raises(kind, match=text) as caught:
            mistake()
        assert "\n" not in str(caught.value)
    now = store.status.counts()  # The log grows as what waits is moved
    assert now | {"audit": 0} == counts | {"audit": 0}


def test_settings_and_every_kind_of_update_are_stored(store):
    texts = {"file_sha256": "ab", "study": "title = 'x'", "plan": ""}
    for number, origin in enumerate(("file", "rollback"), 1):
        day = START + number * DAY
        assert store.events.append_settings({"as_of": day, "origin": origin} | texts) == number
    assert store.queries.table("settings", as_of=START + DAY)["origin"].tolist() == ["file"]
    assert store.queries.table("settings").iloc[-1][list(texts)].to_dict() == texts
    for number, action in enumerate(UPDATES, 1):
        assert store.events.append_update({"as_of": START, "action": action}) == number


def test_good_outcomes_of_a_bad_file_are_stored(store):
    fill(store, 2)
    frame = pd.DataFrame(
        {"record_id": ["p0", "p7", 5, "p1"], "y": [1, 1, 1, None], "known_at": START + 20 * DAY}
    )
    accepted, refused = store.outcomes.append_many(frame)
    assert accepted == 1 and [row["record_id"] for row, _ in refused] == ["p7", 5, "p1"]
    assert store.queries.table("outcomes", last=1)["known_at"].item() == START + 20 * DAY


def test_names_that_are_no_text_are_unknown_records(store):
    fill(store, 2)
    names = ["p0", ["p1"], {"a": []}, 7, None]
    frame = pd.DataFrame({"record_id": names, "y": 1, "known_at": START + 20 * DAY})
    accepted, refused = store.outcomes.append_many(frame)
    assert accepted == 1 and [row["record_id"] for row, _ in refused] == names[1:]
    assert {type(error) for _, error in refused} == {UnknownRecord}


def test_refusals_of_a_batch_are_one_entry_of_the_log(store):
    assert store.rejections.append_many([]) == 0 and store.audit.head()[0] == 0
    one = store.rejections.append(**refusal(), source="ward")
    store.audit.head()  # Who asks moves what waits: one entry for each move
    rows = [refusal(record_id=f"p{n}", value=None if n else 3, field="\x00") for n in range(50)]
    assert (one, store.rejections.append_many(rows)) == (1, 51)
    stored = store.queries.table("rejects")
    assert stored["seq"].tolist() == list(range(1, 52)) and stored["record_id"].iloc[-1] == "p49"
    assert stored["source"].tolist() == ["ward"] + [""] * 50 and stored["value"].isna().sum() == 49
    assert stored["received"].unique().tolist() == ['{"age": 340}']
    assert store.queries.table("audit")["rows"].tolist() == [1, 50] and store.verify() == []


@pytest.mark.parametrize(
    "received",
    [
        {"record_id": "p1", "age": "9" * 10**6, "sex": "f"},
        {str(n): n for n in range(20_000)},
        ["x" * 10**5],
        '"\\\n' * 20_000,
        [{"a": "\x00" * 20_000}],
    ],
    ids=["long field", "many fields", "list", "escapes", "controls"],
)
def test_a_refusal_keeps_the_beginning_of_what_came(store, received):
    texts = dict.fromkeys(("record_id", "field", "value", "rule", "message"), "é" * 20_000)
    store.rejections.append(**refusal(received=received, **texts), source="y" * 20_000)
    stored = store.queries.table("rejects").iloc[0]
    assert all(
        len(stored[name]) == 10_000 and stored[name].endswith("…") for name in [*texts, "source"]
    )
    assert len(stored["received"]) <= 10_000 and "…" in stored["received"]
    payload = json.loads(stored["received"])
    if "age" in received:
        assert (
            payload["age"].startswith('"999')
            and payload["sex"] == "f"
            and list(payload) == list(received)
        )


def test_ten_thousand_characters_are_stored_whole(store):
    store.rejections.append(**refusal(received=["x" * 9_996], value="v" * 10_000))
    stored = store.queries.table("rejects").iloc[0]
    assert stored["received"] == json.dumps(["x" * 9_996]) and stored["value"] == "v" * 10_000


def test_halves_of_a_character_are_replaced_wherever_they_stand(store):
    half = "\ud800"
    assert json.loads(as_json({half: {half: [half]}})) == {"?": {"?": ["?"]}}
    store.rejections.append(
        **refusal(received={half: half}, field=half, record_id=half), source=half
    )
    store.audit.append("attempt", {half: 1}, half)
    stored = store.queries.table("rejects").iloc[0]
    assert json.loads(stored["received"]) == {"?": "?"} and stored["source"] == "?"
    assert store.verify() == []


# Two clocks


def naive(rows, outcomes, as_of):
    """What `known` must give for y and y_early, recomputed the slow way."""
    answers = {}
    for row in rows:
        if row["known_at"] > as_of:
            continue
        seen = [
            o for o in outcomes if o["record_id"] == row["record_id"] and o["known_at"] <= as_of
        ]
        last, due = seen[-1] if seen else {"y": None}, row["arrived"] + STUDY.horizon
        early = np.nan if last["y"] is None else float(last["y"])
        event, until, lost = pd.NaT, as_of, False
        if early == 1:
            event = until = last.get("event") or min(last["known_at"], due)
        elif early == 0:
            until = min(due, as_of)
        elif seen:
            until, lost = last["followed_until"], True
        answers[row["record_id"]] = {
            "arrived": row["arrived"],
            "known_at": row["known_at"],
            "y": early if due <= as_of else np.nan,
            "y_early": early,
            "y_known_at": last["known_at"] if early >= 0 else pd.NaT,
            "matured": due <= as_of,
            "event": event,
            "followed_until": until,
            "lost": lost,
            "source": row["record_id"][-1],
        }
    frame = pd.DataFrame.from_dict(answers, orient="index")
    if frame.empty:
        return frame
    frame = frame.rename_axis("record_id").reset_index()
    return frame.sort_values(["arrived", "record_id"], ignore_index=True)


def chance_outcome(rng, record_id, arrived, known_at):
    """An outcome of any kind: dated or undated event, survival, loss."""
    survived = known_at >= arrived + STUDY.horizon  # Not known earlier
    row = {"record_id": record_id, "known_at": known_at}
    row["y"] = [0 if survived else 1, 1, 1, None][rng.integers(0, 4)]
    latest = int(min((known_at - arrived).days, STUDY.horizon_days - 1))
    when = arrived + int(rng.integers(0, latest + 1)) * DAY
    if row["y"] is None:
        return row | {"followed_until": when}
    return row | {"event": when if row["y"] and rng.random() < 0.7 else None}


@pytest.mark.parametrize("seed", range(6))
def test_known_equals_the_naive_recomputation(folder, seed):
    rng = np.random.default_rng(seed)
    rows, outcomes = [], []
    for i in rng.permutation(25):
        arrived = START + pd.Timedelta(hours=int(rng.integers(0, 700)) // 24 * 24)
        rows.append(patient(i, arrived) | {"known_at": arrived + int(rng.integers(0, 6)) * DAY})
        for _ in range(rng.integers(0, 4)):
            late = pd.Timedelta(days=int(rng.integers(0, 25)))
            outcomes.append(chance_outcome(rng, f"p{i}", arrived, arrived + late))
    outcomes = [outcomes[k] for k in rng.permutation(len(outcomes))]
    with Store(STUDY, folder) as store:
        for row in rows:
            known_at = row["known_at"]
            prediction = answer() if rng.random() < 0.7 else None
            source, row = row["record_id"][-1], {k: v for k, v in row.items() if k != "known_at"}
            store.records.append(row, known_at, source, prediction)
        half = len(outcomes) // 2
        for outcome in outcomes[:half]:
            store.outcomes.append(**outcome)
        store.outcomes.append_many(pd.DataFrame(outcomes[half:]))
        assert store.clock.data_time() == max(e["known_at"] for e in rows + outcomes)
        for days in (0, 3, 9.5, 10, 17, 28, 40, 80):
            as_of = START + days * DAY
            seen, expected = store.queries.as_of(as_of), naive(rows, outcomes, as_of)
            if expected.empty:
                assert seen.empty
                continue
            pd.testing.assert_frame_equal(seen[expected.columns], expected, check_dtype=False)
            for column in ("known_at", "y_known_at", "predicted_at", "event", "followed_until"):
                assert not (seen[column] > as_of).any()
            for name in ("records", "predictions", "outcomes"):
                assert set(store.queries.table(name, as_of=as_of)["record_id"]) <= set(
                    seen["record_id"]
                ) | {o["record_id"] for o in outcomes}
        past, stored = store.queries.as_of(START + 40 * DAY), store.snapshots.take(START + 40 * DAY)
        pd.testing.assert_frame_equal(read_snapshot(stored["path"]), past)
        store.records.append(patient(100), START + 110 * DAY)
        for row in rows:
            later = START + int(rng.integers(41, 60)) * DAY
            store.outcomes.append(**chance_outcome(rng, row["record_id"], row["arrived"], later))
        pd.testing.assert_frame_equal(store.queries.as_of(START + 40 * DAY), past)
        assert store.snapshots.take(START + 40 * DAY)["id"] == stored["id"]
        assert not store.queries.as_of(START + 60 * DAY).head(25)["y_early"].equals(past["y_early"])


def test_clock_of_records_alone_and_of_nothing(store):
    assert store.clock.data_time() is None and store.queries.as_of().empty
    with pytest.raises(LMError, match="is empty"):
        store.snapshots.take()
    store.records.append(patient(3), START + 3 * DAY)
    assert store.clock.data_time() == START + 3 * DAY and len(store.queries.as_of()) == 1


def test_censored_and_early(store):
    fill(store)
    seen = store.queries.as_of(START + 12 * DAY).set_index("record_id")
    assert seen.loc["p0", ["y", "y_early"]].tolist() == [1.0, 1.0]
    assert np.isnan(seen.loc["p6", "y"]) and seen.loc["p6", "y_early"] == 1.0
    assert len(seen) == 13 and "p13" not in seen.index
    late = store.queries.as_of(START + 500 * DAY).set_index("record_id")
    assert (
        late["matured"].all()
        and np.isnan(late.loc["p4", "y"])
        and np.isnan(late.loc["p4", "y_early"])
    )


def test_a_loss_is_an_outcome_that_a_later_one_corrects(store):
    store.records.append(patient(1), START + DAY, "ward 3")
    lose(store, 1, 4, known_at=START + 7 * DAY)
    assert store.queries.has("p1", "outcomes") and store.clock.data_time() == START + 7 * DAY
    store.outcomes.append("p1", 1, START + 20 * DAY, event=START + 9 * DAY)
    moments = [START + n * DAY for n in (3, 7, 12, 20)]
    seen = pd.concat([store.queries.as_of(moment) for moment in moments])
    assert seen["lost"].tolist() == [False, True, True, False]
    days = (seen["followed_until"] - START).dt.days.tolist()
    assert days == [3, 5, 5, 9] and (seen["source"] == "ward 3").all()
    assert seen["event"].isna().tolist() == [True, True, True, False]
    assert seen["y_known_at"].isna().tolist() == [True, True, True, False]


def test_losses_come_in_a_table_with_the_others(store):
    fill(store, 3)
    due = START + 10 * DAY
    frame = pd.DataFrame(
        {
            "record_id": ["p0", "p1", "p2", "p0"],
            "y": [None, np.nan, 1.0, np.nan],
            "known_at": [due, due + DAY, due, due],
            "event": [pd.NaT, pd.NaT, START + 4 * DAY, START],
            "followed_until": [START + 2 * DAY, due + DAY, START + 4 * DAY, START],
        }
    )
    accepted, refused = store.outcomes.append_many(frame)
    assert accepted == 2 and [row["record_id"] for row, _ in refused] == ["p1", "p0"]
    table = store.queries.table("outcomes", last=2)
    assert table["y"].isna().tolist() == [True, False]
    assert table["followed_until"].isna().tolist() == [False, True]
    only = frame.head(1).astype({"y": "float64"})
    assert store.outcomes.append_many(only) == (1, []) and store.queries.as_of(due)["lost"][0]


def test_a_refusal_names_its_source(store):
    store.rejections.append("record", "p1", "age", 1, "rule", "message", {}, START, source="ward 3")
    store.rejections.append("outcome", None, "", "", "", "message", {}, START)
    assert store.queries.table("rejects")["source"].tolist() == ["ward 3", ""]


def test_explanations_and_predictions_as_of(store):
    fill(store, 10)
    assert len(store.queries.table("explanations", as_of=START + 4 * DAY)) == 5
    assert store.queries.table("records", last=2)["record_id"].tolist() == ["p8", "p9"]
    assert store.queries.table("explanations", record_id="p3")["base"].tolist() == [-2.0]
    assert store.queries.has("p3", "outcomes") and not store.queries.has("p4", "outcomes")


# Snapshots


@pytest.mark.slow
def test_snapshot_is_the_same_in_fresh_processes(tmp_path):
    code = "store = Store(STUDY, folder); fill(store)\n"
    code += "print(store.snapshots.take(START + 20 * DAY)['id'])"
    ids = [run(code, tmp_path / name).stdout.strip() for name in ("one", "two")]
    assert ids[0] == ids[1] and len(ids[0]) == 64


def test_snapshot_does_not_depend_on_the_order_of_arrival(tmp_path):
    rows = pd.DataFrame([patient(i) for i in range(20)])
    ids = set()
    for seed in (1, 2):
        mixed = rows.sample(frac=1, random_state=seed)
        with Store(STUDY, tmp_path / str(seed)) as store:
            store.records.append_many(mixed, mixed["arrived"])
            ids.add(store.snapshots.take()["id"])
    assert len(ids) == 1


def test_snapshot_twice_is_a_no_op_and_later_rows_do_not_touch_it(store, folder):
    fill(store)
    stored = store.snapshots.take(START + 20 * DAY)
    before = os.stat(stored["path"])
    store.records.append(patient(77), START + 77 * DAY)
    assert store.snapshots.take(START + 20 * DAY) == stored
    after = os.stat(stored["path"])
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [p.name for p in (folder / "snapshots").iterdir()] == [stored["id"] + ".parquet"]
    frame = read_snapshot(stored["path"])
    pd.testing.assert_frame_equal(frame, store.queries.as_of(START + 20 * DAY))
    assert stored["rows"] == len(frame) == 21 and stored["as_of"] == START + 20 * DAY


def test_a_snapshot_is_the_same_whatever_came_after_its_moment(store):
    for i in range(5):
        store.records.append(patient(i), START + i * DAY, "", answer())
    moment = START + 40 * DAY
    ids = [store.snapshots.take(moment)["id"]]
    store.records.append(patient(90), START + 90 * DAY)
    ids.append(store.snapshots.take(moment)["id"])
    store.outcomes.append("p1", 1, START + 50 * DAY)
    ids.append(store.snapshots.take(moment)["id"])
    lose(store, 2, 4, known_at=START + 60 * DAY)
    ids.append(store.snapshots.take(moment)["id"])
    assert len(set(ids)) == 1


def test_empty_snapshot_reads_back(store):
    stored = store.snapshots.take(START)
    pd.testing.assert_frame_equal(read_snapshot(stored["path"]), store.queries.as_of(START))


def test_damaged_or_absent_snapshot(store):
    fill(store, 3)
    path = Path(store.snapshots.take()["path"])
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(LMError, match="is damaged"):
        read_snapshot(path)
    with pytest.raises(LMError, match="cannot be read"):
        read_snapshot(path.with_name("absent.parquet"))


def test_half_a_snapshot_is_swept_away(folder):
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / "draft.tmp").write_bytes(b"half")
    with Store(STUDY, folder):
        assert not list((folder / "snapshots").iterdir())


def test_no_extension_is_fetched(store):
    query = "SELECT name, value FROM duckdb_settings() WHERE name LIKE 'auto%known_extensions'"
    assert {value for _, value in store.database.connection.execute(query).fetchall()} == {"false"}
    assert isinstance(store.database.connection, duckdb.DuckDBPyConnection)

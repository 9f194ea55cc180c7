"""Pipelines as batch jobs: parameters, locks, kernels, what is stored, cron's empty environment."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import nbformat
import numpy as np
import pyarrow as pa
import pytest
from support.waiting import PATIENCE, eventually

from lm.core.errors import Busy, LMError, NotFound
from lm.core.limits import OPEN, bounds
from lm.core.reader import _declared
from lm.core.serialization import from_arrow
from lm.core.settings import find_root, settings
from lm.jobs.jobs import Jobs
from lm.jobs.notebook_runner import check_parameters, read_parameters, run_notebook

CODE = nbformat.v4.new_code_cell
HEAD = (
    'study: str = "ward"\nn: int = 2\nrate: float = 0.5\nfast: bool = True\nend: str | None = None'
)
BODY = """from lm.jobs.notebook_runner import pipeline_record
print('n is', n)
pipeline_record(n=n, study=study)"""


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    for name in ("home", "reports"):
        monkeypatch.setenv(f"LM_{name.upper()}", str(tmp_path / name))
    return settings()


@pytest.fixture
def write(tmp_path):
    def write(*bodies, head=HEAD, name="ward", tags=("parameters",)):
        cells = [CODE(head, metadata={"tags": list(tags)}), *(CODE(body) for body in bodies)]
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write


def command(*text, **environment):
    env = {**os.environ, **environment}
    text = [sys.executable, "-m", "lm.cli.cli", *map(str, text)]
    return subprocess.run(text, capture_output=True, text=True, env=env, cwd=find_root())


# Tables as bytes


def stream(*tables):
    """An Arrow stream with a batch for each table."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, 2]]),
        pa.array([{"a": 1}]),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
        pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), pa.array([[1]])),
        pa.RunEndEncodedArray.from_arrays([1], ["a"]),
    ],
    ids=["list", "struct", "map", "words that are lists", "runs"],
)
def test_columns_that_hold_no_plain_values_are_refused(column):
    with pytest.raises(LMError, match="column 'odd' must hold plain values"):
        from_arrow(stream(pa.table({"record_id": ["a"], "odd": column})))


def test_columns_of_one_name_are_refused():
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["age", "age"])
    with pytest.raises(LMError, match="has 2 columns 'age'"):
        from_arrow(stream(table))
    text = pa.table({"word": pa.array(["a", None, "a"]).dictionary_encode()})
    assert from_arrow(stream(text))["word"].tolist()[::2] == ["a", "a"]


def test_rows_are_counted_batch_by_batch():
    tables = [pa.table({"n": pa.nulls(4000)})] * 3
    assert len(from_arrow(stream(*tables[:2]))) == 8000
    with pytest.raises(LMError, match="more than 10000 rows"):
        from_arrow(stream(*tables))
    assert len(from_arrow(stream(*tables), OPEN)) == 12_000
    full = stream(pa.table({"n": pa.nulls(10_000)}))
    assert len(from_arrow(full)) == 10_000 and len(full) < 1000


def packed(table, compression, **how):
    """An Arrow stream with compressed buffers."""
    sink, options = io.BytesIO(), pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, **how)
    return sink.getvalue()


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_stream_is_refused_by_its_length_before_it_is_unpacked(compression):
    text = pa.array(["a ward", "another ward", None] * 1000).dictionary_encode()
    small = pa.table({"x": [1.5] * 3000, "word": text, "yes": [True] * 3000})
    assert from_arrow(packed(small, compression)).equals(small.to_pandas())
    long = pa.table({"word": pa.array(["x" * 1000] * 9000)})
    decoded = bounds().decoded
    for how in ({}, {"max_chunksize": 1000}):
        body = packed(long, compression, **how)
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        with pytest.raises(LMError, match=f"unpacks to more than {decoded} bytes"):
            from_arrow(body)
        taken = pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken < 4 * len(body) + 2**18 < decoded / 10  # Other threads take a little too
        assert len(from_arrow(body, OPEN)) == 9000
    one = "x" * (decoded + 1)
    many = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), pa.array([one, "y"]))
    with pytest.raises(LMError, match="unpacks to more than"):
        from_arrow(packed(pa.table({"w": many}), compression))


def test_the_length_that_is_read_is_the_length_of_the_buffers():
    table = pa.table({"x": np.arange(1000.0), "word": ["ward"] * 1000})
    lengths = []
    for compression in (None, "zstd"):
        (head, rows) = pa.ipc.MessageReader.open_stream(packed(table, compression))
        assert _declared(head.metadata.to_pybytes(), b"") == (0, 0, False)
        count, length, grows = _declared(rows.metadata.to_pybytes(), rows.body)
        assert count == 1000 and not grows
        lengths.append(length)
    plainly, result = lengths
    assert plainly - 64 <= result <= plainly and plainly >= table.nbytes


def test_damaged_streams_are_one_sentence():
    body = packed(pa.table({"x": np.zeros(5000), "w": ["a"] * 5000}), "zstd")
    draw = random.Random(1)
    for _ in range(300):
        spoiled = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            spoiled[draw.randrange(len(body))] = draw.randrange(256)
        with contextlib.suppress(LMError):
            from_arrow(bytes(spoiled[: draw.choice([len(body), draw.randrange(len(body))])]))


def test_columns_of_nothing_are_counted_too():
    wide = pa.table({f"n{i}": pa.nulls(9000) for i in range(40)})
    with pytest.raises(LMError, match="9000 rows of 40 columns, more than 300000 values"):
        from_arrow(stream(wide))


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"m": 1}, "no parameter 'm'"),
        ({"n": "two"}, "type int"),
        ({"n": 1.5}, "type int"),
        ({"n": True}, "type int"),
        ({"rate": "nan"}, "type float"),
        ({"fast": "perhaps"}, "type bool"),
        ({"n": ""}, "type int"),
        ({"study": None}, "type str"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(write, places, inputs, word):
    with pytest.raises(LMError, match=word):
        run_notebook(write(BODY), inputs)
    assert not places.runs.exists()


def test_text_and_typed_values_mean_the_same(write):
    path = write(BODY)
    text = {"n": "3", "rate": "1", "fast": "no", "end": ""}
    typed = {"n": 3, "rate": 1.0, "fast": False, "end": None}
    assert check_parameters(path, text) == check_parameters(path, typed) == typed


def test_a_notebook_without_its_tag_or_not_a_notebook_is_refused(write, tmp_path):
    with pytest.raises(LMError, match="0 cells tagged"):
        read_parameters(write(BODY, tags=()))
    path = write(BODY)
    notebook = nbformat.read(path, 4)
    notebook.cells.insert(0, CODE("1"))
    nbformat.write(notebook, path)
    with pytest.raises(LMError, match="first code cell"):
        read_parameters(path)
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    with pytest.raises(LMError, match="readable"):
        read_parameters(tmp_path / "half.ipynb")
    with pytest.raises(NotFound):
        run_notebook("no_such_pipeline")


@pytest.mark.slow
def test_papermill_comes_without_a_grammar_that_takes_a_second():
    code = (
        "import sys; from lm.jobs.notebook_runner import _papermill; _papermill()\n"
        "import jsonschema, nbformat.v4 as v4, nbformat\n"
        "nbformat.validate(v4.new_notebook(cells=[v4.new_code_cell('1')]))\n"
        "assert not {'lark', 'rfc3987_syntax'} & set(sys.modules), 'the grammar was built'\n"
        "import rfc3987_syntax  # For others it is there\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_run_is_stored_logged_and_passes_on_what_it_prints(write, places):
    heard = io.StringIO()
    done = run_notebook(write(BODY), {"n": 7}, echo=heard)
    assert done["record"] == {"n": 7, "study": "ward"}
    assert heard.getvalue() == "n is 7\n"
    assert [p.name for p in done["output"].parent.glob("*.ipynb")] == [done["output"].name]
    line = json.loads((places.runs / "ward" / "runs.log").read_text())
    assert (line["state"], line["output"]) == ("done", done["output"].name)


def test_the_root_is_the_folder_and_the_kernel_is_this_python(write):
    body = (
        "import os, sys\nfrom lm.jobs.notebook_runner import pipeline_record\n"
        "pipeline_record(folder=os.getcwd(), python=sys.executable)"
    )
    assert run_notebook(write(body))["record"] == {
        "folder": str(find_root()),
        "python": sys.executable,
    }


def test_a_failing_cell_is_named_and_the_notebook_stored(write, places):
    with pytest.raises(LMError, match="cell 2 of 'ward' failed: ZeroDivisionError"):
        run_notebook(write("1 / 0"))
    names = [p.name for p in (places.runs / "ward").glob("*.ipynb")]
    assert len(names) == 1 and names[0].endswith(".failed.ipynb")


@pytest.mark.slow
def test_a_refused_row_in_a_notebook_is_one_sentence(write):
    body = (
        "from lm.core.validation import RejectedRecord\n"
        'raise RejectedRecord("m1", "age", 340, "18 to 110 years")'
    )
    with pytest.raises(LMError) as error:
        run_notebook(write(body))
    text = r"record 'p(-\w{4}){3}': age = 340 breaks the rule: 18 to 110 years"
    assert re.fullmatch(text, str(error.value))


@pytest.mark.slow
def test_a_kernel_that_dies_is_an_error_not_a_hang(write):
    with pytest.raises(LMError, match="kernel"):
        run_notebook(write("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))


@pytest.mark.slow
def test_a_second_run_of_the_same_study_stops_at_once_another_study_runs(write, tmp_path):
    body = (
        "import pathlib, time\nif study == 'ward':\n"
        f"    place = pathlib.Path({str(tmp_path)!r})\n    (place / 'begun').touch()\n"
        "    while not (place / 'go').exists():\n        time.sleep(0.05)"
    )
    path = write(body)
    first = threading.Thread(target=run_notebook, args=(path, {}))
    first.start()
    eventually((tmp_path / "begun").exists)
    with pytest.raises(Busy, match="ward on ward is already running"):
        run_notebook(path, {})
    second = command("run", path)
    assert second.returncode == 75 and second.stderr.count("\n") == 1
    assert run_notebook(path, {"study": "other"})["record"] == {}
    (tmp_path / "go").touch()
    first.join()


@pytest.mark.slow
def test_from_crons_empty_environment_and_past_a_users_own_kernel(write, places, tmp_path):
    kernel = tmp_path / "me" / ".local" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "mine", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    path = write(BODY)
    for home in ([], [f"HOME={tmp_path / 'me'}"]):
        text = ["env", "-i", "PATH=/usr/bin:/bin", *home, f"LM_REPORTS={places.reports}"]
        text += [sys.executable, "-m", "lm.cli.cli", "run", str(path), "--json", "-p", "n", "5"]
        ran = subprocess.run(text, capture_output=True, text=True, cwd=find_root())
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["record"]["n"] == 5
        assert ran.stderr == "n is 5\n"


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_takes_its_kernel_along_and_is_stored(write, places, tmp_path, sign, status):
    pid = tmp_path / "pid"
    body = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
    text = [sys.executable, "-m", "lm.cli.cli", "run", str(write(body + "time.sleep(3600)"))]
    listens = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # As a terminal
    options = {"cwd": find_root(), "stderr": subprocess.PIPE, "text": True} | listens
    process = subprocess.Popen(text, **options)
    eventually(lambda: pid.exists() and pid.read_text())
    process.send_signal(sign)
    _, result = process.communicate(timeout=PATIENCE)
    assert process.returncode == status
    assert "Traceback" not in result
    eventually(lambda: not alive(int(pid.read_text())))
    assert [p.name.split(".", 1)[1] for p in (places.runs / "ward").glob("*.ipynb")] == [
        "failed.ipynb"
    ]


@pytest.mark.slow
def test_a_job_runs_ends_fails_and_is_stopped(write, tmp_path):
    jobs = Jobs(tmp_path / "jobs", limit=2)
    good = jobs.start(str(write(BODY, name="good")), {"n": 4})["job"]
    bad = jobs.start(str(write("1 / 0", name="bad")), {})["job"]
    with pytest.raises(Busy):
        jobs.start(str(write(BODY, name="third")), {})
    eventually(lambda: "running" not in {jobs.report(good)["state"], jobs.report(bad)["state"]})
    ended = jobs.report(good)
    assert (ended["state"], ended["record"]["n"]) == ("done", 4)
    assert ended["log"] == "n is 4" and Path(ended["output"]).is_file()
    assert jobs.states() == {"waiting": 0, "running": 0, "done": 1, "failed": 1}
    assert jobs.report(bad)["state"] == "failed" and "ZeroDivisionError" in jobs.report(bad)["log"]
    body = f"import pathlib, time\npathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
    body += "time.sleep(3600)"
    slow = jobs.start(str(write(body, name="slow")), {})["job"]
    eventually((tmp_path / "begun").exists)
    assert jobs.states() == {"waiting": 0, "running": 1, "done": 1, "failed": 1}
    jobs.close()
    assert jobs.states()["failed"] == 2
    assert jobs.report(slow)["state"] == "lost"


SLOW = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(3600)"


@pytest.mark.slow
def test_a_job_tells_how_far_it_is_and_is_cancelled_with_its_kernel(write, tmp_path):
    path = write("1 + 1", SLOW, "2 + 2", name="slow")
    page = nbformat.read(path, 4)
    for at, text in ((3, "## Never"), (2, "## The long part\n\nIt takes long."), (0, "# Slow")):
        page.cells.insert(at, nbformat.v4.new_markdown_cell(text))
    nbformat.write(page, path)
    jobs = Jobs(tmp_path / "jobs")
    job = jobs.start(str(path), {})["job"]
    eventually(lambda: (tmp_path / "jobs" / f"{job}.log").read_text().strip().isdecimal())
    how = jobs.report(job)
    assert how["state"] == "running" and how["record"] == {} and how["output"] is None
    assert how["progress"] == {"cells": 4, "done": 2, "section": "The long part"}
    kernel = int(how["log"])
    os.kill(kernel, 0)
    ended = jobs.cancel(job)
    assert ended["state"] == jobs.report(job)["state"] == jobs.cancel(job)["state"] == "cancelled"
    assert ended["progress"]["done"] < 4 and Jobs(tmp_path / "jobs").report(job) == ended
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    assert jobs.states() == {"waiting": 0, "running": 0, "done": 0, "failed": 0}
    for no_one in ("slow-1", "../jobs/x", "", job + ".json"):
        with pytest.raises(NotFound):
            jobs.cancel(no_one)


DIES = """
import sys, time
from pathlib import Path
from lm.jobs.jobs import Jobs
jobs = Jobs(Path(sys.argv[1]))
print(*(jobs.start(path, {})["job"] for path in sys.argv[2:]), flush=True)
time.sleep(3600)
"""


@pytest.mark.slow
def test_jobs_are_known_after_the_service_was_killed(write, tmp_path):
    silent = BODY.replace("print('n is', n)", "")
    paths = [str(write(silent, name="good")), str(write("1 / 0", name="bad"))]
    paths.append(str(write(SLOW, name="slow")))
    text = [sys.executable, "-c", DIES, str(tmp_path / "jobs"), *paths]
    service = subprocess.Popen(text, stdout=subprocess.PIPE, text=True)
    good, bad, slow = service.stdout.readline().split()
    service.kill()
    service.communicate()
    jobs = Jobs(tmp_path / "jobs", limit=1)
    eventually(lambda: jobs.report(good)["state"] != "running" != jobs.report(bad)["state"])
    assert (jobs.report(good)["state"], jobs.report(good)["record"]["n"]) == ("done", 2)
    assert jobs.report(bad)["state"] == "failed" and "ZeroDivisionError" in jobs.report(bad)["log"]
    eventually(lambda: jobs.report(slow)["log"].isdecimal())
    assert jobs.report(slow)["state"] == "running" and jobs.states()["running"] == 1
    with pytest.raises(Busy, match="1 jobs are running"):
        jobs.start(paths[0], {})
    pid = json.loads((tmp_path / "jobs" / f"{slow}.json").read_text())["pid"]
    os.killpg(pid, signal.SIGKILL)  # Its kernel ends by itself once the parent is gone
    eventually(lambda: jobs.report(slow)["state"] != "running")
    assert jobs.report(slow)["state"] == "lost" and jobs.states()["failed"] == 2
    assert jobs.cancel(slow)["state"] == Jobs(tmp_path / "jobs").report(slow)["state"] == "lost"


@pytest.mark.slow
def test_a_job_of_a_killed_service_can_be_cancelled_by_the_next(write, tmp_path):
    text = [sys.executable, "-c", DIES, str(tmp_path / "jobs"), str(write(SLOW, name="slow"))]
    service = subprocess.Popen(text, stdout=subprocess.PIPE, text=True)
    slow = service.stdout.readline().strip()
    service.kill()
    service.communicate()
    jobs = Jobs(tmp_path / "jobs")
    kernel = int(eventually(lambda: jobs.report(slow)["log"]))
    assert jobs.cancel(slow)["state"] == "cancelled"
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)

"""A job's kernel holds no secret, reaches its own files and its own service, and has limits."""

import json
import os
import socket

import pytest
from support.long import LONG
from support.waiting import eventually

import lm.jobs.notebook_runner
from lm.core.errors import LMError
from lm.core.settings import find_root, settings
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.jobs.confine import job_limits, job_token, landlock, plain_environment
from lm.jobs.notebook_runner import CONFINED_PIPELINES, run_notebook
from lm.machine.machine import Machine
from lm.model.predict import fit
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client, token_for
from lm.update.ladder import RUNGS

BOOK = {"metadata": {}, "nbformat": 4, "nbformat_minor": 4}
CELL = {"cell_type": "code", "execution_count": None, "outputs": []}
ATTACKS = """
import os, pathlib, resource, socket, subprocess, sys
from lm.serve.client import connect
from lm.jobs.confine import job_token
from lm.serve.local import local_token
from lm.jobs.notebook_runner import pipeline_record

home = pathlib.Path(os.environ["LM_HOME"])
own = home / "monica"
tries = {
    "tokens": lambda: (own / "tokens.json").read_text(),
    "store": lambda: (own / "store.duckdb").read_bytes(),
    "journal": lambda: [p.read_bytes() for p in own.glob("journal*")][0],
    "canary": lambda: pathlib.Path(CANARY).read_text(),
    "canary by another program": lambda: subprocess.run(["cat", CANARY], check=True),
    "neighbours": lambda: os.listdir(pathlib.Path(CANARY).parent),
    "home of the runner": lambda: os.listdir(HOME),
    "shadow": lambda: open("/etc/shadow").read(),
    "environment of the service": lambda: open(f"/proc/{SERVICE}/environ").read(),
    "memory of the service": lambda: open(f"/proc/{SERVICE}/mem", "rb").read(1),
    "files of the service": lambda: os.readlink(f"/proc/{SERVICE}/fd/0"),
    "signal to the service": lambda: os.kill(SERVICE, 0),
    "a pipeline": lambda: open("nbs/pipelines/canary.ipynb", "w"),
    "the library": lambda: open("lm/canary.py", "w"),
    "the study": lambda: open("data/monica/canary", "w"),
    "state": lambda: open(own / "canary", "w"),
    "a link out": lambda: (os.link(own / "tokens.json", own / "registry/t")),
    "a symbolic link": lambda: os.symlink(CANARY, own / "registry/canary"),
    "another port": lambda: socket.create_connection(("127.0.0.1", PORT), 1),
    "an abstract socket": lambda: socket.socket(socket.AF_UNIX).connect("\\0lm-canary"),
    "a higher limit": lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**60, 2**60)),
    "a core file": lambda: 1 / resource.getrlimit(resource.RLIMIT_CORE)[1],
    "another user": lambda: os.setuid(0) if os.getuid() else 1 / 0,
    "the service's token": lambda: [local_token(json.loads(
        (own / "service.json").read_text())["socket"]) or 1 / 0],
    "its entry": lambda: list(pathlib.Path(os.environ["TMPDIR"]).glob("entry*"))[0],
}
open_ = []
for name, act in tries.items():
    try:
        act()
        open_.append(name)
    except (OSError, ValueError, IndexError, ZeroDivisionError, subprocess.CalledProcessError):
        pass
"""
LAST = """
with connect("monica") as machine:
    seen = machine.status()["study"]
everything = " ".join([*os.environ.values(), *sys.argv, open("/proc/self/environ").read()])
pipeline_record(open=open_, seen=seen, token=job_token(), leaked="lm-secret" in everything)
"""


def notebook(folder, name, *sources):
    """A notebook whose first cell holds the parameters."""
    first = CELL | {"metadata": {"tags": ["parameters"]}, "source": sources[0]}
    cells = [first, *(CELL | {"metadata": {}, "source": source} for source in sources[1:])]
    (folder / f"{name}.ipynb").write_text(json.dumps(BOOK | {"cells": cells}))
    return folder / f"{name}.ipynb"


def test_the_environment_of_a_kernel_is_a_list(monkeypatch):
    inputs = {"PATH": "/bin", "LM_HOME": "/h", "OMP_NUM_THREADS": "1", "LC_CTYPE": "C.UTF-8"}
    secret = dict.fromkeys(["LM_TOKEN", "LM_DASHBOARD_TOKEN", "AWS_SECRET", "PGPASSWORD"], "x")
    assert plain_environment(inputs | secret) == inputs


@pytest.mark.slow
@pytest.mark.skipif(landlock() < 4, reason="this system cannot confine files and ports")
def test_a_job_reaches_its_own_files_and_its_own_service(tmp_path, monkeypatch):
    shipped = tmp_path / "pipelines"
    shipped.mkdir()
    (tmp_path / "canary.txt").write_text("CANARY")
    for name in ("LM_TOKEN", "LM_DASHBOARD_TOKEN", "SMTP_PASSWORD"):
        monkeypatch.setenv(name, "lm-secret")
    monkeypatch.setattr(lm.jobs.notebook_runner, "shipped_folder", lambda name: shipped)
    with (
        Machine("monica") as machine,
        background(machine) as url,
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0lm-canary")
        abstract.listen()
        facts = {"CANARY": str(tmp_path / "canary.txt"), "HOME": os.path.expanduser("~")}
        facts |= {"SERVICE": os.getpid(), "PORT": other.getsockname()[1]}
        consts = "\n".join(f"{name} = {value!r}" for name, value in facts.items())
        notebook(shipped, "monitor", 'study = "monica"', "import json\n" + consts, ATTACKS, LAST)
        token = token_for(url)
        seen = run_notebook("monitor", {}, token=token)["record"]
    assert seen == {"open": [], "seen": "monica", "token": token, "leaked": False}
    assert url and job_token() == ""
    left = [p for p in find_root().rglob("canary*") if ".venv" not in p.parts]
    assert left == [] and not (settings().study_home("monica") / "canary").exists()


@pytest.mark.skipif(landlock() < 4, reason="this system cannot confine files and ports")
@pytest.mark.skipif(not LONG, reason="half a minute each")
@pytest.mark.parametrize("user", [None, ""])
def test_a_confined_retraining_registers_a_version_that_the_service_adopts(monkeypatch, user):
    """Over HTTP, whole: grant, kernel, snapshot, registry, update, the service's own gate."""
    if user is not None:
        monkeypatch.setenv("LM_JOB_USER", user)
    study = load_study("monica")
    rows = read_rows(study)
    before = rows["arrived"] < study.first_model
    model, came = fit(study, rows[before]), rows.head(before.sum() + 1500)
    with Machine(study) as machine:
        machine.registry.register(model.recalibrated(0.5), {}, {}, {}, "for the test")
        first = {"as_of": study.first_model, "action": "first", "reason": "first model"}
        machine.adopt(first | {"from_version": None, "to_version": 1})
        machine.receive_many(came, source="history", on_arrival=True)
        machine.add_outcomes(came.loc[came["known_at"] <= machine.now()])
        verdict = machine.monitor(fast=True)
        assert verdict["action"] in ("recalibrate", "retrain"), verdict["reason"]
        with background(machine) as url:
            client = Client(
                url, token=Tokens(machine.store.folder).create("dana", "data scientist")
            )
            job = client.run("retrain", {})["job"]
            eventually(lambda: client.job(job)["state"] not in ("waiting", "running"), 0.1)
            done = client.job(job)
        assert done["state"] == "done", done["log"]
        assert done["record"]["version"] == 2 and machine.registry.load(2)
        last = machine.table("updates").iloc[-1]
        assert last["action"] in (*RUNGS, "wait"), done["record"]["reason"]
        doubts = last["reason"].split("the registered model, ")[1:]
        assert not [doubt for doubt in doubts if not doubt.startswith("flips")], doubts
        stored = json.loads(last["evidence"])
        assert stored["by"].startswith("job retrain-") and stored["by"].endswith(" of dana")
        assert stored["gates"][-1]["passed"]
        swapped = last["action"] != "wait"
        assert machine.status()["champion"] == (2 if swapped else 1)
        assert machine.verify() == []


@pytest.mark.slow
def test_a_kernel_has_limits_of_memory_and_time(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JOB_MEMORY", "0.7")
    greedy = notebook(tmp_path, "greedy", "n = 2", "x = bytearray(n * 2**30)")
    with pytest.raises(LMError, match="MemoryError"):
        run_notebook(greedy)
    monkeypatch.setenv("LM_JOB_MINUTES", "0.1")
    slow = notebook(tmp_path, "slow", "n = 2", "while True:\n    pass")
    with pytest.raises(LMError, match="'slow' ran longer than"):
        run_notebook(slow)
    for wrong in ("0", "-1", "soon", "inf", "nan"):
        monkeypatch.setenv("LM_JOB_MINUTES", wrong)
        with pytest.raises(LMError, match="LM_JOB_MINUTES"):
            job_limits()


def test_the_confined_are_the_jobs_of_the_table():
    from lm.serve.job_requests import JOBS

    assert set(CONFINED_PIPELINES) == set(JOBS)

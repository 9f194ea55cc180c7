"""Every test has a machine of its own: an empty LM_HOME and LM_REPORTS in a temporary folder."""

import inspect
import os
import shutil
import tempfile
import types
from pathlib import Path

import hypothesis
import pytest

LONG = ("browser_scientist", "simulate", "installation", "browser_clinician")
LONG += ("browser_all_pages", "browser_patients", "benchmarks", "reliability_benchmark")
LONG += ("pseudonyms", "verdict", "machine", "limits", "unapproved_changes")
LONG += ("file_permissions", "corrections", "fuzzed_requests", "connections", "backup")
LONG += ("notebook_runner", "registry", "crash_recovery", "reproducibility", "decide")
LONG += ("reverse_proxy", "same_risk_everywhere", "model_families")


def use(folder):
    """The variables of a machine that lives in `folder`."""
    return {"LM_HOME": str(folder / "state"), "LM_REPORTS": str(folder / "reports")}


def pytest_configure(config):
    config.shared = Path(tempfile.mkdtemp(prefix="lm-tests-"))
    os.environ.update(use(config.shared), DO_NOT_TRACK="1", MLFLOW_DISABLE_TELEMETRY="true")
    os.environ["LM_AHEAD"] = "0"  # Kernels of pages that nobody opens cost seconds
    os.environ.pop("LM_DATA", None)
    slow = [hypothesis.HealthCheck.too_slow]  # A busy computer is no failure
    hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("busy")


def pytest_unconfigure(config):
    shutil.rmtree(config.shared, ignore_errors=True)


def unit(path):
    """Tests of one file run in one process."""
    return Path(path).stem.removeprefix("test_")


def names_used(function, seen):
    """Names in the code of a function and of the functions of its module that it calls."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or code in seen:
        return set()
    seen.add(code)
    names = set(code.co_names)
    for inner in (c for c in code.co_consts if isinstance(c, types.CodeType)):
        names |= set(inner.co_names)
    called = (function.__globals__.get(name) for name in names)
    local = [f for f in called if getattr(f, "__module__", "") == function.__module__]
    return names.union(*(names_used(f, seen) for f in local if inspect.isfunction(f)))


def starts_service(item):
    """Whether a test or one of its fixtures starts a service."""
    fixtures = [d.func for group in item._fixtureinfo.name2fixturedefs.values() for d in group]
    return any("background" in names_used(f, set()) for f in (item.function, *fixtures))


def pytest_collection_modifyitems(items):
    """Mark what needs a browser or a service; long files come first, to end at the same time."""
    for item in items:
        if Path(item.path).parent.name == "browser":
            item.add_marker("browser")
        if starts_service(item):
            item.add_marker("service")
    items.sort(key=lambda item: (*LONG, unit(item.path)).index(unit(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n 2` each unit goes whole to one of two processes, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return unit(nodeid.split("::")[0])

    config.option.loadscopereorder = False
    return ByUnit(config, log)


@pytest.fixture(scope="session", autouse=True)
def empty_registry(pytestconfig):
    """MLflow needs most of a second for its empty tables: made once a process, then copied."""
    from filelock import FileLock

    from lm.model import mlflow_tables

    make, empty = mlflow_tables.create_tables, pytestconfig.shared / "empty" / "mlflow.db"

    def copied(file):
        make(empty)  # Does nothing the second time
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent / "mlflow.lock"):
            if not file.exists():
                new = file.with_name("mlflow.new.db")
                shutil.copyfile(empty, new)
                new.replace(file)

    mlflow_tables.create_tables = copied
    yield
    mlflow_tables.create_tables = make


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """LM_HOME of this test alone, empty."""
    for name, value in use(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "state"

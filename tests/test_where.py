"""Where it runs: an installed wheel, other projects, odd users, folders and variables."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lm.settings import find_root, settings

ROOT = find_root()
BARE = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def lm(*words, cwd=ROOT, before=(), python=sys.executable, **variables):
    """The command in an environment that holds only these variables."""
    command = [*before, str(python), "-m", "lm.cli", *map(str, words)]
    how = {"capture_output": True, "text": True, "cwd": cwd}
    return subprocess.run(command, env=BARE | variables, **how)


def one_line(ran, *parts):
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert ran.stderr.startswith("lm: ") and ran.stderr.count("\n") == 1, ran.stderr
    for part in parts:
        assert str(part) in ran.stderr, (part, ran.stderr)


# An installed wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python of an environment with our wheel and the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    uv, env = [sys.executable, "-m", "uv"], folder / "env"
    build = ["build", "--wheel", "--offline", "--no-build-isolation", "--no-cache"]
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "settings.ini", "lm", "nbs", "data"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run([*uv, *build, "--out-dir", folder, source], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (packages,) = env.glob("lib/python3*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    install = ["pip", "install", "--offline", "--no-deps", "--python", env / "bin" / "python"]
    subprocess.run([*uv, *install, wheel], check=True, capture_output=True)
    subprocess.run(["rm", "-r", source], check=True)
    return env / "bin" / "python"


def test_a_wheel_runs_a_pipeline_in_an_empty_folder(installed, tmp_path):
    how = {"cwd": tmp_path, "python": installed}
    assert "rotterdam_5y" in lm("studies", **how).stdout
    assert lm("trigger", "monica", "--n", 3, **how).returncode == 0
    ran = lm("monitor", "monica", "--quiet", **how)
    assert ran.returncode == 0, ran.stderr
    assert "nothing" in ran.stdout
    assert list((tmp_path / "reports" / "runs" / "monica").glob("monitor-*.ipynb"))
    assert (tmp_path / "state" / "monica" / "store.duckdb").is_file()


def test_a_wheel_has_every_pipeline_and_page_and_says_what_it_has_not(installed, tmp_path):
    code = """if True:
        import json, lm, pathlib
        from lm.panels import voila_command
        from lm.pipeline import find_notebook
        from lm.settings import shipped
        names = [p.stem for p in shipped("nbs/pipelines").glob("*.ipynb")]
        found = [str(find_notebook(name)) for name in names] + [voila_command(1)[3]]
        print(json.dumps([lm.__file__, sorted(names), found]))"""
    how = {"cwd": tmp_path, "env": BARE, "capture_output": True, "text": True}
    ran = subprocess.run([str(installed), "-c", code], **how)
    package, names, found = json.loads(ran.stdout)
    package = Path(package).parent
    assert not package.is_relative_to(ROOT)
    assert names == sorted(path.stem for path in (ROOT / "nbs" / "pipelines").glob("*.ipynb"))
    assert all(Path(path).is_relative_to(package) for path in found)
    for verb in ("results", "benchmarks"):
        one_line(lm(verb, cwd=tmp_path, python=installed), "in a clone")


def test_studies_of_ones_own_folder_come_before_those_of_the_wheel(installed, tmp_path):
    study = tmp_path / "data" / "ward"
    study.mkdir(parents=True)
    text = (ROOT / "data" / "monica" / "study.toml").read_text(encoding="utf-8")
    (study / "study.toml").write_text(text, encoding="utf-8")
    assert lm("studies", cwd=tmp_path, python=installed).stdout.split()[2] == "ward"


# The root


def test_another_nbdev_project_is_not_taken_for_the_compendium(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    inside = tmp_path / "nbs" / "deep"
    inside.mkdir()
    for text in ("", "[DEFAULT]\nlib_name = mine\n", "lib_name = lmx\n", "# lib_name = lm\n"):
        (tmp_path / "settings.ini").write_text(text)
        assert find_root(inside) == ROOT
    (tmp_path / "settings.ini").write_bytes(b"\xff\xfe\nlib_name=lm\n")
    assert find_root(inside) == tmp_path
    (tmp_path / "settings.ini").unlink()
    (tmp_path / "settings.ini").mkdir()
    assert find_root(inside) == ROOT
    monkeypatch.chdir(inside)
    monkeypatch.delenv("LM_DATA", raising=False)
    assert settings().data == ROOT / "data"


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd())\n"
    code += "from lm.cli import main; sys.exit(main(['studies']))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": gone, "env": BARE | {"PYTHONPATH": str(ROOT)}},
        **{"capture_output": True, "text": True},
    )
    one_line(ran, "current folder does not exist")

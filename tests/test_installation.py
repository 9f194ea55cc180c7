"""Where it runs: an installed wheel, other projects, odd users, folders and variables."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lm.core.settings import find_root, settings

ROOT = find_root()
BARE = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def lm(*text, cwd=ROOT, before=(), python=sys.executable, **variables):
    """The command in an environment that holds only these variables."""
    command = [*before, str(python), "-m", "lm.cli.cli", *map(str, text)]
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


@pytest.mark.slow
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
        from lm.ui.server import voila_command
        from lm.jobs.notebook_runner import find_notebook
        from lm.core.settings import shipped_folder
        names = [p.stem for p in shipped_folder("nbs/pipelines").glob("*.ipynb")]
        found = [str(find_notebook(name)) for name in names] + [voila_command(1)[3]]
        print(json.dumps([lm.__file__, sorted(names), found]))"""
    how = {"cwd": tmp_path, "env": BARE, "capture_output": True, "text": True}
    ran = subprocess.run([str(installed), "-c", code], **how)
    package, names, result = json.loads(ran.stdout)
    package = Path(package).parent
    assert not package.is_relative_to(ROOT)
    assert names == sorted(path.stem for path in (ROOT / "nbs" / "pipelines").glob("*.ipynb"))
    assert all(Path(path).is_relative_to(package) for path in result)
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
    code += "from lm.cli.cli import main; sys.exit(main(['studies']))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": gone, "env": BARE | {"PYTHONPATH": str(ROOT)}},
        **{"capture_output": True, "text": True},
    )
    one_line(ran, "current folder does not exist")


# Users, folders and variables


WHO = (
    "reidentify",
    "monica",
    "p-0000-0000-0000",
)  # Reads the key, which it makes first; names no patient


def a_run(**how):
    """A pipeline of one study as a job, with state and reports of its own."""
    return lm("monitor", "monica", "--quiet", **how)


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """State with a few patients and no model, to be copied."""
    home = tmp_path_factory.mktemp("patients")
    ran = lm("trigger", "monica", "--n", 3, LM_HOME=str(home))
    assert ran.returncode == 0, ran.stderr
    return home


@pytest.fixture
def places(patients, tmp_path):
    subprocess.run(["cp", "-r", str(patients), str(tmp_path / "state")], check=True)
    return {"LM_HOME": str(tmp_path / "state"), "LM_REPORTS": str(tmp_path / "reports")}


def another_user():
    """Words before a command that run it under a user number without a name, group 0."""
    text = ["unshare", "--user", "--map-user=12345", "--map-group=0", "--"]
    tried = subprocess.run([*text, "true"], capture_output=True)
    if tried.returncode:
        pytest.skip("no user namespaces here")
    return text


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/proc"])
def test_a_user_number_without_name_and_home_runs_a_pipeline(places, home):
    before = another_user()
    variables = places | ({} if home is None else {"HOME": home})
    ran = a_run(before=before, **variables)
    assert ran.returncode == 0, ran.stderr
    assert "nothing" in ran.stdout
    assert ran.stderr == ""


@pytest.mark.slow
def test_a_home_that_is_lent_goes_away_and_holds_nothing_of_ours(places, tmp_path):
    (tmp_path / "tmp").mkdir()
    ran = a_run(HOME="/dev/null", TMPDIR=str(tmp_path / "tmp"), **places)
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    for key in ("LM_HOME", "LM_REPORTS", "LM_DATA"):
        ran = lm("studies", HOME="/dev/null", **places | {key: "~/lm"})
        one_line(ran, f"{key} = '~/lm' needs a HOME")


@pytest.mark.slow
def test_sockets_have_short_names_whatever_tmpdir_says(places, tmp_path):
    deep = tmp_path / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    ran = a_run(TMPDIR=str(deep), **places)
    assert ran.returncode == 0, ran.stderr
    assert list(deep.iterdir()) == []


@pytest.mark.slow
def test_a_read_only_tree_runs_with_state_elsewhere(installed, places, tmp_path):
    """Package and current folder on a read-only file system; a way back is reported."""
    text = ["unshare", "--mount", "--map-root-user", "--", "sh", "-c"]
    shut = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd "$0" && exec "$@"'
    folder = installed.parents[2]
    tried = subprocess.run([*text, shut, str(folder), "true"], capture_output=True)
    if tried.returncode:
        pytest.skip("nothing can be mounted here")
    before = [*text, shut, str(folder)]
    ran = a_run(before=before, python=installed, **places)
    assert ran.returncode == 0, ran.stderr
    assert "nothing" in ran.stdout and ran.stderr == ""
    without = lm("simulate", "monica", before=before, python=installed)
    one_line(without, str(folder / "state"), "set LM_HOME to a folder that can be written")
    without = a_run(before=before, python=installed, LM_HOME=places["LM_HOME"])
    one_line(without, str(folder / "reports"), "set LM_REPORTS to a folder that can be written")


@pytest.mark.parametrize("key", ["LM_HOME", "LM_DATA", "LM_REPORTS"])
def test_a_variable_that_names_a_file_is_refused(tmp_path, key):
    (tmp_path / "file").write_text("")
    one_line(lm("studies", **{key: str(tmp_path / "file")}), f"{key} = ", "is a file")


@pytest.mark.slow
def test_odd_variables_give_the_same_result(patients, tmp_path):
    """Empty, relative, with blanks and letters of any kind, not yet there."""
    odd = tmp_path / "a b 'c' $HOME é日"
    odd.mkdir()
    for name in ("state", "another"):
        subprocess.run(["cp", "-r", str(patients), str(odd / name)], check=True)
    shown = set()
    relative = os.path.relpath(odd / "state", ROOT)
    new = {"LM_REPORTS": str(odd / "new" / "reports")}
    for variables in (
        new | {"LM_HOME": relative, "LM_DATA": "", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kolkata"},
        new
        | {"LM_HOME": str(odd / "another"), "LM_DATA": "data", "LC_ALL": "POSIX"}
        | {"TZ": "Nowhere/Land"},
    ):
        ran = a_run(**variables)
        assert (ran.returncode, ran.stderr) == (0, ""), (variables, ran.stderr)
        shown.add(ran.stdout.split("notebook")[0])
    assert len(shown) == 1 and "nothing" in shown.pop()
    unread = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    one_line(a_run(**new, **unread), "LM_REPORTS = ", "set PYTHONUTF8=1")


@pytest.mark.slow
def test_secrets_are_closed_whatever_the_umask(tmp_path):
    places = {"LM_HOME": str(tmp_path / "state"), "LM_REPORTS": str(tmp_path / "reports")}
    before = ["sh", "-c", 'umask 000; exec "$0" "$@"']
    assert lm("trigger", "monica", "--n", 3, before=before, **places).returncode == 0
    made = lm("token", "monica", "create", "anna", "--role", "viewer", before=before, **places)
    assert made.returncode == 0, made.stderr
    assert "none of the patients" in lm(*WHO, before=before, **places).stderr
    study = tmp_path / "state" / "monica"
    for name in ("tokens.json", "pseudonyms.key"):
        assert (study / name).stat().st_mode & 0o777 == 0o600, name


@pytest.mark.slow
def test_a_volume_of_a_group_starts_again_and_one_of_all_says_what_to_do(places):
    study = Path(places["LM_HOME"]) / "monica"
    assert lm("token", "monica", "create", "anna", "--role", "viewer", **places).returncode == 0
    assert "none of the patients" in lm(*WHO, **places).stderr
    subprocess.run(["chmod", "-R", "g+rwX", places["LM_HOME"]], check=True)
    ran = lm("token", "monica", **places)
    assert ran.returncode == 0 and "anna" in ran.stdout
    assert ran.stderr.count("tokens.json has mode 0660: its group may use it") == 1
    ran = lm(*WHO, **places)
    assert "pseudonyms.key has mode 0660" in ran.stderr and "none of the patients" in ran.stderr
    for name, text in (("tokens.json", ["token", "monica"]), ("pseudonyms.key", WHO)):
        (study / name).chmod(0o644)
        result = lm(*text, **places)
        sentence = f"lm: {name} may be used by others (mode 0644): chmod 600 {study / name}\n"
        assert (result.returncode, result.stderr.splitlines()[-1] + "\n") == (2, sentence)
        (study / name).chmod(0o600)
    (study / "pseudonyms.key").unlink()
    (study / "pseudonyms.key").mkdir()
    one_line(lm(*WHO, **places), study / "pseudonyms.key", "cannot be read: Is a directory")

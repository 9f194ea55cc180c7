"""One list of requirements, files made from it that agree, and a package that installs."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import environment
import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PIN = re.compile(r"^([a-z0-9-]+)(?:\[.*?\])?==([^ ;]+)(?: ; (.+?))? \\$", re.M)
TOP = [
    "nbs/library",
    "nbs/pipelines",
    "lm",
    "data",
    "reports",
    "binder",
    "tests",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "environment.yml",
    "requirements.lock",
    "Makefile",
    "LICENSE",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "MANIFEST.in",
    ".ci/run",
    ".gitignore",
    ".gitattributes",
]


def run(*command, **kwargs):
    """A command as a newcomer would give it, also where these tests are run by make."""
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    options = {"capture_output": True, "text": True, "env": env} | kwargs
    return subprocess.run(command, **options)


@pytest.mark.parametrize("name", TOP)
def test_top_level_is_complete(name):
    assert (ROOT / name).exists()


def test_lock_and_environment_record_the_requirements_they_were_made_from():
    recorded = f"# sha256 of the requirements: {environment.digest()}"
    hint = "settings.ini has changed since: run `make lock`"
    assert recorded in LOCK.splitlines()[:3], hint
    assert recorded in (ROOT / "environment.yml").read_text(encoding="utf-8"), hint


@pytest.mark.parametrize("version", environment.PYTHONS)
def test_every_requirement_is_met_by_a_pin_on_every_python(version):
    here = {"python_version": version, "python_full_version": f"{version}.5"}
    pins = {
        name: pinned
        for name, pinned, marker in PIN.findall(LOCK)
        if not marker or Marker(marker).evaluate(here)
    }
    for line in environment.requirements():
        wanted = Requirement(line)
        assert wanted.name in pins, line
        assert wanted.specifier.contains(pins[wanted.name]), (line, pins[wanted.name])


def test_every_pin_has_a_hash_and_comes_from_nowhere_in_particular():
    blocks = re.split(r"(?m)^(?=[a-z0-9])", LOCK)[1:]
    assert len(blocks) == len(PIN.findall(LOCK)) > 100
    assert all(block.count("--hash=sha256:") >= 1 for block in blocks)
    assert "://" not in LOCK
    assert not re.search(r"(?m)^\s*--(?!hash=)", LOCK)


def test_no_committed_file_chooses_an_index():
    tracked = run("git", "ls-files", "-z", cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git repository")
    option = re.compile(r"--(extra-)?index-url|--find-links|trusted-host|index-url\s*=")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__) and path.stat().st_size < 1_000_000:
            assert not option.search(path.read_text(encoding="utf-8", errors="replace")), name


def test_environment_yml_installs_the_lock_and_binder_uses_the_same_file():
    link = ROOT / "binder" / "environment.yml"
    assert os.readlink(link) == "../environment.yml"
    assert os.readlink(ROOT / "binder" / "requirements.lock") == "../requirements.lock"
    environment_yml = yaml.safe_load(link.read_text(encoding="utf-8"))
    assert environment_yml["channels"] == ["conda-forge"]
    *conda, pip = environment_yml["dependencies"]
    assert pip == {"pip": ["-r requirements.lock"]}
    assert conda[0].removeprefix("python=") in environment.PYTHONS


def test_repo2docker_makes_a_sane_dockerfile():
    pytest.importorskip("repo2docker")
    made = run(sys.executable, "-m", "repo2docker", "--no-build", "--debug", ".", cwd=ROOT)
    dockerfile = made.stdout + made.stderr
    assert made.returncode == 0, dockerfile[-2000:]
    assert '--file "binder/environment.yml"' in dockerfile
    assert "binder/postBuild" in dockerfile
    assert "binder/start" in dockerfile
    copied = dockerfile.index("${REPO_DIR}/")
    assert copied < dockerfile.index('--file "binder/environment.yml"'), "the lock is not there yet"


def test_binder_start_gives_a_home_that_can_be_written(tmp_path):
    readonly = {"PATH": os.environ["PATH"], "LM_HOME": "/proc/none", "HOME": str(tmp_path)}
    started = run(ROOT / "binder" / "start", "printenv", "LM_HOME", cwd="/", env=readonly)
    assert started.returncode == 0, started.stderr
    assert started.stdout.strip() == str(tmp_path / "learning-machine")


def test_a_wheel_is_built_offline_and_holds_the_assets(tmp_path):
    build = [sys.executable, "-m", "uv", "build", "--wheel", "--offline", "--no-build-isolation"]
    copy = tmp_path / "copy with a 'space'"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "settings.ini", "lm", "nbs", "data"):
        run("cp", "-r", ROOT / name, copy)
    made = run(*build, "--no-cache", "--out-dir", tmp_path, copy)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "lm = lm.cli.cli:main" in scripts
    assert "Requires-Python: >=3.11" in metadata
    assert "Requires-Dist: pandas<3.1,>=3.0" in metadata
    assert 'Requires-Dist: nbdev==2.4.14; extra == "dev"' in metadata
    stored = (p for p in (ROOT / "lm/assets").rglob("*.*") if p.parent.name != "__pycache__")
    assets = [path.relative_to(ROOT).as_posix() for path in stored]
    assert set(assets) <= set(names)
    assert all(name.startswith(("lm/", "learning_machine-")) for name in names)


def stamped(folder):
    """A copy of what `make env` needs, with a .venv that seems finished but holds nothing."""
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "tools"):
        run("cp", "-r", ROOT / name, folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    stamp = f"{folder.resolve()}\n".encode() + (folder / "requirements.lock").read_bytes()
    (folder / ".venv" / "made").write_bytes(stamp)
    return folder


@pytest.mark.parametrize("name", ["plain", "with space", 'd\'état "ß" $HOME', "日本"])
def test_make_env_does_nothing_when_the_lock_is_unchanged(tmp_path, name):
    folder = stamped(tmp_path / name)
    done = run("make", "env", "PYTHON=/nonexistent", cwd=folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_make_env_starts_again_when_the_lock_or_the_folder_has_changed(tmp_path):
    folder = stamped(tmp_path / "first")
    with (folder / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    moved = stamped(tmp_path / "second").rename(tmp_path / "third")
    for place in (folder, moved):
        done = run("make", "env", "PYTHON=/nonexistent", cwd=place)
        assert done.returncode != 0
        assert done.stderr.splitlines()[0].startswith("No Python 3.11 or newer found")


def test_one_line_says_that_venv_is_missing(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ensurepip is not available\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit) as stop:
        environment.make_venv(tmp_path / "venv", str(python))
    assert "\n" not in stop.value.code
    assert "apt-get install python3-venv" in stop.value.code


def test_a_read_only_home_is_replaced(tmp_path):
    folder = stamped(tmp_path / "here")
    makefile = folder / "Makefile"
    makefile.write_text(makefile.read_text() + '\nhome: ; @printf %s "$$HOME"\n')
    for home in ({}, {"HOME": "/proc/none"}):
        done = run("make", "-s", "home", cwd=folder, env={"PATH": os.environ["PATH"], **home})
        assert done.stdout == str(folder / ".home"), done.stderr


def test_pins_with_extras_stand_beside_the_bare_pin_for_pip():
    """pip's hash mode refuses the lock otherwise, and Binder installs with pip."""
    extras = re.findall(r"(?m)^([a-z0-9-]+)\[.*?\](==\S+)", LOCK)
    assert extras and all(f"\n{name}{version} " in LOCK for name, version in extras)


def test_make_help_lists_every_verb():
    listed = run("make", cwd=ROOT)
    assert listed.returncode == 0
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"\.PHONY: (.+)", makefile)[1].split()
    assert {line.split()[1] for line in listed.stdout.splitlines()} == set(phony)


def test_the_changelog_and_the_citation_say_the_version():
    version = re.search(r"(?m)^version = (.+)$", (ROOT / "settings.ini").read_text())[1]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"(?m)^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", changes)
    assert sections[0] == ("Unreleased", "") and sections[1][0] == version and sections[1][1]
    package = (ROOT / "lm" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{version}"' in package
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", version)
    assert citation["license"] == "Apache-2.0" and citation["date-released"] == sections[1][1]
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")

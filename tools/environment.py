"""Everything about packages, from the one list in settings.ini. Needs only Python itself.

python tools/environment.py lock [--upgrade]   write requirements.lock and environment.yml
python tools/environment.py env                build .venv from requirements.lock
python tools/environment.py check              try the lock on every Python of this machine
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
PYTHONS = ("3.11", "3.12", "3.13")
IMPORTS = "duckdb evidently lm mlflow nbdev pandas papermill shap sklearn skops uvicorn voila"
YAML = """\
# Made from settings.ini by `make lock`: do not edit. binder/environment.yml is a link to this file.
# sha256 of the requirements: {digest}
name: learning-machine
channels:
  - conda-forge
dependencies:
  - python=3.12
  - pip
  - pip:
      - -r requirements.lock
"""
HEADER = """\
# Made from settings.ini by `make lock`: do not edit.
# sha256 of the requirements: {digest}
"""


def requirements() -> list[str]:  # Such as "pandas>=3.0,<3.1", those for development last
    """The lists of settings.ini, of the package and of its extras, in order."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    config = parser["DEFAULT"]
    lists = [text for name, text in config.items() if name.endswith("requirements")]
    return list(dict.fromkeys(" ".join(lists).split()))


def digest() -> str:  # 64 hexadecimal digits
    """What the lock file and environment.yml record about the list they were made from."""
    return hashlib.sha256("\n".join(requirements()).encode()).hexdigest()


def lock(*options: str) -> None:
    """Resolve the requirements for every Python and platform at once; keep pins that still fit."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--output-file", str(LOCK)]
    command += ["--universal", "--python-version", PYTHONS[0], "--fork-strategy", "fewest"]
    command += ["--generate-hashes", "--no-strip-extras", "--no-header", "--no-annotate"]
    command += ["--quiet", *options]
    subprocess.run(command, input="\n".join(requirements()), text=True, check=True)
    pins = "".join(line for line in LOCK.open(encoding="utf-8") if not line.startswith("#"))
    # pip's hash mode wants name[extra] pinned where a package asks for it, and the bare name too
    pins = re.sub(r"(?m)^([\w.-]+)\[.*?\]((?:.*\\\n)*.*\n)", r"\1\2\g<0>", pins)
    LOCK.write_text(HEADER.format(digest=digest()) + pins, encoding="utf-8")
    (ROOT / "environment.yml").write_text(YAML.format(digest=digest()), encoding="utf-8")


def pin(name: str) -> str:  # The pin and its hashes, as they stand in the lock file
    """The part of the lock file that pins `name`."""
    pins = LOCK.read_text(encoding="utf-8").replace("\\\n", "\\").splitlines()
    return next(line for line in pins if line.startswith(f"{name}==")).replace("\\", "\\\n")


def quiet_environment() -> dict[str, str]:
    """The environment for uv and pip; no cache where there is no home folder to keep it."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path(home) / "uv")
    values = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    values |= {"UV_SYSTEM_CERTS": "1"}  # A hospital's proxy has a certificate of its own
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
        usable = not cache.resolve().is_relative_to(ROOT)
    except OSError:
        usable = False
    if not usable:
        values |= {"UV_NO_CACHE": "1", "PIP_NO_CACHE_DIR": "1"}
    return os.environ | values


def install(python: Path) -> None:
    """Fill the environment of `python` from the lock: with uv, or with pip where uv fails."""
    settings = {"env": quiet_environment(), "cwd": ROOT}
    pip, target = [python, "-m", "pip", "install", "--quiet"], ["--python", python]
    with tempfile.TemporaryDirectory() as folder:
        bootstrap = Path(folder) / "uv.txt"
        bootstrap.write_text(pin("uv"), encoding="utf-8")
        tool = subprocess.run([*pip, "--require-hashes", "-r", bootstrap], **settings)
    exact = ["--require-hashes", "-r", LOCK.name]
    uv = [python, "-m", "uv", "pip", "install", "--quiet", *target, "--compile-bytecode"]
    print(f"Installing {LOCK.name} into {python.parents[1].name}", flush=True)
    if tool.returncode or subprocess.run([*uv, *exact], **settings).returncode:
        print("uv could not install the lock file: trying pip, which takes some minutes")
        subprocess.run([*pip, *exact], **settings, check=True)
    editable = [*pip, "--no-deps", "--no-build-isolation", "-e", "."]
    if subprocess.run(editable, **settings, capture_output=True).returncode:
        # setuptools refuses some folder names ('$'): then put the folder on the path ourselves
        site = next(python.parents[1].glob("lib/python*/site-packages"))
        (site / "learning_machine.pth").write_text(f"{ROOT}\n", encoding="utf-8")


def make_venv(
    folder: Path,  # Is emptied first
    python: str = sys.executable,  # The interpreter to build on
) -> Path:  # The new environment's interpreter
    """An empty virtual environment. Exits with one sentence where Python lacks the parts."""
    made = subprocess.run([python, "-m", "venv", "--clear", folder], capture_output=True, text=True)
    if made.returncode:
        hint = "Debian and Ubuntu: apt-get install python3-venv; or choose with make PYTHON=..."
        output = (made.stderr + made.stdout).strip()
        missing = "ensurepip is not" in output or "No module named" in output
        reason = hint if missing else output.splitlines()[-1]
        sys.exit(f"{python} cannot make a virtual environment: {reason}")
    return folder / "bin" / "python"


def env() -> None:
    """Build .venv; the stamp that says it is whole is written last."""
    print("Making .venv, which takes a few minutes the first time", flush=True)
    stamp = VENV / "made"
    stamp.unlink(missing_ok=True)
    install(make_venv(VENV))
    partial = stamp.with_suffix(".partial")
    partial.write_bytes(os.fsencode(f"{ROOT}\n") + LOCK.read_bytes())
    partial.replace(stamp)


def check() -> None:
    """Install the lock with each Python found, hashes required, and import the main packages."""
    pythons = {version: interpreter(version) for version in PYTHONS}
    for version, python in pythons.items():
        if python is None:
            print(f"Python {version}: not on this machine", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            inside = make_venv(Path(folder) / "venv", python)
            install(inside)
            subprocess.run([inside, "-m", "pip", "check"], check=True)
            code = f"import {', '.join(IMPORTS.split())}; print(shap.__version__)"
            subprocess.run([inside, "-c", code], check=True, cwd=folder)
        print(f"Python {version}: the lock installs and imports", flush=True)
    if not any(pythons.values()):
        sys.exit(f"none of Python {', '.join(PYTHONS)} is on this machine")


def interpreter(version: str) -> str | None:  # Such as "3.12"; its full path, if there is one
    """The working interpreter of `version`, from the path or pyenv: a name may be a mere stub."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser()) / "versions"
    names = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    for name in filter(None, names):
        output = subprocess.run([name, "-c", code], capture_output=True, text=True).stdout
        if output.startswith(f"{version} "):
            return output.strip().split(" ", 1)[1]
    return None


if __name__ == "__main__":
    verbs = {"lock": lock, "env": env, "check": check}
    if len(sys.argv) < 2 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    try:
        verbs[sys.argv[1]](*sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"this step failed: {' '.join(map(str, error.cmd))}")

"""Build the virtual environments of the libraries and servers that the benchmarks stand beside.

python tools/peers.py make [NAME ...]   build .peers/NAME for each name, or for all

Each has its pins, and nothing of ours, from nbs/benchmarks/peers/NAME.txt. What is built already is
left alone. Needs uv, which is in the project's own environment, and Python 3.11 or 3.12: NannyML
and Frouros run on nothing newer.
"""

import importlib.util
import shutil
import subprocess
import sys

from environment import ROOT, quiet_environment

SCRIPTS = ROOT / "nbs" / "benchmarks" / "peers"
PEERS = ROOT / ".peers"
PYTHON = ">=3.11,<3.13"


def names() -> list[str]:  # Such as ["evidently", "frouros"], sorted
    """The libraries that have a list of pins."""
    return sorted(path.stem for path in SCRIPTS.glob("*.txt"))


def uv() -> list[str]:  # The words that start it
    """uv of this Python, or else of the path. Exits with one sentence where there is none."""
    if importlib.util.find_spec("uv"):
        return [sys.executable, "-m", "uv"]
    command = shutil.which("uv")
    if not command:
        sys.exit("uv is not here: run `make env` and then `make peers`, or install uv")
    return [command]


def build(name: str) -> None:
    """Make .peers/NAME anew; the stamp that says it is whole is written last."""
    pins, folder = SCRIPTS / f"{name}.txt", PEERS / name
    stamp = folder / "made"
    if stamp.exists() and stamp.read_bytes() == pins.read_bytes():
        print(f".peers/{name} is up to date")
        return
    print(f"Making .peers/{name}", flush=True)
    settings = {"env": quiet_environment(), "cwd": ROOT, "check": True}
    # Paths from ROOT: its own name may hold what uv or a shell would misread
    inside, listed = folder.relative_to(ROOT), pins.relative_to(ROOT)
    subprocess.run([*uv(), "venv", "--quiet", "--clear", "--python", PYTHON, inside], **settings)
    into = ["pip", "install", "--quiet", "--python", inside / "bin" / "python"]
    # The lists are complete, and leave out on purpose what is heavy or not free software
    subprocess.run([*uv(), *into, "--no-deps", "--compile-bytecode", "-r", listed], **settings)
    stamp.write_bytes(pins.read_bytes())


def make(*wanted: str) -> None:
    """Build what is wanted, or everything. Exits with one sentence for an unknown name."""
    for name in wanted:
        if name not in names():
            sys.exit(f"there is no library {name!r} to build: choose from {', '.join(names())}")
    for name in wanted or names():
        build(name)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] != "make":
        sys.exit(__doc__)
    try:
        make(*sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"this step failed: {' '.join(map(str, error.cmd))}")

"""What nbdev does for this compendium, without its console scripts.

`__wrapped__` is the function itself: called from a script, nbdev's own would read our arguments.

python tools/notebooks.py export   make lm/ from nbs/library and clean every notebook
python tools/notebooks.py test     run library notebooks, lessons and map: assertions must hold
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("lessons", "library", "")  # Folders of nbs/; tests/ runs the pipelines
# Those that take longest go first
LONG = ("01_a_model_fails", "02_prequential", "11_verdict", "07_data_quality", "05_follow_up")


def export() -> None:
    """Export the library notebooks into lm/, map and draw them, then clean every notebook."""
    import packages
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export

    nbdev_export.__wrapped__()
    packages.MAP.write_text(packages.mapped(), encoding="utf-8")
    packages.PICTURE.write_text(packages.drawing(), encoding="utf-8")
    nbdev_clean.__wrapped__()


def run(path: Path) -> tuple[bool, float]:
    """One notebook on an empty machine: whether it came to its end, and after how many seconds.

    Its cells run in this process, for what they import serves the next notebook too; what they
    change in the environment does not."""
    from nbdev.test import test_nb

    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LM_HOME"] = folder
        try:
            return test_nb(path, basepath=ROOT)
        finally:
            os.environ.clear()
            os.environ.update(before)


def notebooks(folder: str) -> list[Path]:
    """Those of one folder of nbs/; the library has folders of its own."""
    pattern = "**/*.ipynb" if folder == "library" else "*.ipynb"
    return sorted(Path("nbs", folder).glob(pattern))


def test() -> None:
    """Run notebooks, two at a time, long ones first; exits non-zero where a cell raises."""
    from fastcore.parallel import parallel
    from notebooks import run  # A notebook may put another module in the place of `__main__`

    paths = [path for folder in TESTED for path in notebooks(folder)]
    paths.sort(key=lambda path: path.stem not in LONG)
    ran = parallel(run, [path.absolute() for path in paths], n_workers=2, pause=0.01)
    for path, (fine, seconds) in zip(paths, ran, strict=True):
        print(f"{'passed' if fine else 'FAILED'} {seconds:6.1f} s  {path}")
    sys.exit(not all(fine for fine, _ in ran))


if __name__ == "__main__":
    os.chdir(ROOT)
    verbs = {"export": export, "test": test}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    verbs[sys.argv[1]]()

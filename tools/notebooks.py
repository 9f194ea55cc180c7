"""What nbdev does for this compendium, without its console scripts.

`__wrapped__` is the function itself: called from a script, nbdev's own would read our arguments.

python tools/notebooks.py export   make lm/ from nbs/library and clean every notebook
python tools/notebooks.py test     run the library notebooks: their assertions must hold
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def export() -> None:
    """Export the library notebooks into lm/, then drop what does not belong in any notebook."""
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export

    nbdev_export.__wrapped__()
    nbdev_clean.__wrapped__()


def test() -> None:
    """Run the library notebooks on an empty machine; exits non-zero where an assertion fails."""
    from nbdev.test import nbdev_test

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LM_HOME"] = folder
        nbdev_test.__wrapped__(path="nbs/library", n_workers=2, timing=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    verbs = {"export": export, "test": test}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    verbs[sys.argv[1]]()

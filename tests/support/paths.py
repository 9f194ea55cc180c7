"""Where the repository and its tests are."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
STATES = TESTS / "data" / "states"  # Folders of earlier versions, packed

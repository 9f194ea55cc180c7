"""How much memory a process has needed at most."""

import platform
import resource
from pathlib import Path


def peak_mb() -> float:
    """Highest resident memory of this program so far, in MB.

    On Linux `ru_maxrss` begins at the parent's peak, so there the program's own is read."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Darwin" else 1e3)

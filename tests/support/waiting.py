"""Waiting for events: a test fails because something did not happen, never because it was slow."""

import time

PATIENCE = 300  # Seconds; longer than anything takes on a busy machine
UNPROXIED = {"trust_env": False, "timeout": PATIENCE}  # Of httpx: no proxy, and patience


def eventually(ask, pause=0.02):
    """What `ask` returns once it is true."""
    until = time.monotonic() + PATIENCE
    while not (answer := ask()):
        assert time.monotonic() < until, f"nothing after {PATIENCE} s"
        time.sleep(pause)
    return answer

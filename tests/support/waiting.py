"""Waiting for events: a test fails because something did not happen, never because it was slow."""

import asyncio
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


async def eventually_async(ask, pause=0.01):
    """The same beside the tasks of an event loop."""
    until = time.monotonic() + PATIENCE
    while not (answer := ask()):
        assert time.monotonic() < until, f"nothing after {PATIENCE} s"
        await asyncio.sleep(pause)
    return answer

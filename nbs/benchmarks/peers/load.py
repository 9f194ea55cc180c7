"""Send requests to a service over connections that stay open, and say how long the answers took.

    python nbs/benchmarks/peers/load.py PLAN.json > RESULT.json

PLAN.json: port, path, bodies (a file with one JSON body a line; @ID@ in it becomes a number of its
own), clients, and either `seconds`, after `warm` seconds that do not count, or `requests`; headers
(a list of dicts, one for each client in turn); answers (a file for all bodies, or ""); aside (after
`every` so many answers one of `requests`, [path, body], is sent in turn by a connection of its own,
with `headers` of its own).

Each client sends its next request when its last one is answered. A request fails when the
connection breaks or the status is not `status` (200). Latencies are in milliseconds. Needs nothing
but Python, and one core of its own: `busy` says how much of it was used.
"""

import asyncio
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def quantile(sorted_values: list[float], q: float) -> float:  # NaN of nothing
    """The smallest value that at least the share q does not exceed."""
    n = len(sorted_values)
    return sorted_values[max(math.ceil(q * n), 1) - 1] if n else math.nan


def summary(values: list[float]) -> dict[str, float]:  # In the unit of the values
    """Median, 95th and 99th percentile, and the longest."""
    ordered = sorted(values)
    percentiles = {f"p{q}": quantile(ordered, q / 100) for q in (50, 95, 99)}
    return percentiles | {"longest": quantile(ordered, 1)}


def split(data: bytearray) -> tuple[int, bytes, int] | None:  # Status, body, bytes that it took
    """The first whole response of what has come, or None."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(data[:end]).lower()
    status, at = int(head[9:12]), end + 4
    place = head.find(b"\r\ncontent-length:")
    if place >= 0:
        length = int(head[place + 17 :].split(b"\r\n", 1)[0])
        whole = len(data) >= at + length
        return (status, bytes(data[at : at + length]), at + length) if whole else None
    body = b""
    while b"transfer-encoding: chunked" in head:
        line = data.find(b"\r\n", at)
        size = int(bytes(data[at:line]).split(b";")[0], 16) if line >= 0 else math.inf
        if len(data) < line + 4 + size:
            return None
        body, at = body + bytes(data[line + 2 : line + 2 + size]), line + 4 + size
        if not size:
            break
    return status, body, at


def head(port: int, path: str, more: dict[str, str]) -> bytes:  # Up to the length
    """The head of a request."""
    fixed = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in (fixed | more).items())
    return f"POST {path} HTTP/1.1\r\n{lines}Content-Length: ".encode()


class Run:
    """What all clients share: the plan, the bodies, and what has been measured."""

    def __init__(self, plan: dict) -> None:
        """Make ready."""
        self.plan, self.sent, self.answered, self.failed, self.open = plan, 0, 0, 0, True
        self.bodies = [line.encode() for line in Path(plan["bodies"]).read_text().splitlines()]
        self.began, self.took = [], []  # Seconds, one for each request that was answered well
        self.answers = open(plan["answers"], "wb") if plan.get("answers") else None  # noqa: SIM115
        self.errors, self.name, self.turn = [], f"{time.time_ns():x}", asyncio.Event()

    def headers(self, client: int) -> bytes:
        """The head of a client's requests, up to the length."""
        lines = self.plan.get("headers") or [{}]
        return head(self.plan["port"], self.plan["path"], lines[client % len(lines)])

    def body(self) -> bytes:
        """The next one."""
        self.sent += 1
        if self.plan.get("requests") and self.sent >= self.plan["requests"]:
            self.open = False
        named = f"{self.name}-{self.sent}".encode()
        return self.bodies[self.sent % len(self.bodies)].replace(b"@ID@", named)

    def note(self, began: float, status: int, body: bytes) -> None:
        """One answer."""
        self.answered += 1
        if status == self.plan.get("status", 200):
            self.began.append(began)
            self.took.append(time.perf_counter() - began)
        else:
            self.failed += 1
            self.errors = self.errors or [f"{status} {body[:300].decode(errors='replace')}"]
        if self.answers:
            self.answers.write(body + b"\n")
        if self.answered % self.plan.get("aside", {}).get("every", math.inf) == 0:
            self.turn.set()


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, run: Run, number: int) -> None:
        """Not connected yet."""
        self.run, self.head, self.data, self.waiting = run, run.headers(number), bytearray(), False
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin."""
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """Send the next request, or leave."""
        if not self.run.open:
            return self.transport.close()
        body = self.run.body()
        self.waiting, self.began = True, time.perf_counter()
        return self.transport.write(self.head + str(len(body)).encode() + b"\r\n\r\n" + body)

    def data_received(self, data: bytes) -> None:
        """Take a whole answer and go on."""
        self.data += data
        if (response := split(self.data)) is not None:
            del self.data[: response[2]]
            self.waiting = False
            self.run.note(self.began, *response[:2])
            self.ask()

    def connection_lost(self, why: Exception | None) -> None:
        """What was not answered has failed."""
        if self.waiting:
            self.run.failed += 1
            self.run.errors = self.run.errors or [f"connection lost: {why}"]
        if not self.done.done():
            self.done.set_result(None)


async def connected(run: Run, number: int) -> None:
    """One client, which connects again where its connection is lost."""
    loop = asyncio.get_running_loop()
    while run.open:
        try:
            _, client = await loop.create_connection(
                lambda: Client(run, number), "127.0.0.1", run.plan["port"]
            )
        except OSError as error:
            run.failed, run.errors = run.failed + 1, run.errors or [str(error)]
            await asyncio.sleep(0.05)
            continue
        await client.done


def in_turn(values: list) -> Iterator:
    """Again and again."""
    while values:
        yield from values


async def ask(port: int, start: bytes, content: dict) -> tuple[int, bytes]:  # Status and body
    """One request by a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body, data = json.dumps(content).encode(), bytearray()
    writer.write(start + str(len(body)).encode() + b"\r\n\r\n" + body)
    while (response := split(data)) is None and (more := await reader.read(65536)):
        data += more
    writer.close()
    return response[:2] if response else (0, b"")


async def aside(run: Run) -> list[dict]:  # began, took (seconds), status, body
    """Requests between the others, each when its time has come."""
    swaps, plan, port = [], run.plan.get("aside", {}), run.plan["port"]
    for path, content in in_turn(plan.get("requests", [])):
        await run.turn.wait()
        run.turn.clear()
        if not run.open:
            break
        began = time.perf_counter()
        status, body = await ask(port, head(port, path, plan.get("headers", {})), content)
        took = time.perf_counter() - began
        swaps.append({"began": began, "took": took, "status": status, "body": body.decode()})
    return swaps


async def measure(plan: dict) -> dict:
    """Run a plan to its end."""
    run, start, used = Run(plan), time.perf_counter(), time.process_time()
    clients = [asyncio.create_task(connected(run, i)) for i in range(plan["clients"])]
    swaps = asyncio.create_task(aside(run))
    if not plan.get("requests"):
        await asyncio.sleep(plan.get("warm", 0) + plan["seconds"])
        run.open = False
    await asyncio.gather(*clients)
    run.turn.set()
    first = start + (0 if plan.get("requests") else plan.get("warm", 0))
    last = first + plan["seconds"] if not plan.get("requests") else time.perf_counter()
    pairs = zip(run.began, run.took, strict=True)
    within = [(b, took) for b, took in pairs if first <= b + took <= last]
    report = {"requests": len(within), "seconds": last - first, "failed": run.failed}
    report |= {"rate": len(within) / (last - first), "sent": run.sent, "errors": run.errors}
    report |= {k: 1e3 * v for k, v in summary([took for _, took in within]).items()}
    report["busy"] = (time.process_time() - used) / (time.perf_counter() - start)
    asides = await swaps
    for one in asides:  # The longest request that was under way at the same time
        both = [t for b, t in within if b < one["began"] + one["took"] and one["began"] < b + t]
        one["longest"] = max(both, default=math.nan)
    if run.answers:
        run.answers.close()
    return report | {"aside": asides}


if __name__ == "__main__":
    gc.disable()
    print(json.dumps(asyncio.run(measure(json.loads(Path(sys.argv[1]).read_text())))))

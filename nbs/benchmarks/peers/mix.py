"""Clients and readers of a service, all at once, who keep what they were answered.

    python nbs/benchmarks/peers/mix.py PLAN.json

PLAN.json: port; name (every record_id begins with it); log (a file for one JSON line a request);
bodies (a file with the features of one patient a line, and `arrived`); clients (for each the tokens
`machine` and `clinician`, and the clinician's name); rate (requests a second of all clients
together; null or absent: as many as are answered); readers (for each a token); every (seconds
between two rounds of a reader); seconds, or null: until the service is gone; seed.

A client sends a new patient most of the time, sometimes the outcome of a patient that was
acknowledged, or what a clinician made of the prediction. Without `rate` it sends its next request
when its last one is answered. With `rate` each of its requests has a moment at which it is due: a
request that must wait for the answer before it is late, and its time counts from when it was due.
A request whose connection breaks has status 0: it may have been stored or not. Without `seconds` a
client then leaves, else it connects again. Needs nothing but Python.
"""

import asyncio
import json
import random
import sys
import time
from pathlib import Path

from load import split

READ = (  # What an open dashboard asks for, round by round
    *(
        "/v1/status",
        "/v1/models",
        "/v1/patients",
        "/v1/tables/decisions",
        "/v1/tables/predictions?last=200",
    ),
    *("/v1/tables/verdicts", "/v1/records/@ID@"),
)
OTHERS = 0.12  # Of a client's requests are outcomes, and as many are decisions


class Line:
    """One connection, opened where it is needed."""

    def __init__(self, port: int) -> None:
        """Not connected yet."""
        self.port, self.streams = port, None

    async def ask(self, method: str, path: str, token: str, body: dict | None) -> tuple[int, bytes]:
        """Status and body; 0 where the connection breaks."""
        text, data = b"" if body is None else json.dumps(body).encode(), bytearray()
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        lines += [f"Authorization: Bearer {token}", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(text)}", "", ""])
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            self.streams[1].write(head.encode() + text)
            while (response := split(data)) is None and (more := await self.streams[0].read(2**20)):
                data += more
        except OSError:
            response = None
        if response is None:
            self.close()
        return response[:2] if response else (0, b"")

    def close(self) -> None:
        """Hang up."""
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


class Mix:
    """What all share: the plan, the patients acknowledged so far, and the log."""

    def __init__(self, plan: dict) -> None:
        """Nothing has been sent."""
        self.plan, self.known, self.log, self.sent = plan, [], [], 0
        self.rows = [json.loads(line) for line in Path(plan["bodies"]).read_text().splitlines()]
        self.until = time.monotonic() + (plan["seconds"] or float("inf"))
        self.lost = False

    def open(self) -> bool:
        """Whether there is more to do."""
        return time.monotonic() < self.until and not (self.lost and self.plan["seconds"] is None)

    def next(self, who: dict, mine: list[str], rng: random.Random) -> tuple[str, str, dict]:
        """Path, token and body of a client's next request."""
        kind, now = rng.random(), time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        if mine and kind < OTHERS:
            body = {"record_id": mine.pop(), "y": rng.randrange(2), "known_at": now}
            return "/v1/outcomes", who["machine"], body
        if mine and kind < 2 * OTHERS:
            body = {"record_id": rng.choice(mine), "clinician": who["name"], "action": "agree"}
            self.sent += 1
            return "/v1/decisions", who["clinician"], body | {"reason": f"{self.sent}", "now": now}
        self.sent += 1
        name, row = f"{self.plan['name']}-{self.sent}", self.rows[self.sent % len(self.rows)]
        return "/v1/records", who["machine"], {"row": {"record_id": name} | row}

    def note(self, began: float, path: str, body: dict | None, status: int, content: bytes) -> None:
        """Keep one request; a refusal with its words."""
        took, response = 1e3 * (time.monotonic() - began), None
        if path == "/v1/records" or status not in (0, 200):
            text = content[:200].decode(errors="replace")
            response = json.loads(content) if content[:1] == b"{" else text
        line = {"path": path, "body": body, "status": status, "response": response, "ms": took}
        self.log.append(line | {"at": began})


async def client(mix: Mix, who: dict, seed: str) -> None:
    """One who sends."""
    line, rng, mine = Line(mix.plan["port"]), random.Random(seed), []
    pause = len(mix.plan["clients"]) / (mix.plan.get("rate") or float("inf"))
    due = time.monotonic() + pause * rng.random()
    while mix.open():
        if pause:
            await asyncio.sleep(max(0.0, min(due, mix.until) - time.monotonic()))
        path, token, body = mix.next(who, mine, rng)
        began, due = (due if pause else time.monotonic()), due + pause
        status, content = await line.ask("POST", path, token, body)
        mix.note(began, path, body, status, content)
        if status == 200 and path == "/v1/records":
            mine.append(body["row"]["record_id"])
            mix.known.append(mine[-1])
        if status == 0:
            mix.lost = True
            await asyncio.sleep(0.05)
    line.close()


async def reader(mix: Mix, token: str, number: int) -> None:
    """An open dashboard: every so many seconds it asks for everything."""
    line, every = Line(mix.plan["port"]), mix.plan["every"]
    await asyncio.sleep(every * number / (1 + len(mix.plan["readers"])))
    while mix.open():
        due = time.monotonic() + every
        for path in READ if mix.known else READ[:-1]:
            asked, began = path.replace("@ID@", (mix.known or [""])[-1]), time.monotonic()
            status, content = await line.ask("GET", asked, token, None)
            mix.note(began, path, None, status, content)
            mix.lost = mix.lost or status == 0
        await asyncio.sleep(max(0.0, min(due, mix.until) - time.monotonic()))
    line.close()


async def run(plan: dict) -> None:
    """Everybody to the end of the plan."""
    mix = Mix(plan)
    senders = [client(mix, who, f"{plan['seed']} {i}") for i, who in enumerate(plan["clients"])]
    readers = [reader(mix, token, i) for i, token in enumerate(plan["readers"])]
    await asyncio.gather(*senders, *readers)
    Path(plan["log"]).write_text("".join(json.dumps(line) + "\n" for line in mix.log))


if __name__ == "__main__":
    asyncio.run(run(json.loads(Path(sys.argv[1]).read_text())))

"""The load generator and the benchmark of serving, in small."""

import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pandas as pd
import peers
import pytest
from support.here import run_here
from support.waiting import PATIENCE

NOTEBOOK = peers.SCRIPTS.parent / "serving.ipynb"


@pytest.fixture(scope="module")
def load():
    """The load generator as a module."""
    spec = spec_from_file_location("load", peers.SCRIPTS / "load.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Moody(BaseHTTPRequestHandler):
    """Answers 500 to every fifth body, hangs up on every seventh, and remembers all of them."""

    protocol_version, seen, lock, chunks = "HTTP/1.1", [], threading.Lock(), False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            self.seen.append((self.path, body.decode(), self.headers.get("Authorization")))
            number = len(self.seen)
        if number % 7 == 0:
            self.close_connection = True
            return
        self.send_response(500 if number % 5 == 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def moody():
    """The port of a server that often fails."""
    Moody.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def run(folder, port, **plan):
    """The load generator in a process of its own."""
    (folder / "bodies").write_text('{"a": "@ID@"}\n{"b": "@ID@"}\n')
    plan = {"port": port, "path": "/x", "bodies": str(folder / "bodies"), **plan}
    (folder / "plan").write_text(json.dumps(plan))
    command = [sys.executable, str(peers.SCRIPTS / "load.py"), str(folder / "plan")]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_percentiles_are_those_of_a_sorted_list(load):
    values = np.random.default_rng(0).permutation(np.arange(1.0, 201.0)).tolist()
    assert load.summary(values) == {"p50": 100, "p95": 190, "p99": 198, "longest": 200}
    assert load.summary([3.0]) == {"p50": 3, "p95": 3, "p99": 3, "longest": 3}
    assert all(np.isnan(v) for v in load.summary([]).values())


def test_responses_are_found_whole_or_not_at_all(load):
    whole = b"HTTP/1.1 201 Created\r\ncontent-LENGTH: 3\r\nx: y\r\n\r\nabc"
    pieces = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;z\r\nde\r\n0\r\n\r\n"
    )
    assert load.split(bytearray(whole + b"HTTP")) == (201, b"abc", len(whole))
    assert load.split(bytearray(pieces + whole)) == (200, b"abcde", len(pieces))
    for cut in range(len(whole)):
        assert load.split(bytearray(whole[:cut])) is None
    for cut in range(len(pieces)):
        assert load.split(bytearray(pieces[:cut])) is None


def test_every_request_is_sent_once_and_every_failure_counted(tmp_path, moody):
    tokens = [{"Authorization": name} for name in ("one", "two")]
    answers = tmp_path / "answers"
    told = run(tmp_path, moody, clients=3, requests=100, headers=tokens, answers=str(answers))
    names = [next(iter(json.loads(body).values())) for _, body, _ in Moody.seen]
    assert told["sent"] >= 100 and len(names) == told["sent"] == len(set(names))
    lost = len(names) // 7
    bad = sum(n % 5 == 0 and n % 7 != 0 for n in range(1, len(names) + 1))
    assert told["failed"] == lost + bad
    assert told["requests"] == told["sent"] - told["failed"] and told["errors"]
    assert {who for *_, who in Moody.seen} == {"one", "two"}
    assert len(answers.read_text().splitlines()) == told["sent"] - lost


def test_asides_come_in_turn_with_headers_of_their_own(tmp_path, moody):
    asked = [["/up", {"v": 2}], ["/down", {}]]
    aside = {"every": 20, "requests": asked, "headers": {"Authorization": "chief"}}
    told = run(tmp_path, moody, clients=2, requests=150, aside=aside)
    paths = [path for path, _, who in Moody.seen if who == "chief"]
    assert paths == [("/up", "/down")[i % 2] for i in range(len(paths))] and len(paths) >= 4
    assert [one["took"] > 0 for one in told["aside"]] == [True] * len(paths)


def test_nobody_there_is_a_failure(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        told = run(tmp_path, taken.getsockname()[1], clients=1, seconds=0.3)
    assert told["requests"] == 0 and told["failed"] >= 2 and "connect" in told["errors"][0].lower()


def test_the_floor_answers(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(peers.SCRIPTS / "serving_floor.py"), str(port), "uvicorn"]
    floor = subprocess.Popen(command)
    try:
        while floor.poll() is None:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        told = run(tmp_path, port, clients=4, seconds=0.3, warm=0.1)
    finally:
        floor.terminate()
        floor.wait(PATIENCE)
    assert told["failed"] == 0 and told["requests"] > 20
    assert 0 < told["p50"] <= told["p95"] <= told["p99"] <= told["longest"]
    assert told["rate"] == pytest.approx(told["requests"] / 0.3)


@pytest.mark.slow
def test_swaps_under_load_in_small(tmp_path):
    small = {"learners": "logistic", "clients": "", "peers": "", "sizes": "", "minutes": 0}
    small |= {"requests": 1500, "swaps": 3, "swap_clients": 2, "output": str(tmp_path)}
    told = run_here(NOTEBOOK, small)
    assert told["mixed"] == 0 and told["swaps"] >= 2
    swap = pd.read_csv(tmp_path / "swap.csv").iloc[0]
    assert swap[["failed", "failed_swaps", "lost_or_other", "doubled", "faults"]].eq(0).all()
    assert swap["by_1"] > 0 and swap["by_2"] > 0
    assert "Versions swapped" in (tmp_path / "serving.txt").read_text()


def test_numbers_of_another_version_are_found(tmp_path):
    """The judge of the notebook itself, on answers of which one is mixed."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = next(c for c in map("".join, (c["source"] for c in cells)) if "def judged(" in c)
    study = type("Study", (), {"feature_names": ["age"]})
    names = {"np": np, "json": json, "STUDY": study, "Path": object}
    exec(code[: code.index("def kept(")], names)
    shown = names["SHOWN"]
    truth = {(v, 60.0): np.full(len(shown) + 2, v / 10) for v in (1, 2)}
    names["expected"] = lambda learner: truth

    def answer(name, version, value):
        whole = dict.fromkeys(shown, value) | {"record_id": name, "version": version}
        return whole | {"base": value, "contributions": {"age": value}, "features": {"age": 60.0}}

    told = [answer("a", 1, 0.1), answer("b", 2, 0.2), answer("c", 2, 0.1), {"error": "x"}]
    (tmp_path / "answers").write_text("\n".join(map(json.dumps, told)) + "\n")
    seen = names["judged"]("logistic", tmp_path / "answers")
    assert seen["mixed"] == 1 and (seen["by_1"], seen["by_2"]) == (1, 2) and len(seen["ids"]) == 3


def test_what_came_out_is_what_the_notebook_says():
    folder = peers.ROOT / "reports" / "serving"
    table = pd.read_csv(folder / "serving.csv")
    rate = table.set_index(["learner", "system", "form", "clients"])["rate"].to_dict()
    p99 = table.set_index(["learner", "system", "form", "clients"])["p99"].to_dict()
    assert table["failed"].sum() == 0
    ratios = {form: {} for form in ("encoded", "pipeline")}
    tails = {form: {} for form in ratios}
    for form in ratios:
        for learner in ("logistic", "boosting"):
            peer = [(learner, "mlserver", form, count) for count in (1, 16, 64)]
            mine = [
                next(k for k in rate if k[:2] == (learner, "ours") and k[3] == p[3]) for p in peer
            ]
            pairs = list(zip(mine, peer, strict=True))
            ratios[form][learner] = [rate[a] / rate[b] for a, b in pairs]
            tails[form][learner] = [p99[a] / p99[b] for a, b in pairs]
    spans = {k: (min(v), max(v)) for k, v in ratios["encoded"].items()}
    assert [round(v, 1) for v in (*spans["logistic"], *spans["boosting"])] == [1.1, 1.4, 1.4, 1.6]
    raw = [*ratios["pipeline"]["logistic"], *ratios["pipeline"]["boosting"]]
    assert [round(v) for v in (min(raw), max(raw))] == [12, 21]
    assert tails["encoded"]["boosting"][0] < 1
    rest = [*tails["encoded"]["logistic"], *tails["encoded"]["boosting"][1:]]
    assert [round(v, 1) for v in (min(rest), max(rest))] == [1.1, 1.5]
    assert max(*tails["pipeline"]["logistic"], *tails["pipeline"]["boosting"]) < 0.2
    floors = pd.read_csv(folder / "floors.csv", index_col=0)
    told = floors[[f"prediction with interval, {how}" for how in ("ONNX", "compiled")]]
    assert told.round(2).to_numpy().tolist() == [[0.07, 0.02], [0.12, 0.1]]
    swap = pd.read_csv(folder / "swap.csv")
    assert swap[["failed", "failed_swaps"]].eq(0).all(axis=None)
    ours = swap[swap["system"] == "ours"]
    assert ours[["mixed", "lost_or_other", "doubled", "faults"]].eq(0).all(axis=None)
    assert ours["swap_ms"].min() > 59 and ours["swap_ms"].max() < 76
    assert (ours["wait_ms"] < ours["p99"]).all()
    growth = pd.read_csv(folder / "growth.csv").set_index(["stored", "clients"])["p50 to first"]
    assert round(growth[1_000_000, 1], 2) == 0.93 and round(growth[10_000_000, 1]) == 14

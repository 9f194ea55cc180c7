"""The load generator and the benchmark of serving, in small."""

import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pandas as pd
import peers
import pytest
from support.here import run_here
from support.waiting import PATIENCE, eventually

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


def test_responses_are_parsed_whole_or_not_at_all(load):
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
    result = run(tmp_path, moody, clients=3, requests=100, headers=tokens, answers=str(answers))
    names = [next(iter(json.loads(body).values())) for _, body, _ in Moody.seen]
    assert result["sent"] >= 100 and len(names) == result["sent"] == len(set(names))
    lost = len(names) // 7
    bad = sum(n % 5 == 0 and n % 7 != 0 for n in range(1, len(names) + 1))
    assert result["failed"] == lost + bad
    assert result["requests"] == result["sent"] - result["failed"] and result["errors"]
    assert {who for *_, who in Moody.seen} == {"one", "two"}
    assert len(answers.read_text().splitlines()) == result["sent"] - lost


def test_asides_come_in_turn_with_headers_of_their_own(tmp_path, moody):
    asked = [["/up", {"v": 2}], ["/down", {}]]
    aside = {"every": 20, "requests": asked, "headers": {"Authorization": "chief"}}
    result = run(tmp_path, moody, clients=2, requests=150, aside=aside)
    paths = [path for path, _, who in Moody.seen if who == "chief"]
    assert paths == [("/up", "/down")[i % 2] for i in range(len(paths))] and len(paths) >= 4
    assert [one["took"] > 0 for one in result["aside"]] == [True] * len(paths)


def test_no_server_is_a_failure(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        result = run(tmp_path, taken.getsockname()[1], clients=1, seconds=0.3)
    assert result["requests"] == 0 and result["failed"] >= 2
    assert "connect" in result["errors"][0].lower()


def listens(port):
    """Whether a server accepts connections."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_floor_answers(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(peers.SCRIPTS / "serving_floor.py"), str(port), "uvicorn"]
    floor = subprocess.Popen(command)
    try:
        eventually(lambda: floor.poll() is not None or listens(port))
        result = run(tmp_path, port, clients=4, seconds=1.0, warm=0.1)
    finally:
        floor.terminate()
        floor.wait(PATIENCE)
    assert result["failed"] == 0 and result["requests"] > 0
    assert 0 < result["p50"] <= result["p95"] <= result["p99"] <= result["longest"]
    assert result["rate"] == pytest.approx(result["requests"] / 1.0)


@pytest.mark.slow
def test_swaps_under_load_in_small(tmp_path):
    small = {"families": "logistic", "clients": "", "peers": "", "sizes": "", "minutes": 0}
    small |= {"requests": 1500, "swaps": 3, "swap_clients": 2, "output": str(tmp_path)}
    result = run_here(NOTEBOOK, small)
    assert result["mixed"] == 0 and result["swaps"] >= 2
    swap = pd.read_csv(tmp_path / "swap.csv").iloc[0]
    assert swap[["failed", "failed_swaps", "lost_or_other", "doubled", "faults"]].eq(0).all()
    assert swap["by_1"] > 0 and swap["by_2"] > 0
    assert "Versions swapped" in (tmp_path / "serving.txt").read_text()


def test_numbers_of_another_version_are_detected(tmp_path):
    """The judge of the notebook itself, on answers of which one is mixed."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = next(c for c in map("".join, (c["source"] for c in cells)) if "def judged(" in c)
    study = type("Study", (), {"feature_names": ["age"]})
    names = {"np": np, "json": json, "STUDY": study, "Path": object}
    exec(code[: code.index("def not_stored(")], names)
    shown = names["SHOWN"]
    truth = {(v, 60.0): np.full(len(shown) + 2, v / 10) for v in (1, 2)}
    names["expected"] = lambda family: truth

    def answer(name, version, value):
        whole = dict.fromkeys(shown, value) | {"record_id": name, "version": version}
        return whole | {"base": value, "contributions": {"age": value}, "features": {"age": 60.0}}

    results = [answer("a", 1, 0.1), answer("b", 2, 0.2), answer("c", 2, 0.1), {"error": "x"}]
    (tmp_path / "answers").write_text("\n".join(map(json.dumps, results)) + "\n")
    seen = names["judged"]("logistic", tmp_path / "answers")
    assert seen["mixed"] == 1 and (seen["by_1"], seen["by_2"]) == (1, 2) and len(seen["ids"]) == 3


def span(values, form="{:.1f}"):
    """The smallest and the largest, as the text says them."""
    return f"{form.format(min(values))} to {form.format(max(values))}"


def test_what_came_out_is_what_the_notebook_says():
    folder = peers.ROOT / "reports" / "serving"
    cell = json.loads(NOTEBOOK.read_text())["cells"][-1]["source"]
    text = " ".join("".join(cell).split())
    table = pd.read_csv(folder / "serving.csv").fillna({"form": ""})
    assert table["failed"].sum() == 0
    table = table.set_index(["system", "form", "family", "clients"]).sort_index()[["rate", "p99"]]
    mine, kinds = table.loc["ours", ""], ("logistic", "boosting")
    bare, raw = (mine / table.loc["mlserver", form] for form in ("encoded", "pipeline"))
    floors = pd.read_csv(folder / "floors.csv", index_col=0)
    onnx, fast = (floors[f"prediction with interval, {how}"] for how in ("ONNX", "compiled"))
    swap = pd.read_csv(folder / "swap.csv")
    assert swap[["failed", "failed_swaps"]].eq(0).all(axis=None)
    ours, theirs = (swap[swap["system"] == name] for name in ("ours", "mlserver"))
    assert ours[["mixed", "lost_or_other", "doubled", "faults"]].eq(0).all(axis=None)
    growth = pd.read_csv(folder / "growth.csv").set_index(["stored", "clients"])
    most = growth.loc[10_000_000]
    soak = pd.read_csv(folder / "soak.csv")
    steady = soak[(soak["minute"] >= 1) & soak["rss_mb"].notna()]
    later = steady.loc[steady["minute"] >= 6, "rss_mb"]
    logged = 1e6 * (steady["wal_mb"].iloc[-1] - steady["wal_mb"].iloc[0])
    logged /= steady["records"].iloc[-1] - steady["records"].iloc[0]
    for message in (
        *(f"{span(bare.loc[kind, 'rate'])} times as many with {kind}" for kind in kinds),
        f"{span(raw['rate'], '{:.0f}')} times as many as MLServer with the patient as it comes",
        *(f"{span(bare.loc[kind, 'p99'])} times MLServer's with {kind}" for kind in kinds),
        f"at most {raw['p99'].max():.2f} times its with the patient as it comes",
        f"ONNX takes {onnx['logistic']:.2f} and {onnx['boosting']:.2f} ms",
        f"the fast path {fast['logistic']:.2f} and {fast['boosting']:.2f}",
        f"No request failed during {ours['swaps'].sum()} swaps",
        f"takes {span(ours['swap_ms'], '{:.0f}')} ms (longest {ours['longest_swap_ms'].max():.0f})",
        f"MLServer takes {span(theirs['swap_ms'], '{:.0f}')} (longest"
        f" {theirs['longest_swap_ms'].max():.0f})",
        f"the median latency is {most.loc[1, 'p50 to first']:.2f} times that of ten thousand at"
        f" one client and {most.loc[16, 'p50 to first']:.2f} times at 16",
        f"the p99 {most.loc[1, 'p99 to first']:.2f} and {most.loc[16, 'p99 to first']:.2f} times",
        f"a start takes {growth['start_s'].max():.1f} s",
        f"from {steady['rss_mb'].iloc[0]:.0f} to {later.iloc[0]:.0f} MB in the first six",
        f"between {later.min():.0f} and {later.max():.0f} MB",
        f"{logged:.0f} bytes of the write-ahead log",
    ):
        assert message in text, message
    readme = " ".join((peers.ROOT / "README.md").read_text(encoding="utf-8").split())
    one, many = mine.loc["logistic", "rate"][1], mine.loc["logistic", "rate"][64]
    cells = bare.loc[list(kinds)]
    assert (cells["rate"] > 1).all() and (cells["p99"] > 1).sum() == 5 and len(cells) == 6
    assert f"{one:,.0f} patients a second at one client and {many:,.0f} at 64" in readme
    assert "answers fewer; its p99 is lower in five of six measurements" in readme

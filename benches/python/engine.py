"""What a prefix in Terrace is worth to a real engine, and what Terrace costs one that finds nothing.

    round i   plain engine      cold: prompt i for the first time
              Terrace's engine  cold: the same prompt; its blocks are saved behind the answer
                                own prefix cache: the same prompt again
                                warm: own prefix cache dropped, the blocks come from the node
              numpy             a copy of as many bytes
                                (these three five times in turn; a round has their medians)
              LMCache's engine  cold and warm as above, where there is one (--lmcache)

Two vLLM engines in processes of their own (the CPU build, float32, a Llama of 125 million parameters with random
weights), one request at a time, in turn. Ratios are taken per round. Run it by `make bench-engine`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from interval import Ratio, paired
from servers import cpu_ns, lmcache, node

import terrace

HERE = Path(__file__).parent
LAYERS, KV_HEADS, HEAD, BLOCK = 12, 4, 64, 32
TOKEN_BYTES = LAYERS * KV_HEADS * HEAD * 2 * 4
VOCAB = 13_000
REPEATS = 5  # of what is short, in each round
WARM_UP = 256  # tokens of the worker's first request
SHAPE = ["--hidden", "768", "--inner", "3072", "--layers", "12", "--heads", "12", "--kv-heads", "4"]
SHAPE += ["--vocab", str(VOCAB)]


class Engine:
    """A worker process; `ask` answers when it has."""

    def __init__(self, log: Path, python: Path | str = sys.executable, **settings: Any) -> None:
        self.log = log
        with log.open("wb") as err:
            command = [str(python), str(HERE / "engine_worker.py"), json.dumps(settings)]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=err, text=True)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended: {self.log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def ask(self, **ask: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def await_blocks(client: terrace.Client, wanted: int) -> None:
    """Until the node holds so many blocks; the engine saves behind its answers. Seldom asked: asking costs it too."""
    until = time.monotonic() + 30
    while client.stats()["ram_blocks"] < wanted:
        if time.monotonic() > until:
            raise RuntimeError(f"{client.stats()['ram_blocks']} of {wanted} blocks were saved")
        time.sleep(0.2)


class Peer:
    """The same engine with LMCache's connector, and the process of its server."""

    def __init__(self, python: Path, folder: Path, common: dict[str, Any], port: int, pid: int) -> None:
        where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": where}
        self.pid = pid
        self.engine = Engine(folder / "lmcache-engine.log", python, **common, transfer=transfer)

    def round(self, ask: dict[str, Any]) -> dict[str, float]:
        before, server = self.engine.ask(account=True), cpu_ns(self.pid)
        cold = self.engine.ask(**ask)
        time.sleep(2)  # it saves behind its answer too, and does not tell
        after, server_s = self.engine.ask(account=True), (cpu_ns(self.pid) - server) / 1e9
        reset = self.engine.ask(reset=True)["reset"]
        warm = self.engine.ask(**ask)
        if cold["cached"] or not warm["cached"] or not reset or cold["token"] != warm["token"]:
            raise RuntimeError(f"LMCache: not what was meant to be measured: {cold} {reset} {warm}")
        cpu = after["process_s"] - before["process_s"] + server_s
        return {"lmcache_cold": cold["ttft_s"], "lmcache_warm": warm["ttft_s"], "cpu_lmcache": cpu}


class Engines:
    """One engine with Terrace and one without, in front of a node of their own."""

    def __init__(self, folder: Path, common: dict[str, Any], tokens: int, endpoint: str, node_pid: int) -> None:
        self.tokens, self.blocks, self.node_pid = tokens, (tokens - 1) // BLOCK, node_pid
        self.peer: Peer | None = None
        transfer = {
            "kv_connector": "TerraceConnector",
            "kv_connector_module_path": "terrace.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"endpoint": endpoint},
        }
        self.client = terrace.Client(endpoint)
        self.ours = Engine(folder / "terrace.log", **common, transfer=transfer)
        self.plain = Engine(folder / "plain.log", **common)
        self.held = WARM_UP // BLOCK
        await_blocks(self.client, self.held)
        moved = self.blocks * BLOCK * TOKEN_BYTES
        self.source, self.target = np.ones(moved, np.uint8), np.ones(moved, np.uint8)

    def close(self) -> None:
        self.ours.close()
        self.plain.close()
        if self.peer is not None:
            self.peer.engine.close()
        self.client.close()

    def cold(self, ask: dict[str, Any]) -> tuple[dict[str, Any], float, float]:
        """A prompt that nobody knows, until it is saved: the answer, and the CPU seconds of Terrace and of all."""
        before, server = self.ours.ask(account=True), cpu_ns(self.node_pid)
        answer = self.ours.ask(**ask)
        self.held += self.tokens // BLOCK
        await_blocks(self.client, self.held)
        after, server_s = self.ours.ask(account=True), (cpu_ns(self.node_pid) - server) / 1e9
        terrace_s = after["terrace_s"] - before["terrace_s"] + server_s
        return answer, terrace_s, after["process_s"] - before["process_s"] + server_s

    def without(self, ask: dict[str, Any]) -> tuple[dict[str, Any], float]:
        before = self.plain.ask(account=True)
        answer = self.plain.ask(**ask)
        return answer, self.plain.ask(account=True)["process_s"] - before["process_s"]

    def copy(self) -> float:
        started = time.perf_counter()
        np.copyto(self.target, self.source)
        return time.perf_counter() - started

    def again(self, ask: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], float, float]:
        """A prompt from the engine's own cache and from Terrace, a copy, and the CPU seconds of Terrace's part."""
        before = self.ours.ask(account=True)
        own = self.ours.ask(**ask)
        between, server = self.ours.ask(account=True), cpu_ns(self.node_pid)
        reset = self.ours.ask(reset=True)["reset"]
        warm = self.ours.ask(**ask)
        after, server_s = self.ours.ask(account=True), (cpu_ns(self.node_pid) - server) / 1e9
        loaded = [moment["loaded_blocks"] for moment in (before, between, after)]
        wanted = [before["loaded_blocks"], before["loaded_blocks"], before["loaded_blocks"] + self.blocks]
        known = self.blocks * BLOCK
        if (own["cached"], warm["cached"], loaded, reset) != (known, known, wanted, True):
            raise RuntimeError(f"not what was meant to be measured: {own} {warm} {loaded} {reset}")
        return own, warm, self.copy(), after["terrace_s"] - between["terrace_s"] + server_s

    def round(self, turn: int) -> dict[str, float]:
        """One prompt in every way; seconds, of the clock and of the CPU."""
        ask = {"generate": turn + 1, "tokens": self.tokens}
        if turn % 2:
            plain, plain_s = self.without(ask)
        cold, terrace_s, all_s = self.cold(ask)
        if not turn % 2:
            plain, plain_s = self.without(ask)
        again = [self.again(ask) for _ in range(REPEATS)]
        if plain["cached"] or cold["cached"]:
            raise RuntimeError(f"not what was meant to be measured: {plain} {cold}")
        tokens = [plain["token"], cold["token"], *(answer["token"] for both in again for answer in both[:2])]
        if any(token != tokens[0] for token in tokens):
            raise RuntimeError(f"tokens differ: {tokens}")
        peer = self.peer.round(ask) if self.peer is not None else {}
        return peer | {
            "plain": plain["ttft_s"],
            "cold": cold["ttft_s"],
            "own": median(own["ttft_s"] for own, _, _, _ in again),
            "warm": median(warm["ttft_s"] for _, warm, _, _ in again),
            "copy": median(copy for _, _, copy, _ in again),
            "cpu_load": median(load_s for _, _, _, load_s in again),
            "cpu_terrace": terrace_s,
            "cpu_all": all_s,
            "cpu_plain": plain_s,
        }


def show(what: str, ratio: Ratio, bar: float | None = None) -> dict[str, Any]:
    verdict = f"bar <= {bar}: {ratio.at_most(bar)}" if bar is not None else ""
    print(f"  {what:62} {ratio.show():26} {verdict}".rstrip())
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high, "bar": bar}


def report(rounds: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    rows = {name: [row[name] for row in rounds] for name in rounds[0]}
    moved = (tokens - 1) // BLOCK * BLOCK * TOKEN_BYTES
    print(f"time to first token, {tokens} tokens, {moved >> 20} MiB of KV, {len(rounds)} rounds, medians")
    for name, what in (
        ("plain", "cold, engine without Terrace"),
        ("cold", "cold, with Terrace (nothing found, all saved)"),
        ("own", "again, from the engine's own prefix cache"),
        ("warm", "again, from Terrace"),
        ("copy", "a copy of as many bytes"),
        ("lmcache_cold", "cold, with LMCache (nothing found, all saved)"),
        ("lmcache_warm", "again, from LMCache"),
    ):
        if name not in rows:
            continue
        print(f"  {what:46} {median(rows[name]) * 1e3:9.1f} ms")
    print(f"  {'CPU of a cold request, with and without Terrace':46}", end="")
    print(f" {median(rows['cpu_all']) * 1e3:9.1f} ms {median(rows['cpu_plain']) * 1e3:9.1f} ms")
    if "cpu_lmcache" in rows:
        show("beside LMCache: warm to its warm", paired(rows["warm"], rows["lmcache_warm"]))
        show("beside LMCache: CPU of a cold request to its", paired(rows["cpu_all"], rows["cpu_lmcache"]))
    print(f"  {'CPU of Terrace in a warm request':46} {median(rows['cpu_load']) * 1e3:9.1f} ms")
    floor = [copy + own for copy, own in zip(rows["copy"], rows["own"], strict=True)]
    return {
        "tokens": tokens,
        "bytes": moved,
        "rounds": rows,
        "warm_to_cold": show("warm to cold", paired(rows["warm"], rows["cold"]), 0.1),
        "warm_to_floor": show("warm to (copy + suffix after a hit of its own)", paired(rows["warm"], floor), 1.15),
        "cpu_share": show(
            "no reuse: CPU of connector and node, share of the request's",
            paired(rows["cpu_terrace"], rows["cpu_all"]),
            0.02,
        ),
        "cpu_to_plain": show("no reuse: CPU with Terrace to CPU without", paired(rows["cpu_all"], rows["cpu_plain"])),
        "cold_to_plain": show("no reuse: time to first token, with to without", paired(rows["cold"], rows["plain"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvserver", type=Path, default=Path("target/release/kvserver"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, help="begin no round after so many seconds of them")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model", type=Path, help="folder of the model; made there if it is missing")
    parser.add_argument("--lmcache", type=Path, help="python of an environment with vLLM and LMCache, to go beside")
    parser.add_argument("--json", type=Path, help="the figures as one JSON object to this file")
    options = parser.parse_args()
    common: dict[str, Any] = {
        "vocab": VOCAB,
        "max_tokens": options.tokens + 64,
        "kv_cache_bytes": 2 * (options.tokens + 64) * TOKEN_BYTES,
    }
    rounds: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = options.model or folder / "model"
        if not (model / "config.json").is_file():
            maker = HERE.parent.parent / "tests" / "python" / "vllm" / "model.py"
            subprocess.run([sys.executable, str(maker), str(model), *SHAPE], check=True)
        common["model"] = str(model)
        # An owner may lease a quarter of the memory, and a prompt is one lease: few rounds still need room.
        mib = (max(options.rounds, 6) + 2) * options.tokens * TOKEN_BYTES * 5 // 4 >> 20
        endpoint, pid = stack.enter_context(node(options.kvserver, folder, ram_bytes=f"{mib}MiB"))
        server = stack.enter_context(lmcache(options.lmcache, folder, -(-mib // 1024))) if options.lmcache else None
        engines = Engines(folder, common, options.tokens, endpoint, pid)
        stack.callback(engines.close)
        if server is not None:
            engines.peer = Peer(options.lmcache, folder, common, *server)
        started = time.monotonic()
        for turn in range(options.rounds):
            if options.seconds is not None and time.monotonic() - started > options.seconds:
                break
            rounds.append(engines.round(turn))
            print(f"round {turn + 1} of {options.rounds}", end="\r", file=sys.stderr, flush=True)
    result = report(rounds, options.tokens)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

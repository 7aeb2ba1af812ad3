"""What a prefix in Terrace is worth to a real engine, and what Terrace costs one that finds nothing.

    round i   plain engine      cold: prompt i for the first time
              Terrace's engine  cold: the same prompt; its blocks are saved behind the answer
                                own prefix cache: the same prompt again
                                warm: own prefix cache dropped, the blocks come from the node
              numpy             a copy of as many bytes

Two vLLM engines in processes of their own (the CPU build, float32, a Llama of 125 million parameters with random weights),
one request at a time, in turn. Ratios are taken per round. Run it by `make bench-engine`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from interval import Ratio, paired
from servers import cpu_ns, node

import terrace

HERE = Path(__file__).parent
LAYERS, KV_HEADS, HEAD, BLOCK = 12, 4, 64, 32
TOKEN_BYTES = LAYERS * KV_HEADS * HEAD * 2 * 4
SHAPE = ["--hidden", "768", "--inner", "3072", "--layers", "12", "--heads", "12", "--kv-heads", "4", "--vocab", "13000"]


class Engine:
    """A worker process; `ask` answers when it has."""

    def __init__(self, log: Path, **settings: Any) -> None:
        self.log = log
        with log.open("wb") as err:
            command = [sys.executable, str(HERE / "engine_worker.py"), json.dumps(settings)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True)
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


def await_blocks(endpoint: str, wanted: int) -> None:
    """Until the node holds so many blocks; the engine saves behind its answers."""
    with terrace.Client(endpoint) as client:
        until = time.monotonic() + 30
        while client.stats()["blocks"] < wanted:
            if time.monotonic() > until:
                raise RuntimeError(f"{client.stats()['blocks']} of {wanted} blocks were saved")
            time.sleep(0.02)


def show(what: str, ratio: Ratio, bar: float) -> dict[str, Any]:
    print(f"  {what:62} {ratio.show():26} bar <= {bar}: {ratio.at_most(bar)}")
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high, "bar": bar, "verdict": ratio.at_most(bar)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvserver", type=Path, default=Path("target/release/kvserver"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model", type=Path, help="folder of the model; made there if it is missing")
    parser.add_argument("--json", type=Path, help="the figures as one JSON object to this file")
    options = parser.parse_args()
    blocks = (options.tokens - 1) // BLOCK
    moved = blocks * BLOCK * TOKEN_BYTES
    rows: dict[str, list[float]] = {name: [] for name in ("plain", "cold", "own", "warm", "copy", "cpu")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = options.model or folder / "model"
        if not (model / "config.json").is_file():
            maker = HERE.parent.parent / "tests" / "python" / "vllm" / "model.py"
            subprocess.run([sys.executable, str(maker), str(model), *SHAPE], check=True)
        ram = f"{(options.rounds + 2) * moved * 5 // 4 >> 20}MiB"
        with node(options.kvserver, folder, ram_bytes=ram) as (endpoint, pid):
            common: dict[str, Any] = {
                "model": str(model),
                "vocab": 13000,
                "max_tokens": options.tokens + 64,
                "kv_cache_bytes": 2 * (options.tokens + 64) * TOKEN_BYTES,
            }
            transfer = {
                "kv_connector": "TerraceConnector",
                "kv_connector_module_path": "terrace.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"endpoint": endpoint},
            }
            engine = Engine(folder / "terrace.log", **common, transfer=transfer)
            plain = Engine(folder / "plain.log", **common)
            source, target = np.ones(moved, np.uint8), np.zeros(moved, np.uint8)
            held = 256 // BLOCK
            try:
                for turn in range(options.rounds):
                    ask = {"generate": turn + 1, "tokens": options.tokens}
                    if turn % 2:
                        rows["plain"].append((first := plain.ask(**ask))["ttft_s"])
                    before, server = engine.ask(account=True), cpu_ns(pid)
                    cold = engine.ask(**ask)
                    held += options.tokens // BLOCK
                    await_blocks(endpoint, held)
                    after, server = engine.ask(account=True), (cpu_ns(pid) - server) / 1e9
                    if not turn % 2:
                        rows["plain"].append((first := plain.ask(**ask))["ttft_s"])
                    own = engine.ask(**ask)
                    engine.ask(reset=True)
                    warm = engine.ask(**ask)
                    if warm["cached"] < blocks * BLOCK or cold["cached"] or own["cached"] < blocks * BLOCK:
                        raise RuntimeError(f"not what was meant to be measured: {cold} {own} {warm}")
                    if not first["token"] == cold["token"] == own["token"] == warm["token"]:
                        raise RuntimeError(f"tokens differ: {first} {cold} {own} {warm}")
                    started = time.perf_counter()
                    np.copyto(target, source)
                    rows["copy"].append(time.perf_counter() - started)
                    for name, got in (("cold", cold), ("own", own), ("warm", warm)):
                        rows[name].append(got["ttft_s"])
                    ours = after["terrace_s"] - before["terrace_s"] + server
                    rows["cpu"].append(ours / (after["process_s"] - before["process_s"] + server))
                    print(f"round {turn + 1} of {options.rounds}", end="\r", file=sys.stderr, flush=True)
            finally:
                engine.close()
                plain.close()
    print(f"time to first token, {options.tokens} tokens, {moved >> 20} MiB of KV, {options.rounds} rounds, medians")
    for name, what in (
        ("plain", "cold, engine without Terrace"),
        ("cold", "cold, with Terrace (nothing found, all saved)"),
        ("own", "again, from the engine's own prefix cache"),
        ("warm", "again, from Terrace"),
        ("copy", "a copy of as many bytes"),
    ):
        print(f"  {what:46} {sorted(rows[name])[len(rows[name]) // 2] * 1e3:9.1f} ms")
    floor = [copy + own for copy, own in zip(rows["copy"], rows["own"], strict=True)]
    result = {
        "tokens": options.tokens,
        "bytes": moved,
        "rounds": rows,
        "warm_to_cold": show("warm to cold", paired(rows["warm"], rows["cold"]), 0.1),
        "warm_to_floor": show("warm to (copy + suffix after a hit of its own)", paired(rows["warm"], floor), 1.15),
        "cpu_share": show("no reuse: CPU of connector and server, share of the request's", paired(rows["cpu"], [1.0] * len(rows["cpu"])), 0.02),
    }
    ratio = paired(rows["cold"], rows["plain"])
    print(f"  {'cold with Terrace to cold without':62} {ratio.show()}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

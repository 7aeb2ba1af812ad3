"""Which of 512 blocks are there, asked from Python on the node's host: Terrace beside Redis.

    terrace   Cache.exists       one call, all hashes; the thread waits with the interpreter's lock released
              Cache.lookup       the same without waiting: what the call costs its thread
    redis     EXISTS, pipelined  one write of a request made beforehand, answers through hiredis' C parser

Each round measures every row in turn; ratios are taken per round. Run it by `make bench-lookup`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hiredis
from interval import paired, percentile
from servers import node, redis

import terrace

KEYS = 512
WIDTH = 32
CHAINS = 8
BLOCK_BYTES = 4096


def hashes(chain: int) -> bytes:
    return b"".join(hashlib.sha256(f"{chain}/{i}".encode()).digest() for i in range(KEYS))


class Redis:
    """One connection; every request is made beforehand."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = hiredis.Reader()
        self.requests = []
        for chain in range(CHAINS):
            names = [hashes(chain)[i * WIDTH : (i + 1) * WIDTH] for i in range(KEYS)]
            for name in names:
                self._call(hiredis.pack_command((b"SET", name, bytes(BLOCK_BYTES))), 1)
            self.requests.append(b"".join(hiredis.pack_command((b"EXISTS", name)) for name in names))

    def _call(self, request: bytes, answers: int) -> list[object]:
        self.socket.sendall(request)
        got: list[object] = []
        while len(got) < answers:
            answer = self.reader.gets()
            if answer is False:
                self.reader.feed(self.socket.recv(1 << 16))
                continue
            got.append(answer)
        return got

    def exists(self, chain: int) -> int:
        return self._call(self.requests[chain], KEYS).count(1)


class Terrace:
    """A cache as an engine has it, and its blocks."""

    def __init__(self, endpoint: str) -> None:
        self.cache = terrace.Cache(endpoint, {"label": "bench", "block_tokens": 16}, owner=bytes(16))
        until = time.monotonic() + 20
        while self.cache.state() != "ready" and time.monotonic() < until:
            time.sleep(0.01)
        self.hashes = [hashes(chain) for chain in range(CHAINS)]
        self.requests = 0
        self.memory = bytearray(KEYS * BLOCK_BYTES)

    def fill(self) -> None:
        import ctypes

        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.cache.layout([(address, KEYS, BLOCK_BYTES, BLOCK_BYTES)])
        for chain in range(CHAINS):
            if not self.cache.save(chain, self.hashes[chain], WIDTH, 0, range(KEYS)):
                raise RuntimeError("the queue of saves is full")
            done = self.cache.wait(chain, 30_000)
            if done is None or not done.ok:
                raise RuntimeError(f"a save did not end well: {done}")

    def exists(self, chain: int) -> int:
        return self.cache.exists(self.hashes[chain], WIDTH, 1000)

    def ask(self, chain: int) -> int:
        """Only the part that the caller's thread pays; the answer is fetched, and dropped, outside the timing."""
        self.requests += 1
        request = f"r{self.requests}"
        self.cache.lookup(request, self.hashes[chain], WIDTH, 0, True)
        self.last = request
        return KEYS

    def settle(self, chain: int) -> None:
        until = time.monotonic() + 1
        while self.cache.lookup(self.last, self.hashes[chain], WIDTH, 0, True) is None:
            if time.monotonic() > until:
                raise RuntimeError("a lookup was not answered")
            time.sleep(0)
        self.cache.forget(self.last)


def laps(call: Callable[[int], int], count: int, after: Callable[[int], None] | None = None) -> list[float]:
    """Microseconds of each call."""
    times = []
    for i in range(count):
        chain = i % CHAINS
        started = time.perf_counter_ns()
        found = call(chain)
        times.append((time.perf_counter_ns() - started) / 1e3)
        if found != KEYS:
            raise RuntimeError(f"{found} of {KEYS} are there")
        if after is not None:
            after(chain)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvserver", type=Path, default=Path("target/release/kvserver"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=400, help="lookups of each row in a round")
    parser.add_argument("--json", type=Path, help="the figures as one JSON object to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with redis(folder) as port, node(options.kvserver, folder, ram_bytes="256MiB") as (endpoint, _pid):
            theirs, ours = Redis(port), Terrace(endpoint)
            ours.fill()
            rows: dict[str, list[list[float]]] = {"redis": [], "terrace": [], "terrace, caller's thread": []}
            for turn in range(options.rounds):
                order = [
                    ("redis", theirs.exists, None),
                    ("terrace", ours.exists, None),
                    ("terrace, caller's thread", ours.ask, ours.settle),
                ]
                for name, call, after in order[turn % 3 :] + order[: turn % 3]:
                    laps(call, options.calls // 8, after)
                    rows[name].append(laps(call, options.calls, after))
            in_use = ours.cache.path()["in_use"]
            ours.cache.close()
    result: dict[str, object] = {"keys": KEYS, "rounds": options.rounds, "path": in_use}
    print(f"lookup of {KEYS} keys from Python, same host, path {in_use}, {options.rounds} rounds of {options.calls}")
    for name, rounds in rows.items():
        p50 = percentile([percentile(r, 0.5) for r in rounds], 0.5)
        p99 = percentile([percentile(r, 0.99) for r in rounds], 0.5)
        result[name] = {"p50_us": p50, "p99_us": p99}
        print(f"  {name:26} p50 {p50:8.1f} us   p99 {p99:8.1f} us")
    ratio = paired(*([percentile(r, 0.99) for r in rows[name]] for name in ("terrace", "redis")))
    interval = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
    result["p99_ratio"] = {**interval, "bar": 0.5, "verdict": ratio.at_most(0.5)}
    print(f"  p99 to redis {ratio.show()}   bar <= 0.5: {ratio.at_most(0.5)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

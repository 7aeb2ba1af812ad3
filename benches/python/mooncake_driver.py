"""Drives Mooncake's store the way its users do on one host: daemon, dummy client, shared memory.

    side_by_side ──a line of JSON──► this process ──RPC──► mooncake_client (daemon) ──► segment
                 ◄─a line of JSON──      └────────── shared memory pool ──────────────┘

One line in, one line out. {"fill": bytes, "values": n} stores values; {"op": "get" | "put" | "exists", "bytes": n,
"keys": k, "values": n, "warm_s": x, "measure_s": y} runs one window and answers {"ops", "bytes", "wall_s",
"client_cpu_s", "server_cpu_s", "nanos": [...]}; {"error": "..."} says why not. One operation moves `keys` values: 1 by
get_into and put_from, more by batch_get_into and batch_put_from. Buffers lie in the client's shared pool, where
Mooncake needs no copy of its own.
Keys are made before the window, nothing else is done between two operations. Mooncake's dummy client does not verify
what it reads; this program checks the first and last byte of what it filled, once per fill.

Source: the interface of mooncake.store.MooncakeDistributedStore in mooncake-transfer-engine-non-cuda 0.3.13.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooncake.store import MooncakeDistributedStore

MIB = 1 << 20
POOL_BYTES = 256 * MIB
BUFFER_BYTES = 64 * MIB


def cpu_ns(pids: list[int]) -> int:
    """CPU time of all threads of some processes, from the scheduler's own account."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split(" ", 1)[0])
    return total


class Driver:
    """The one client, its buffers, and what was stored."""

    def __init__(self, server: str, server_pids: list[int]) -> None:
        self.server_pids = server_pids
        self.store = MooncakeDistributedStore()
        if self.store.setup_dummy(POOL_BYTES, BUFFER_BYTES, server) != 0:
            raise RuntimeError(f"no Mooncake client daemon answers at {server}")
        self.buffer = self.store.alloc_from_mem_pool(BUFFER_BYTES)
        if not self.buffer:
            raise RuntimeError(f"the shared pool has no {BUFFER_BYTES} bytes")
        if self.store.register_buffer(self.buffer, BUFFER_BYTES) != 0:
            raise RuntimeError("the daemon did not map the shared pool")
        ctypes.memset(self.buffer, 0xA5, BUFFER_BYTES)
        self.fresh: list[str] = []
        self.count = 0

    def fill(self, size: int, values: int) -> dict[str, Any]:
        for number in range(values):
            ctypes.memset(self.buffer, number & 0xFF, size)
            if self.store.put_from(f"{size}/{number}", self.buffer, size) != 0:
                raise RuntimeError(f"put of value {number} of {size} bytes was refused")
        for number in (0, values - 1):
            ctypes.memset(self.buffer, 0x5A, size)
            got = self.store.get_into(f"{size}/{number}", self.buffer, size)
            seen = ctypes.string_at(self.buffer, size)
            if got != size or {seen[0], seen[-1]} != {number & 0xFF}:
                raise RuntimeError(f"value {number} of {size} bytes came back wrong")
        return {"values": values}

    def run(self, ask: dict[str, Any]) -> dict[str, Any]:
        op, size, keys, values = ask["op"], ask["bytes"], ask["keys"], ask["values"]
        step = getattr(self, f"_{op}")(size, keys, values)
        until = time.perf_counter() + ask["warm_s"]
        while time.perf_counter() < until:
            step()
        nanos: list[int] = []
        servers, cpu, started = cpu_ns(self.server_pids), time.process_time(), time.perf_counter_ns()
        until_ns = started + int(ask["measure_s"] * 1e9)
        now = started
        while now < until_ns:
            step()
            after = time.perf_counter_ns()
            nanos.append(after - now)
            now = after
        cpu = time.process_time() - cpu
        servers = cpu_ns(self.server_pids) - servers
        for name in self.fresh:  # or the segment fills up, and what is read later is evicted
            self.store.remove(name)
        self.fresh.clear()
        return {
            "ops": len(nanos),
            "bytes": 0 if op == "exists" else len(nanos) * keys * size,
            "wall_s": (now - started) / 1e9,
            "client_cpu_s": cpu,
            "server_cpu_s": servers / 1e9,
            "nanos": nanos,
        }

    def _batches(self, size: int, keys: int, values: int) -> list[list[str]]:
        names = [f"{size}/{number}" for number in range(values)]
        return [names[at : at + keys] for at in range(0, values - keys + 1, keys)]

    def _places(self, size: int, keys: int) -> list[int]:
        if size * keys > BUFFER_BYTES:
            raise RuntimeError(f"{keys} values of {size} bytes do not fit the buffer")
        return [self.buffer + i * size for i in range(keys)]

    def _get(self, size: int, keys: int, values: int) -> Callable[[], None]:
        batches, places, sizes = self._batches(size, keys, values), self._places(size, keys), [size] * keys
        at = 0

        def one() -> None:
            nonlocal at
            if self.store.get_into(batches[at][0], places[0], size) != size:
                raise RuntimeError(f"{batches[at][0]} is gone")
            at = (at + 1) % len(batches)

        def many() -> None:
            nonlocal at
            if self.store.batch_get_into(batches[at], places, sizes) != sizes:
                raise RuntimeError(f"one of {batches[at]} is gone")
            at = (at + 1) % len(batches)

        return one if keys == 1 else many

    def _put(self, size: int, keys: int, _values: int) -> Callable[[], None]:
        places, sizes = self._places(size, keys), [size] * keys

        def one() -> None:
            name = self._name(size)
            if self.store.put_from(name, places[0], size) != 0:
                raise RuntimeError("a put was refused")

        def many() -> None:
            names = [self._name(size) for _ in range(keys)]
            if any(self.store.batch_put_from(names, places, sizes)):
                raise RuntimeError("a put was refused")

        return one if keys == 1 else many

    def _name(self, size: int) -> str:
        self.count += 1
        self.fresh.append(f"new/{size}/{self.count}")
        return self.fresh[-1]

    def _exists(self, size: int, keys: int, values: int) -> Callable[[], None]:
        batches = self._batches(size, keys, values)
        at = 0

        def step() -> None:
            nonlocal at
            if self.store.batch_is_exist(batches[at]) != [1] * keys:
                raise RuntimeError(f"one of {batches[at]} is gone")
            at = (at + 1) % len(batches)

        return step


def main() -> None:
    driver = Driver(sys.argv[1], [int(pid) for pid in sys.argv[2:]])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            answer = driver.fill(ask["fill"], ask["values"]) if "fill" in ask else driver.run(ask)
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

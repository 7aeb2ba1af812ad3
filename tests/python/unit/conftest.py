"""A real node in a folder of its own, and memory as an engine has it."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import terrace

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 30.0
OWNER = b"unit tests' own."
WIDTH = 32


def until(true: Callable[[], bool], what: str) -> None:
    """Waits for a fact, not for a time."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Node:
    """`kvserver`, which can be killed, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.http = free_port(), free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = os.environ.get("TERRACE_KVSERVER") or str(ROOT / "target" / "debug" / "kvserver")
        arguments = {
            "--data-dir": str(self.folder / "data"),
            "--listen": self.endpoint,
            "--http-listen": f"127.0.0.1:{self.http}",
            "--ram-bytes": "128MiB",
            "--nvme-bytes": "256MiB",
        }
        flat = [word for pair in arguments.items() for word in pair]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([binary, *flat], stdout=log, stderr=log)

    def calls(self) -> Counter[str]:
        """Calls answered so far, by name, whichever way they came."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/metrics", timeout=10) as metrics:
            lines = metrics.read().decode().splitlines()
        calls: Counter[str] = Counter()
        for line in lines:
            if found := re.match(r'terrace_(?:local_)?calls_total{.*(?:call|method)="(\w+)".*} (\d+)', line):
                calls[found[1].lower()] += int(found[2])
        return calls

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until every thread has stopped

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    node.start()
    yield node
    node.kill()


class Memory:
    """What an engine has: layers of blocks, side by side."""

    def __init__(self, blocks: int = 32, layers: int = 3, block_bytes: int = 8192) -> None:
        self.blocks, self.layers, self.block_bytes = blocks, layers, block_bytes
        self.buffer = (ctypes.c_char * (blocks * layers * block_bytes))()
        self.address = ctypes.addressof(self.buffer)

    def layout(self) -> list[tuple[int, int, int, int]]:
        layer_bytes = self.blocks * self.block_bytes
        return [
            (self.address + layer * layer_bytes, self.blocks, self.block_bytes, self.block_bytes)
            for layer in range(self.layers)
        ]

    def fill(self, data: bytes) -> None:
        ctypes.memmove(self.address, data, len(self.buffer))

    def scramble(self) -> bytes:
        data = os.urandom(len(self.buffer))
        self.fill(data)
        return data

    def clear(self) -> None:
        ctypes.memset(self.address, 0, len(self.buffer))

    def block(self, block: int, data: bytes | None = None) -> bytes:
        """A block's bytes, all layers; of a copy of the memory, if one is given."""
        data = bytes(self.buffer) if data is None else data
        starts = (((layer * self.blocks) + block) * self.block_bytes for layer in range(self.layers))
        return b"".join(data[start : start + self.block_bytes] for start in starts)


def hashes(count: int, salt: int = 0) -> bytes:
    """Hashes as an engine makes them: one per block, each naming what stands before it."""
    return b"".join((salt * 10_000 + i).to_bytes(4, "little") * (WIDTH // 4) for i in range(1, count + 1))


@pytest.fixture
def connect(node: Node) -> Iterator[Callable[..., terrace.Cache]]:
    """Makes caches of the node, ready ones unless told otherwise, and closes them."""
    made: list[terrace.Cache] = []

    def make(*, ready: bool = True, label: str = "unit", **settings: object) -> terrace.Cache:
        settings = {"lookup_timeout_ms": 2000, **settings}
        cache = terrace.Cache(node.endpoint, {"label": label}, owner=OWNER, **settings)  # type: ignore[arg-type]
        made.append(cache)
        if ready:
            until(lambda: cache.state() == "ready", "the cache to be ready")
        return cache

    yield make
    for cache in made:
        cache.close()


def ask(cache: terrace.Cache, request: str, names: bytes, first: int = 0, *, probe: bool = False) -> int:
    """A lookup, asked until it is answered, as a scheduler does step by step."""
    found: list[int] = []

    def answered() -> bool:
        blocks = cache.lookup(request, names, WIDTH, first, probe)
        if blocks is not None:
            found.append(blocks)
        return bool(found)

    until(answered, "the lookup's answer")
    return found[0]


def saved(cache: terrace.Cache, job: int, names: bytes, ids: list[int], first: int = 0) -> terrace.Finished:
    assert cache.save(job, names, WIDTH, first, ids)
    done = cache.wait(job, 20_000)
    assert done is not None
    return done


def loaded(
    cache: terrace.Cache, job: int, lease: int, names: bytes, ids: list[int], first: int = 0
) -> terrace.Finished:
    assert cache.load(job, lease, names, WIDTH, first, ids)
    done = cache.wait(job, 20_000)
    assert done is not None
    return done

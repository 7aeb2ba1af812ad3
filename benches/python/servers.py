"""Servers that a bench starts, on loopback ports that were free a moment ago, and ends by their process."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not answer: {log.read_text()[-500:]}")


@contextlib.contextmanager
def _running(command: list[str], port: int, log: Path, env: dict[str, str] | None) -> Iterator[int]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
    try:
        _await(port, process, log)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[int]:
    """A Redis without persistence; its port."""
    if shutil.which("redis-server") is None:
        raise RuntimeError("redis-server is not installed (apt-get install redis-server)")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _running(command, port, folder / "redis.log", None):
        yield port


@contextlib.contextmanager
def node(program: Path, folder: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """A Terrace node with its data in `folder`; its endpoint and its process id."""
    port = free_port()
    values = {
        "data_dir": str(folder),
        "listen": f"127.0.0.1:{port}",
        "http_listen": "off",
        "nvme_bytes": "0",
        "durable_bytes": "0",
        "log": "warn",
    } | settings
    env = {name: value for name, value in os.environ.items() if not name.startswith("TERRACE_")}
    env |= {f"TERRACE_{name.upper()}": value for name, value in values.items()}
    with _running([str(program)], port, folder / "kvserver.log", env) as pid:
        yield f"127.0.0.1:{port}", pid


@contextlib.contextmanager
def lmcache(python: Path, folder: Path, gib: int) -> Iterator[tuple[int, int]]:
    """LMCache's multiprocess server, of the environment that `python` is of; its port and its process id."""
    port = free_port()
    command = [str(python.parent / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--l1-size-gb", str(gib), "--eviction-policy", "LRU"]  # its own chunks of 256 tokens: what users have
    command += ["--supported-transfer-mode", "engine_driven"]  # by itself it waits for a GPU
    command += ["--http-port", str(free_port()), "--disable-observability"]
    env = os.environ | {"LMCACHE_TRACK_USAGE": "false"}
    with _running(command, port, folder / "lmcache.log", env) as pid:
        yield port, pid


def cpu_ns(*pids: int) -> int:
    """CPU time of some processes, with that of their threads that have ended."""
    clocks = ((~pid << 3) | 2 for pid in pids)  # as clock_getcpuclockid(3) makes them
    return sum(map(time.clock_gettime_ns, clocks))

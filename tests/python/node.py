"""A node for tests in Python: one `kvserver` process with ports and a folder of its own, to be killed and restarted."""

import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def binary() -> str:
    """The node's binary: `TERRACE_KVSERVER`, or what cargo built last."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    built = [target / kind / "kvserver" for kind in ("release", "debug")]
    found = [str(path) for path in built if path.exists()]
    said = os.environ.get("TERRACE_KVSERVER")
    assert said or found, f"no kvserver in {target}: cargo build -p kvserver, or say where with TERRACE_KVSERVER"
    return said or max(found, key=os.path.getmtime)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Node:
    def __init__(self, *arguments: str, ram: str = "256MiB"):
        self.folder = tempfile.TemporaryDirectory(prefix="terrace-node-")
        self.port, self.http = free_port(), free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self.arguments = [f"--ram-bytes={ram}", "--nvme-bytes=512MiB", *arguments]
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self, seconds: float = 30) -> None:
        log = (pathlib.Path(self.folder.name) / "log").open("ab")
        self.process = subprocess.Popen(
            [binary(), f"--listen=127.0.0.1:{self.port}", f"--http-listen=127.0.0.1:{self.http}",
             f"--data-dir={self.folder.name}/data", *self.arguments],
            stdout=log, stderr=log,
        )  # fmt: skip
        log.close()
        until = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < until, self.log()
                time.sleep(0.02)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait(10)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until every thread has stopped

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.thaw()
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def log(self) -> str:
        return (pathlib.Path(self.folder.name) / "log").read_text(errors="replace")

    def close(self) -> None:
        self.stop()
        self.folder.cleanup()

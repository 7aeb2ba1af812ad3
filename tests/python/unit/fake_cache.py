"""A node and a `terrace.Cache` in plain Python, driven by hand: nothing happens until the test says `run`.

It keeps the promises of `_terrace.pyi` that a connector relies on, and checks those that a connector gives: one answer
per request until `forget`, jobs numbered once, blocks read when the job runs and not before.
"""

import ctypes
from array import array
from dataclasses import dataclass, field


@dataclass
class FakeNode:
    """What is stored, for all caches; `part` belongs to the key."""

    blocks: dict[tuple[tuple[int, int], bytes], bytes] = field(default_factory=dict)
    leases: dict[int, str] = field(default_factory=dict)
    away: bool = False


@dataclass
class FakeFinished:
    job: int
    kind: str
    blocks: int
    bytes: int
    failed_block_ids: list[int]
    seconds: float
    reason: str | None

    @property
    def ok(self) -> bool:
        return not self.failed_block_ids


class LaidOut:
    """The engine's memory where `layout` says it is, as the real cache copies it."""

    def __init__(self):
        self.layers = []

    def __getitem__(self, block):
        return b"".join(ctypes.string_at(at + block * stride, size) for at, _, stride, size in self.layers)

    def __setitem__(self, block, data):
        for at, blocks, stride, size in self.layers:
            assert 0 <= block < blocks
            ctypes.memmove(at + block * stride, data[:size].ljust(size, b"?"), min(size, len(data)) if data else 0)
            data = data[size:]


class FakeCache:
    """`memory` stands for the engine's KV: block id -> bytes; without one it is where `layout` says."""

    def __init__(self, node, memory=None, *, part=(0, 0), parts=None, slow=0, max_jobs=256):
        self.node, self.memory, self.part, self.parts = (
            node,
            LaidOut() if memory is None else memory,
            part,
            parts or [part],
        )
        self.slow, self.max_jobs = slow, max_jobs  # asks that answer None before one answers
        self.answers, self.asked, self.leases, self.missed = {}, {}, {}, set()
        self.queue, self.ended, self.used = [], [], set()
        self.bad = set()  # hashes whose load fails
        self.log, self.closed, self.differs = [], False, None

    def _split(self, hashes, width):
        assert width and len(hashes) % width == 0
        return [bytes(hashes[i : i + width]) for i in range(0, len(hashes), width)]

    def state(self):
        return "down" if self.node.away or self.closed else "ready"

    def news(self):
        return None

    def difference(self):
        return self.differs

    def lookup(self, request, hashes, width, first, probe=False):
        if self.state() != "ready":
            return 0
        chain = self._split(hashes, width)
        if request not in self.answers:
            asks = self.asked[request] = self.asked.get(request, 0) + 1
            if asks <= self.slow:
                return None
            present = 0
            for block in chain[first:]:
                if block in self.missed or any((part, block) not in self.node.blocks for part in self.parts):
                    break
                present += 1
            self.answers[request] = first, present
            if present and not probe:
                lease = 1 + max(self.node.leases, default=0)
                self.node.leases[lease] = request
                self.leases[request] = lease
        start, present = self.answers[request]
        good = [block not in self.missed for block in chain[start : start + present]] + [False]
        return max(0, start + good.index(False) - first)

    def exists(self, hashes, width, timeout_ms, first=0, request=None):
        if request is not None:
            return self.lookup(request, hashes, width, first) or 0
        count = self.lookup("look", hashes, width, first, probe=True) or 0
        self.forget("look")
        return count

    def lease(self, request):
        return self.leases.get(request, 0)

    def forget(self, request):
        self.answers.pop(request, None)
        self.asked.pop(request, None)
        self.node.leases.pop(self.leases.pop(request, 0), None)

    def miss(self, hashes, width):
        self.missed.update(self._split(hashes, width))

    def saved(self, hashes, width):
        self.missed.difference_update(self._split(hashes, width))

    def layout(self, layers):
        self.log.append(("layout", len(layers)))
        if isinstance(self.memory, LaidOut):
            self.memory.layers = list(layers)

    def _start(self, kind, job, hashes, width, first, block_ids):
        assert job not in self.used, "a job's number is used once"
        block_ids = array("I", block_ids) if isinstance(block_ids, bytes) else block_ids
        chain = self._split(hashes, width)
        assert len(chain) >= first + len(block_ids)
        if self.closed or len(self.queue) >= self.max_jobs:
            return False
        self.used.add(job)
        self.queue.append((kind, job, chain[first : first + len(block_ids)], list(block_ids)))
        return True

    def load(self, job, lease, hashes, width, first, block_ids):
        return self._start("load", job, hashes, width, first, block_ids)

    def save(self, job, hashes, width, first, block_ids):
        return self._start("save", job, hashes, width, first, block_ids)

    def run(self):
        """Does what is queued."""
        for kind, job, hashes, ids in self.queue:
            failed = []
            for block, where in zip(hashes, ids, strict=True):
                key = (self.part, block)
                if self.node.away:
                    failed.append(where)
                elif kind == "save":
                    self.node.blocks[key] = self.memory[where]
                elif block in self.bad or key not in self.node.blocks:
                    self.memory[where] = b"garbage"
                    failed.append(where)
                else:
                    self.memory[where] = self.node.blocks[key]
                if kind == "save" and where not in failed:
                    self.missed.discard(block)
                elif kind == "load" and where in failed:
                    self.missed.add(block)
            done = len(ids) - len(failed)
            self.ended.append(FakeFinished(job, kind, done, done * 10, failed, 0.5, "bad" if failed else None))
        self.queue = []

    def finished(self):
        ended, self.ended = self.ended, []
        return ended

    def wait_gathered(self, timeout_ms):
        self.log.append("gathered")
        saves = [entry for entry in self.queue if entry[0] == "save"]
        rest = [entry for entry in self.queue if entry[0] != "save"]
        self.queue = saves
        self.run()
        self.queue = rest
        return True

    def wait(self, job, timeout_ms):
        self.run()
        for i, ended in enumerate(self.ended):
            if ended.job == job:
                return self.ended.pop(i)
        return None

    def invalidate_all(self, timeout_ms=5000):
        if self.node.away:
            raise ConnectionError("no node")
        count = len(self.node.blocks)
        self.node.blocks.clear()
        return count

    def stats(self):
        return {"jobs": len(self.used)}

    def close(self):
        self.log.append("close")
        self.closed = True
        self.queue = []

"""The half in each worker's process: hands a step's work to the cache's threads, and says what became of it.

    before ──► (forward) ──► start_loads ──► start_saves ──► finished, take_failed, take_done

Errors: a job that fails is an answer; the engine computes its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vllm.logger import init_logger

from terrace.vllm.setup import layer_span
from terrace.vllm.stats import TerraceStats
from terrace.vllm.step import Saved, Step, Transfer

if TYPE_CHECKING:
    import torch

    from terrace import Cache

logger = init_logger("vllm.terrace")

GATHER_MS = 1_000  # how long a step waits for the saves of preempted requests; what is late then is given up
PART_BYTES = 16 << 20  # a job of less is not worth a thread of its own
SECOND = 1 << 62  # numbers of a load's second job; the scheduler counts from 1
DRAIN_MS = 5_000  # how long a shutdown waits for saves in hand


class Ended(NamedTuple):
    """What became of a job."""

    failed: Sequence[int]
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reason: str | None = None


@dataclass
class _Open:
    """A load whose jobs have not all ended; said to the engine as one."""

    load: Transfer
    parts: dict[int, tuple[int, list[int]]]  # job -> its first block and ids
    ended: list[Ended] = field(default_factory=list)


class Worker:
    """The half in each worker's process: hands jobs to the cache's threads, and reports what became of them."""

    def __init__(self, connect: Callable[[str], Cache], blocks: int) -> None:
        self._connect = connect
        self.cache: Cache = connect("")
        self.blocks = blocks
        self.layers: list[tuple[int, int, int, int]] = []
        self.generation = ""
        self.loads: dict[int, _Open] = {}  # by job; one load may have several
        self.saves: dict[int, Transfer] = {}
        self.held: set[str] = set()
        self.failed: set[int] = set()
        self.received: set[str] = set()
        self.done: dict[int, tuple[int, set[int]]] = {}
        self.stats = TerraceStats()

    def register(self, tensors: dict[str, torch.Tensor]) -> None:
        """Says where the engine's blocks lie. Layers that share a tensor are stored once."""
        unique = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(tensors.items())}
        self.layers = [layer_span(name, tensor, self.blocks) for name, tensor in reversed(unique.values())]
        self.cache.layout(self.layers)

    def before(self, step: Step) -> None:
        """Before this step writes anywhere."""
        if step.generation != self.generation:
            self._restart(step.generation)
        if step.preempted and self.saves and not self.cache.wait_gathered(GATHER_MS):
            logger.warning("Terrace: gave up saves of preempted requests that took longer than %d ms", GATHER_MS)

    def start_loads(self, step: Step) -> None:
        for load in step.loads:
            width = len(load.hashes) // (load.first + len(load.block_ids))
            parts = self._parts(load)
            self.loads.update(dict.fromkeys(parts, _Open(load, parts)))
            for job, (first, ids) in parts.items():
                if not self.cache.load(job, load.lease, load.hashes, width, first, ids):
                    self._end_load(job, Ended(ids, reason="too many loads and saves in hand"))

    def _parts(self, load: Transfer) -> dict[int, tuple[int, list[int]]]:
        """A long load in two jobs, which two of the cache's threads copy side by side: first block and ids of each."""
        middle = len(load.block_ids) // 2
        if middle * sum(layer[3] for layer in self.layers) < PART_BYTES:
            return {load.job: (load.first, load.block_ids)}
        ids, rest = load.block_ids[:middle], load.block_ids[middle:]
        return {load.job: (load.first, ids), load.job + SECOND: (load.first + middle, rest)}

    def start_saves(self, step: Step) -> None:
        self._poll()
        self.held |= step.held
        for save in step.saves:
            self.saves[save.job] = save
            width = len(save.hashes) // (save.first + len(save.block_ids))
            # Loads run between steps, so none that failed can have reached this step's blocks. Still: nothing from a
            # step with a failure is kept, whatever a later vLLM does with the order.
            if self.failed or not self.cache.save(save.job, save.hashes, width, save.first, save.block_ids):
                self._end_save(save.job, Ended(save.block_ids))

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose saves ended after they had finished, and requests whose load ended."""
        self._poll()
        sent = self.held - {save.request for save in self.saves.values()}
        received, self.received = self.received, set()
        self.held -= sent
        return sent, received

    def _poll(self) -> None:
        for job in self.cache.finished():
            ended = Ended(job.failed_block_ids, job.blocks, job.bytes, job.seconds, job.reason)
            if job.job in self.loads:
                self._end_load(job.job, ended)
            elif job.job in self.saves:
                self._end_save(job.job, ended)

    def _end_load(self, job: int, ended: Ended) -> None:
        open_ = self.loads.pop(job)
        open_.ended.append(ended)
        if len(open_.ended) < len(open_.parts):
            return
        load, parts = open_.load, open_.ended
        failed = [block for part in parts for block in part.failed]
        self.received.add(load.request)
        self.failed.update(failed)
        self.stats.add(loads=1, load_seconds=max(part.seconds for part in parts), failed_blocks=len(failed))
        self.stats.add(loaded_blocks=sum(part.blocks for part in parts), loaded_bytes=sum(part.bytes for part in parts))
        if failed:
            reason = next(part.reason for part in parts if part.failed)
            said = (len(failed), len(load.block_ids), load.request, reason)
            logger.warning("Terrace: %d of %d blocks of %s are computed instead: %s", *said)

    def _end_save(self, job: int, ended: Ended) -> None:
        del self.saves[job]
        self.done[job] = (1, set(ended.failed))
        self.stats.add(saves=1, saved_blocks=ended.blocks, saved_bytes=ended.bytes, save_seconds=ended.seconds)
        self.stats.add(dropped_blocks=len(ended.failed))

    def _restart(self, generation: str) -> None:
        """Another namespace (see Scheduler.reset). What was in hand has failed."""
        self.cache.close()
        for job, open_ in list(self.loads.items()):
            self._end_load(job, Ended(open_.parts[job][1], reason="the cache was reset"))
        for job, save in list(self.saves.items()):
            self._end_save(job, Ended(save.block_ids))
        self.generation, self.cache = generation, self._connect(generation)
        self.cache.layout(self.layers)

    def take_failed(self) -> set[int]:
        failed, self.failed = self.failed, set()
        return failed

    def take_done(self) -> Saved | None:
        done, self.done = self.done, {}
        return Saved(done) if done else None

    def close(self) -> None:
        """Saves in hand get a moment, so that a restarted engine finds what this one computed last."""
        for job in list(self.saves):
            if self.cache.wait(job, DRAIN_MS) is None:
                break
        self.cache.close()

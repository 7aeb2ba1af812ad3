"""The half in each worker's process: hands a step's work to the cache's threads, and says what became of it.

    before ──► (forward) ──► start_loads ──► start_saves ──► finished, take_failed, take_done

Errors: a job that fails is an answer; the engine computes its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
DRAIN_MS = 5_000  # how long a shutdown waits for saves in hand


class Ended(NamedTuple):
    """What became of a job."""

    failed: Sequence[int]
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reason: str | None = None


class Worker:
    """The half in each worker's process: hands jobs to the cache's threads, and reports what became of them."""

    def __init__(self, connect: Callable[[str], Cache], blocks: int) -> None:
        self._connect = connect
        self.cache: Cache = connect("")
        self.blocks = blocks
        self.layers: list[tuple[int, int, int, int]] = []
        self.generation = ""
        self.loads: dict[int, Transfer] = {}
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
            self.loads[load.job] = load
            if not self.cache.load(load.job, load.lease, load.hashes, width, load.first, load.block_ids):
                self._end_load(load.job, Ended(load.block_ids, reason="too many loads and saves in hand"))

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
        load, failed = self.loads.pop(job), len(ended.failed)
        self.received.add(load.request)
        self.failed.update(ended.failed)
        self.stats.add(loads=1, loaded_blocks=ended.blocks, loaded_bytes=ended.bytes, load_seconds=ended.seconds)
        self.stats.add(failed_blocks=failed)
        if failed:
            said = (failed, len(load.block_ids), load.request, ended.reason)
            logger.warning("Terrace: %d of %d blocks of %s are computed instead: %s", *said)

    def _end_save(self, job: int, ended: Ended) -> None:
        del self.saves[job]
        self.done[job] = (1, set(ended.failed))
        self.stats.add(saves=1, saved_blocks=ended.blocks, saved_bytes=ended.bytes, save_seconds=ended.seconds)
        self.stats.add(dropped_blocks=len(ended.failed))

    def _restart(self, generation: str) -> None:
        """Another namespace (see Scheduler.reset). What was in hand has failed."""
        self.cache.close()
        for job, load in list(self.loads.items()):
            self._end_load(job, Ended(load.block_ids, reason="the cache was reset"))
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

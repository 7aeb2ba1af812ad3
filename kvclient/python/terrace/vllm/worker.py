"""The half in each worker's process: hands a step's work to the cache's threads, and says what became of it.

    before ──► (forward) ──► start_loads ──► start_saves ──► finished, failed, done

What is in hand, and what is to be said of it, `Hauls` knows (Rust). A job that fails is an answer; the engine computes
its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from terrace._terrace import Hauls
from terrace.telling import Teller
from terrace.vllm.setup import layer_span
from terrace.vllm.step import Saved, Step

if TYPE_CHECKING:
    import torch

    from terrace.vllm.setup import Connect

logger = init_logger("vllm.terrace")

GATHER_MS = 1_000  # how long a step waits for the saves of preempted requests; what is late then is given up
DRAIN_MS = 5_000  # how long a shutdown waits for saves in hand


class Worker:
    """The half in each worker's process: hands jobs to the cache's threads, and reports what became of them."""

    def __init__(self, connect: Connect, blocks: int) -> None:
        self.connect, self.generation = connect, ""
        self.cache, self.hauls, self.teller = connect(""), Hauls(), Teller(logger)
        self.blocks = blocks
        self.layers: list[tuple[int, int, int, int]] = []

    def register(self, tensors: dict[str, torch.Tensor]) -> None:
        """Says where the engine's blocks lie. Layers that share a tensor are stored once."""
        unique = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(tensors.items())}
        self.layers = [layer_span(name, tensor, self.blocks) for name, tensor in reversed(unique.values())]
        self.hauls.measure(sum(layer[3] for layer in self.layers))
        self.cache.layout(self.layers)

    def before(self, step: Step) -> None:
        """Before this step writes anywhere."""
        self.teller.difference(self.cache)
        if step.generation != self.generation:  # another namespace, see Scheduler.reset; what was in hand has failed
            self.cache.close()
            self._say(*self.hauls.give_up_all("the cache was reset"))
            self.generation, self.cache = step.generation, self.connect(step.generation)
            self.cache.layout(self.layers)
        if step.preempted and self.hauls.saving and not self.cache.wait_gathered(GATHER_MS):
            self._say(f"gave up saves of preempted requests that took longer than {GATHER_MS} ms")

    def start_loads(self, step: Step) -> None:
        for job in self.hauls.load(step.loads):
            if not self.cache.load(*job):
                self._say(self.hauls.give_up(job[0], "too many loads and saves in hand"))

    def start_saves(self, step: Step) -> None:
        self._poll()
        self.hauls.hold(step.held)
        for job in self.hauls.save(step.saves):
            # Loads run between steps, so none that failed can have reached this step's blocks. Still: nothing from a
            # step with a failure is kept, whatever a later vLLM does with the order.
            if self.hauls.has_failed or not self.cache.save(*job):
                self._say(self.hauls.give_up(job[0], "dropped"))

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose saves ended after they had finished, and requests whose load ended."""
        self._poll()
        return self.hauls.take_sent(), self.hauls.take_received()

    def failed(self) -> set[int]:
        """Blocks that were promised and did not come."""
        return self.hauls.take_failed()

    def done(self) -> Saved | None:
        """Saves that ended."""
        done = self.hauls.take_done()
        return Saved({job: (1, failed) for job, failed in done.items()}) if done else None

    def counts(self) -> dict[str, float]:
        return self.hauls.counts()

    def close(self) -> None:
        """Saves in hand get a moment, so that a restarted engine finds what this one computed last."""
        for job in self.hauls.saving:
            if self.cache.wait(job, DRAIN_MS) is None:
                break
        self.cache.close()

    def _poll(self) -> None:
        self._say(*map(self.hauls.ended, self.cache.finished()))

    def _say(self, *lines: str | None) -> None:
        for line in filter(None, lines):
            logger.warning("Terrace: %s", line)

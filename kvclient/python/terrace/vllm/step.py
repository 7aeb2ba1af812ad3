"""What the scheduler's half and the workers' halves tell each other, once per engine step.

scheduler ──Step──► workers ──Saved──► scheduler          pickled when they are different processes
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from terrace._terrace import Order


@dataclass
class Step(KVConnectorMetadata):
    """What the workers do in one engine step; as `Planner.take` has it."""

    loads: list[Order]
    saves: list[Order]
    held: list[str]  # finished requests whose blocks wait for their saves
    preempted: bool  # this step may reuse blocks that a save still reads
    generation: str  # of the engine's weights, see Scheduler.reset


@dataclass
class Saved(KVConnectorWorkerMetadata):
    """Saves that ended, back to the scheduler: job -> (workers, the blocks that some worker did not store)."""

    jobs: dict[int, tuple[int, set[int]]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Saved:
        assert isinstance(other, Saved)
        jobs = dict(self.jobs)
        for job, (workers, failed) in other.jobs.items():
            before, lost = jobs.get(job, (0, set()))
            jobs[job] = (before + workers, lost | failed)
        return Saved(jobs)

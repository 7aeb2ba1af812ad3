"""Terrace below vLLM's CPU tier.

    OffloadingConnector ─ TieringOffloadingManager ─┬─ vLLM's CPU pool: rows of one chunk, all workers side by side
                                                    └─ TerraceTier ─ terrace.Cache ─ Rust threads ─► node

    kv_connector_extra_config: {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": ...,
      "secondary_tiers": [{"type": "TerraceTier", "module_path": "terrace.vllm_tier", "endpoint": "127.0.0.1:7070"}]}

One row of the pool is one block of Terrace: `blocks_per_chunk` engine blocks, all layers, all ranks. An OffloadKey
(block hash and group) is the block's engine hash, so groups can never meet. What was asked of a node, and which runs of
rows a job of vLLM's becomes, `Chunks` knows (Rust).

Units: tokens, bytes, chunks (vLLM's word for a row).
Errors: nothing raises into the scheduler. A node that is away, late, full or wrong is a MISS, or a job that failed; the
keys of a failed load are misses from then on, until they were saved again, so that no request asks for ever.
Why nothing waits: every method runs in the scheduler's process between two steps. `drain_jobs` waits, because it must:
vLLM reuses the rows right after it; each job ends by its own deadline in Rust.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from terrace import Cache
from terrace._terrace import Chunks, Ending
from terrace.telling import Teller, answers
from terrace.vllm_tier.space import namespace

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

logger = logging.getLogger("vllm.terrace_tier")

GRACE_MS = 2000
"""How much later than its own deadline a transfer may be before its memory is taken from it."""

BLOCKS = "vllm:kv_offload_terrace_blocks"
BYTES = "vllm:kv_offload_terrace_bytes"
READY = "vllm:kv_offload_terrace_ready"


ANSWERS = {True: LookupResult.HIT, False: LookupResult.MISS, None: LookupResult.RETRY}


class TerraceTier(SecondaryTierManager):
    """A secondary tier whose chunks live in a Terrace node. See the module's text for the settings' place.

    endpoint: `host:port` or `unix:/path`. token, local, strict, lookup_timeout_ms, transfer_timeout_ms, lease_ms,
    miss_ms, threads, max_jobs: as `terrace.Cache` has them. label: name of the namespace, the model's by default.
    enable_kv_events: tell of chunks that were stored. locality: "LOCAL" or "REMOTE", for vLLM's tier filters.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        *,
        endpoint: str,
        label: str | None = None,
        locality: str | None = None,
        enable_kv_events: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality) if locality is not None else None
        publishes = offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[OffloadingEvent] | None = [] if enable_kv_events and publishes else None
        chunk = offloading_spec.blocks_per_chunk
        self._chunks = Chunks({g.group_id: g.tokens_per_block * chunk for g in offloading_spec.config.groups})
        self._jobs: dict[int, TransferJob] = {}
        self._done: list[JobResult] = []
        self._tally: dict[tuple[str, str], int] = {}
        self.teller = Teller(logger)
        self._ready: int | None = None
        rows, stride = primary_kv_view.shape or (0,), self._block_size_bytes
        self._layout = [(_address(primary_kv_view), rows[0], stride, stride)] if rows[0] else []
        spec = namespace(offloading_spec, stride, label)
        settings.setdefault("token", os.environ.get("TERRACE_TOKEN"))  # a command line is everyone's to read
        self._patience_ms = int(settings.get("transfer_timeout_ms", 5000)) + GRACE_MS
        self._connect = lambda weights: Cache(endpoint, {**spec, "weights": weights}, owner=os.urandom(16), **settings)
        self._weights = str(spec["weights"])
        self._cache = self._connect(self._weights)
        self._cache.layout(self._layout)
        logger.info("Terrace at %s, chunks of %d bytes, shared by engines equal in: %s", endpoint, stride, spec)

    # Lookups and jobs.

    @answers(lambda *_: LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        ends = req_context._offload_key_positions
        return ANSWERS[self._chunks.lookup(req_context.req_id, key, ends, self._cache)]

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata)

    def _submit(self, job: TransferJob) -> None:
        """Each run of consecutive chunks is a job of the cache."""
        keys, load, name = list(job.keys), job.is_promotion, job.req_context.req_id
        try:
            ends = job.req_context._offload_key_positions
            runs = self._chunks.begin(job.job_id, name, keys, job.chunk_ids, ends, load)
        except Exception as error:
            self.teller.trouble(f"a job makes no sense: {error!r}")
            runs = []
        if not runs:
            self._done.append(JobResult(job_id=job.job_id, success=not keys))
            return
        self._jobs[job.job_id] = job
        for run, asked, hashes, first, rows in runs:
            blocks = hashes, len(keys[0]), first, rows
            try:
                lease = self._cache.lease(asked) if asked is not None else 0
                took = self._cache.load(run, lease, *blocks) if load else self._cache.save(run, *blocks)
            except Exception as error:
                self.teller.trouble(f"a job could not be started: {error!r}")
                took = False
            if not took:
                self._settle(self._chunks.refuse(run, "too many loads and saves in hand"))

    def _settle(self, ending: Ending | None) -> None:
        """One of vLLM's jobs, once its last run has ended: the result that vLLM waits for."""
        if ending is None:
            return
        job, failed = self._jobs.pop(ending.job), set(ending.failed)
        good = [key for i, key in enumerate(job.keys) if i not in failed]
        done, lost = ("loaded", "load_failed") if job.is_promotion else ("saved", "save_failed")
        dropped = 0 if job.is_promotion else ending.dropped
        self._count(BLOCKS, done, len(good))
        self._count(BYTES, done, ending.bytes)
        self._count(BLOCKS, "save_dropped", dropped)
        self._count(BLOCKS, lost, len(failed) - dropped)
        if failed:
            self.teller.trouble(f"{len(failed)} blocks were not {done}: {ending.reason}")
        for i, key in enumerate(job.keys) if job.is_promotion else ():
            if i in failed:
                self._cache.miss(key, len(key))
        for asked in ending.forget:
            self._cache.forget(asked)
        self._done.append(
            JobResult(
                job_id=job.job_id,
                success=not failed,
                successful_keys=tuple(good) if job.is_promotion and failed and good else None,
                transfer_time=time.monotonic() - job.submit_time,
                transfer_bytes=ending.bytes,
            )
        )
        if self._events is not None and good and not job.is_promotion:
            self._events.append(OffloadingEvent(good, self.medium, False, self.locality))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for finished in self._cache.finished():
            self._settle(self._chunks.ended(finished))
        done, self._done = self._done, []
        return done

    def drain_jobs(self) -> None:
        """Waits until nothing touches the pool. vLLM asks for it when its weights may change, so what is saved and
        looked up from here on is of its own; nobody can tell from outside whether they really did."""
        for run in self._chunks.runs:
            finished = self._cache.wait(run, self._patience_ms)
            if finished is None:
                self.teller.trouble("a transfer is late beyond its own deadline")
                self._cache.layout([])  # returns when no copy touches the pool any more
                finished = self._cache.wait(run, 0)
            ending = self._chunks.give_up(run, "late") if finished is None else self._chunks.ended(finished)
            self._settle(ending)
        self._cache.close()
        self._chunks.reset()
        self._cache = self._connect(f"{self._weights} changed {os.urandom(8).hex()}")
        self._cache.layout(self._layout)

    # A request's life.

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._chunks.begin_request(req_context.req_id)
        return RequestOffloadingContext()

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """What a request just scheduled had asked for is in vLLM's own tier now, or never will be."""
        for asked in self._chunks.end_step(context.new_req_ids):
            self._cache.forget(asked)

    def on_request_finished(self, req_context: ReqContext) -> None:
        for asked in self._chunks.end_request(req_context.req_id):
            self._cache.forget(asked)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Nothing: loads and saves tell the node what is used, and a lease would fetch from NVMe what vLLM has."""

    def has_pending_work(self) -> bool:
        return bool(self._jobs or self._done)

    def take_events(self) -> Iterable[OffloadingEvent]:
        if not self._events:
            return ()
        events, self._events = self._events, []
        return events

    # What people see.

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {
            BLOCKS: OffloadingCounterMetadata("Chunks by what became of them; loads were verified here.", ("result",)),
            BYTES: OffloadingCounterMetadata("Bytes of chunks loaded from and saved to Terrace.", ("result",)),
            READY: OffloadingGaugeMetadata("Whether the Terrace node answers: 1, or 0 while lookups are misses."),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        self.teller.news(self._cache)
        stats, ready = OffloadingConnectorStats(), int(self._cache.state() == "ready")
        for (name, result), value in self._tally.items():
            stats.increase_counter(name, value, (result,))
        self._tally.clear()
        if ready != self._ready:
            self._ready = ready
            stats.set_gauge(READY, ready)
        return None if stats.is_empty() else stats

    def _count(self, name: str, result: str, value: int) -> None:
        if value:
            self._tally[name, result] = self._tally.get((name, result), 0) + value

    def shutdown(self) -> None:
        self._cache.close()
        for run in self._chunks.runs:
            self._settle(self._chunks.give_up(run, "the engine ends"))


def _address(view: memoryview) -> int:
    """Where the pool lies. The object that tells it is let go at once: vLLM releases the view when it ends."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))

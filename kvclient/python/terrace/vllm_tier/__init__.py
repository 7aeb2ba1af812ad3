"""Terrace below vLLM's CPU tier.

    OffloadingConnector ─ TieringOffloadingManager ─┬─ vLLM's CPU pool: rows of one chunk, all workers side by side
                                                    └─ TerraceTier ─ terrace.Cache ─ Rust threads ─► node

    kv_connector_extra_config: {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": ...,
      "secondary_tiers": [{"type": "TerraceTier", "module_path": "terrace.vllm_tier", "endpoint": "127.0.0.1:7070"}]}

One row of the pool is one block of Terrace: `blocks_per_chunk` engine blocks, all layers, all ranks. An OffloadKey
(block hash and group) is the block's engine hash, so groups can never meet. The first key that vLLM asks for starts one
lookup of everything behind it in its chain (`chains`); the answer is leased until the request is scheduled.

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
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
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

from terrace import Cache, Finished
from terrace.vllm_tier.chains import Request
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


@dataclass(slots=True)
class _Job:
    """One of vLLM's jobs, cut into runs of consecutive blocks: one job of the cache each."""

    job: TransferJob
    request: Request
    open: set[int] = field(default_factory=set)
    failed: set[OffloadKey] = field(default_factory=set)
    bytes: int = 0


@dataclass(slots=True)
class _Run:
    """Consecutive blocks of one chain and the rows they lie in."""

    hashes: bytes
    first: int
    lease: int
    keys: list[OffloadKey] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


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
        self._chunk_tokens = {g.group_id: g.tokens_per_block * chunk for g in offloading_spec.config.groups}
        self._requests: dict[str, Request] = {}
        self._jobs: dict[int, _Job] = {}
        self._runs: dict[int, tuple[int, _Run]] = {}
        self._done: list[JobResult] = []
        self._tally: dict[tuple[str, tuple[str, ...]], int] = {}
        self._next = 0
        self._step = 0
        self._said: str | None = None
        self._ready: int | None = None
        self._told = ""
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

    def _request(self, context: ReqContext) -> Request:
        return self._requests.setdefault(context.req_id, Request(context.req_id))

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        try:
            request = self._request(req_context)
            group, hashes, index = request.locate(req_context, key, self._chunk_tokens)
            return request.answer(self._cache, self._step, key, group, hashes, index)
        except Exception:
            self._say("lookup failed")
            return LookupResult.MISS

    def _cut(self, state: _Job) -> list[_Run]:
        runs: list[_Run] = []
        job = state.job
        for key, row in zip(job.keys, job.chunk_ids, strict=True):
            group, hashes, index = state.request.locate(job.req_context, key, self._chunk_tokens)
            ask = next((ask for ask in group.asks if ask.covers(index)), None) if job.is_promotion else None
            lease = self._cache.lease(ask.name) if ask is not None else 0
            run = runs[-1] if runs else None
            if run is None or (index, lease) != (run.first + len(run.keys), run.lease) or hashes != run.hashes:
                runs.append(run := _Run(hashes, index, lease))
            run.keys.append(key)
            run.rows.append(int(row))
        return runs

    def _submit(self, job: TransferJob) -> None:
        state = self._jobs[job.job_id] = _Job(job, self._request(job.req_context))
        state.request.loads += job.is_promotion
        begun: set[OffloadKey] = set()
        try:
            for run in self._cut(state):
                self._next += 1
                width = len(run.keys[0])
                if job.is_promotion:
                    took = self._cache.load(self._next, run.lease, run.hashes, width, run.first, run.rows)
                else:
                    took = self._cache.save(self._next, run.hashes, width, run.first, run.rows)
                if took:
                    begun.update(run.keys)
                    state.open.add(self._next)
                    self._runs[self._next] = (job.job_id, run)
        except Exception:
            self._say("a job could not be started")
        dropped = [key for key in job.keys if key not in begun]
        if dropped:
            self._fail(state, dropped, "dropped")
        self._close(state)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata)

    def _fail(self, state: _Job, keys: Collection[OffloadKey], why: str) -> None:
        state.failed.update(keys)
        self._count(BLOCKS, ("load_failed" if state.job.is_promotion else f"save_{why}",), len(keys))
        if state.job.is_promotion:
            for key in keys:
                self._cache.miss(key, len(key))
            self._step += 1  # every answer that promised one of them is asked for again

    def _settle(self, finished: Finished) -> None:
        job_id, run = self._runs.pop(finished.job, (-1, None))
        state = self._jobs.get(job_id)
        if state is None or run is None:
            return
        state.open.discard(finished.job)
        state.bytes += finished.bytes
        bad = set(finished.failed_block_ids)
        failed = [key for key, row in zip(run.keys, run.rows, strict=True) if row in bad]
        kind = "loaded" if state.job.is_promotion else "saved"
        self._count(BLOCKS, (kind,), len(run.keys) - len(failed))
        self._count(BYTES, (kind,), finished.bytes)
        if failed:
            self._say(f"{len(failed)} blocks were not {kind}: {finished.reason}")
            self._fail(state, failed, "failed")
        self._close(state)

    def _close(self, state: _Job) -> None:
        """Once its last run has ended: the result vLLM waits for."""
        if state.open:
            return
        job = self._jobs.pop(state.job.job_id).job
        good = [key for key in job.keys if key not in state.failed]
        self._done.append(
            JobResult(
                job_id=job.job_id,
                success=not state.failed,
                successful_keys=tuple(good) if job.is_promotion and state.failed and good else None,
                transfer_time=time.monotonic() - job.submit_time,
                transfer_bytes=state.bytes,
            )
        )
        if job.is_promotion:
            state.request.loads -= 1
            state.request.release(self._cache)
        elif self._events is not None and good:
            self._events.append(OffloadingEvent(list(good), self.medium, False, self.locality))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for finished in self._cache.finished():
            self._settle(finished)
        done, self._done = self._done, []
        return done

    def drain_jobs(self) -> None:
        """Waits until nothing touches the pool. vLLM asks for it when its weights may change, so what is saved and
        looked up from here on is of its own; nobody can tell from outside whether they really did."""
        for number in list(self._runs):
            finished = self._cache.wait(number, self._patience_ms)
            if finished is None:
                self._say("a transfer is late beyond its own deadline")
                self._cache.layout([])  # returns when no copy touches the pool any more
                finished = self._cache.wait(number, 0)
            if finished is not None:
                self._settle(finished)
            else:
                self._give_up(number)
        self._cache.close()
        for request in self._requests.values():
            request.groups.clear()
        self._cache = self._connect(f"{self._weights} changed {os.urandom(8).hex()}")
        self._cache.layout(self._layout)

    def _give_up(self, number: int) -> None:
        job_id, run = self._runs.pop(number)
        state = self._jobs[job_id]
        state.open.discard(number)
        self._fail(state, run.keys, "failed")
        self._close(state)

    # A request's life.

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._request(req_context)
        return RequestOffloadingContext()

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """What a request just scheduled had asked for is in vLLM's own tier now, or never will be."""
        self._step += 1
        for name in context.new_req_ids:
            request = self._requests.get(name)
            if request is not None:
                request.scheduled = True
                request.release(self._cache)

    def on_request_finished(self, req_context: ReqContext) -> None:
        request = self._requests.pop(req_context.req_id, None)
        if request is not None:
            request.over = True
            request.release(self._cache)

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
        stats, ready = OffloadingConnectorStats(), int(self._cache.state() == "ready")
        if self._tally or ready != self._ready:
            told = f"{self._cache.state()} ({self._cache.path()['in_use']})"
            if told != self._told:
                self._told, differs = told, self._cache.difference()
                logger.info("Terrace is %s%s", told, f"; {differs}" if differs else "")
        for (name, labels), value in self._tally.items():
            stats.increase_counter(name, value, labels)
        self._tally.clear()
        if ready != self._ready:
            self._ready = ready
            stats.set_gauge(READY, ready)
        return None if stats.is_empty() else stats

    def _count(self, name: str, labels: tuple[str, ...], value: int) -> None:
        if value:
            self._tally[name, labels] = self._tally.get((name, labels), 0) + value

    def _say(self, what: str) -> None:
        """One line per kind of trouble, not one per block."""
        if what != self._said:
            self._said = what
            logger.warning("terrace: %s", what, exc_info=sys.exc_info()[0] is not None)

    def shutdown(self) -> None:
        self._cache.close()
        for number in list(self._runs):
            self._give_up(number)
        self._requests.clear()


def _address(view: memoryview) -> int:
    """Where the pool lies. The object that tells it is let go at once: vLLM releases the view when it ends."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))

"""Terrace below vLLM's CPU tier.

    OffloadingConnector ─ TieringOffloadingManager ─┬─ vLLM's CPU pool: rows of one chunk, all workers side by side
                                                    └─ TerraceTier ─ terrace.Cache ─ Rust threads ─► node

    kv_connector_extra_config: {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": ...,
      "secondary_tiers": [{"type": "TerraceTier", "module_path": "terrace.vllm_tier", "endpoint": "127.0.0.1:7070"}]}

One row of the pool is one block of Terrace: `blocks_per_chunk` engine blocks, all layers, all ranks. An OffloadKey (block
hash and group) is the block's engine hash, so groups can never meet. The first key of a request that vLLM asks for starts
one lookup of everything behind it in that chain; the answer is leased until the request is scheduled.

Units: tokens, bytes, chunks (vLLM's word for a row).
Errors: nothing here raises into the scheduler. A node that is away, late, full or wrong is a MISS, or a job that failed;
the keys of a failed load are misses from then on, until they were saved again, so that no request asks for ever.
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
from itertools import takewhile
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
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from terrace import Cache, Finished, identity

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

logger = logging.getLogger("vllm.terrace_tier")

MAX_ASKS = 8
"""Lookups per request and group: one, and one behind each gap that vLLM's own tier has filled."""
DRAIN_SLICE_MS = 5000
"""How often a wait that must not be given up says that it still waits."""

BLOCKS = "vllm:kv_offload_terrace_blocks"
BYTES = "vllm:kv_offload_terrace_bytes"
READY = "vllm:kv_offload_terrace_ready"


@dataclass(slots=True)
class _Ask:
    """One lookup: the blocks `first`..`end` of one chain, of which `count` are there."""

    name: str
    hashes: bytes
    first: int
    end: int
    count: int | None = None
    step: int = -1

    def covers(self, index: int) -> bool:
        return self.first <= index < self.first + (self.count or 0)


@dataclass(slots=True)
class _Group:
    """One request's chain of one KV cache group, and what was asked of it."""

    hashes: bytes = b""
    asks: list[_Ask] = field(default_factory=list)
    last: int = -1


@dataclass(slots=True)
class _Request:
    name: str
    groups: dict[int, _Group] = field(default_factory=dict)
    loads: int = 0
    scheduled: bool = False
    over: bool = False


@dataclass(slots=True)
class _Job:
    """One of vLLM's jobs, cut into runs of consecutive blocks: one job of the cache each."""

    job: TransferJob
    request: _Request
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
        self._requests: dict[str, _Request] = {}
        self._jobs: dict[int, _Job] = {}
        self._runs: dict[int, tuple[int, _Run]] = {}
        self._done: list[JobResult] = []
        self._tally: dict[tuple[str, tuple[str, ...]], int] = {}
        self._next = 0
        self._step = 0
        self._said: str | None = None
        self._ready: int | None = None
        rows, stride = primary_kv_view.shape or (0,), self._block_size_bytes
        self._layout = [(_address(primary_kv_view), rows[0], stride, stride)] if rows[0] else []
        spec = namespace(offloading_spec, stride, label)
        settings.setdefault("token", os.environ.get("TERRACE_TOKEN"))  # a command line is everyone's to read
        self._connect = lambda weights: Cache(endpoint, {**spec, "weights": weights}, owner=os.urandom(16), **settings)
        self._weights = str(spec["weights"])
        self._cache = self._connect(self._weights)
        self._cache.layout(self._layout)
        logger.info("Terrace at %s, chunks of %d bytes, shared by engines equal in: %s", endpoint, stride, spec)

    # A request's keys: where each stands in its chain.

    def _request(self, context: ReqContext) -> _Request:
        return self._requests.setdefault(context.req_id, _Request(context.req_id))

    def _locate(self, request: _Request, context: ReqContext, key: OffloadKey) -> tuple[_Group, bytes, int]:
        """The hashes of the chain, up to `key` at least, and where in it `key` stands.

        vLLM notes the token at which each key of a request ends. A key that ends inside a chunk (the tail of a prompt)
        stands where the full chunk would. A key of no known place is a chain of its own: found again, evicted alone.
        """
        index, width = get_offload_group_idx(key), len(key)
        group = request.groups.setdefault(index, _Group())
        tokens, end = self._chunk_tokens.get(index), context.get_offload_key_position(key)
        if tokens is None or end is None:
            return group, key, 0
        at, tail = (end - 1) // tokens, end % tokens != 0
        if len(group.hashes) < (at if tail else at + 1) * width:
            ends = {
                end: key
                for key, end in context._offload_key_positions.items()
                if end % tokens == 0 and get_offload_group_idx(key) == index
            }
            gapless = (ends.get((i + 1) * tokens) for i in range(len(ends)))
            group.hashes = b"".join(takewhile(bool, gapless))  # type: ignore[arg-type]
        if tail and len(group.hashes) >= at * width:
            return group, group.hashes[: at * width] + key, at
        if group.hashes[at * width : (at + 1) * width] == key:
            return group, group.hashes, at
        return group, key, 0

    # Lookup: one question per chain, asked when the first key of it is.

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        try:
            request = self._request(req_context)
            group, hashes, index = self._locate(request, req_context, key)
            return self._answer(request, group, hashes, index, key)
        except Exception:
            self._say("lookup failed")
            return LookupResult.MISS

    def _answer(self, request: _Request, group: _Group, hashes: bytes, index: int, key: OffloadKey) -> LookupResult:
        # vLLM scans windowed groups from the end: then one question from the start covers what follows.
        backwards, group.last = group.last == index + 1, index
        pending = False
        for ask in group.asks:
            if not ask.first <= index < ask.end or ask.hashes[index * len(key) : (index + 1) * len(key)] != key:
                continue
            count = self._poll(ask, len(key))
            if count is None:
                pending = True
            elif ask.covers(index):
                return LookupResult.HIT
            elif index == ask.first + count:
                return LookupResult.MISS
        if pending:
            return LookupResult.RETRY
        if len(group.asks) >= MAX_ASKS:
            return LookupResult.MISS
        first = 0 if backwards and all(ask.first for ask in group.asks) else index
        self._next += 1
        ask = _Ask(f"{request.name}/{self._next}", hashes, first, len(hashes) // len(key))
        group.asks.append(ask)
        if self._poll(ask, len(key)) is None:
            return LookupResult.RETRY
        return LookupResult.HIT if ask.covers(index) else LookupResult.MISS

    def _poll(self, ask: _Ask, width: int) -> int | None:
        """Asks the cache, at most once per step; an answer shrinks when one of its blocks has failed since."""
        if ask.step != self._step:
            ask.step = self._step
            ask.count = self._cache.lookup(ask.name, ask.hashes, width, ask.first)
        return ask.count

    # Jobs: cut into runs of consecutive blocks, each one call.

    def _cut(self, state: _Job) -> list[_Run]:
        runs: list[_Run] = []
        job = state.job
        for key, row in zip(job.keys, job.chunk_ids, strict=True):
            group, hashes, index = self._locate(state.request, job.req_context, key)
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
            self._release(state.request)
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
            while number in self._runs:
                finished = self._cache.wait(number, DRAIN_SLICE_MS)
                for ended in [finished] if finished is not None else self._cache.finished():
                    self._settle(ended)
                if finished is None and number in self._runs:
                    # Late beyond its own deadline in Rust. `layout` returns when no copy touches the pool any more.
                    self._say("a transfer does not end; the pool is taken from it")
                    self._cache.layout([])
                    self._cache.layout(self._layout)
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
                self._release(request)

    def on_request_finished(self, req_context: ReqContext) -> None:
        request = self._requests.pop(req_context.req_id, None)
        if request is not None:
            request.over = True
            self._release(request)

    def _release(self, request: _Request) -> None:
        """Gives leases back, but none that a load still reads under."""
        if request.loads or not (request.over or request.scheduled):
            return
        for group in request.groups.values():
            for ask in group.asks:
                self._cache.forget(ask.name)
            group.asks.clear()
            group.last = -1

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
        stats = OffloadingConnectorStats()
        for (name, labels), value in self._tally.items():
            stats.increase_counter(name, value, labels)
        self._tally.clear()
        ready = int(self._cache.state() == "ready")
        if ready != self._ready:
            self._ready = ready
            stats.set_gauge(READY, ready)
        return None if stats.is_empty() else stats

    def config_info(self) -> dict[str, Any]:
        """What a person wants to know of this tier: which way it goes, whether it answers, what differs."""
        return {"state": self._cache.state(), "difference": self._cache.difference(), **self._cache.path()}

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


def namespace(spec: OffloadingSpec, stride: int, label: str | None) -> identity.Spec:
    """The engine's identity, as far as rows of the pool depend on it.

    vLLM 0.32 hands a tier an extract of its configuration, without the model's revision and how blocks are hashed. Both
    decide who may share, so they are taken from the frame that builds the connector and has all in hand. Where that is not
    found, this engine shares with nobody.
    """
    config, chunk, frame = spec.config, spec.blocks_per_chunk, sys._getframe(1)
    while frame.f_back is not None and not {"vllm_config", "kv_cache_config"} <= frame.f_locals.keys():
        frame = frame.f_back
    engine, caches = frame.f_locals.get("vllm_config"), frame.f_locals.get("kv_cache_config")
    if engine is not None and caches is not None:
        base = identity.vllm(engine, caches, label=label)
    else:
        logger.warning("Terrace: this vLLM does not tell its configuration; the tier shares with no other engine")
        name = identity.text(label or config.model.name, identity.LABEL_BYTES)
        base = {"label": name, "weights": os.urandom(16).hex()}
    rows = [config.groups, config.parallel.tp_size, config.parallel.pp_size, config.parallel.pcp_size]
    rows += [config.parallel.dcp_size, config.kv_cache_layout, config.canonical_layout, chunk, stride]
    tokens = chunk * max(group.tokens_per_block for group in config.groups)
    packing = identity.text(f"rows {identity.digest(*rows)} of {base.get('packing', 'none')}")
    return {**base, "packing": packing, "block_tokens": tokens, "engine_class": "vllm tier"}

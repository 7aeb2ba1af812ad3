"""vLLM's KV connector: prefixes survive restarts of the engine and are shared between engines.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "TerraceConnector", "kv_connector_module_path": "terrace.vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"endpoint": "host:7070"}}'

    scheduler  new request ──lookup──► None, None, n blocks ──blocks allocated──► Load ┐
               step ──blocks that this step fills──► Save ─────────────────────────────┤ Step, once per engine step
    worker     after the forward: start loads, start saves ◄───────────────────────────┘
               every step: which jobs ended ──► blocks that failed, requests loaded, saves done ──► scheduler

Everything that takes time is in `Cache`'s threads; nothing here waits, but for saves when their request was preempted.

Failures. A save may drop, a lookup may answer zero, a load may fail; the engine then computes. Loads are asynchronous only: a
request runs after its blocks were verified, so no step ever computes, or saves, on top of blocks that failed. Blocks that a
save reads are not given back before it has ended: a finished request's are held (`request_finished` says so), a preempted
one's are waited for before the step that may reuse them.

Why whole blocks: their inside is the attention kernel's affair (on a CPU packed for the instruction set), so the bytes
are opaque and the identity of the namespace says which kernel they belong to. Written for vLLM 0.32; accepts what 0.33 passes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from terrace import Cache, identity

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.terrace")

MAX_ASKS = 10_000  # steps that may pass before an answer counts as "nothing there"; the lookup's own deadline comes first
GATHER_MS = 1_000  # how long a step waits for the saves of preempted requests; what is late then is given up
DRAIN_MS = 5_000  # how long a shutdown waits for saves in hand


@dataclass
class Transfer:
    """Blocks of one request on their way: `block_ids` are blocks `first`, `first + 1`, … of the chain `hashes`."""

    job: int
    request: str
    hashes: bytes
    first: int
    block_ids: list[int]
    lease: int = 0


@dataclass
class Step(KVConnectorMetadata):
    """What the workers do in one engine step."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)
    held: set[str] = field(default_factory=set)  # finished requests whose blocks wait for their saves
    preempted: bool = False  # this step may reuse blocks that a save still reads
    generation: str = ""  # of the engine's weights, see Scheduler.reset


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


COUNTERS = {
    "lookups": "Lookups answered",
    "lookup_blocks": "Blocks that lookups found and leased",
    "lookups_given_up": "Lookups given up after too many steps",
    "loads": "Loads ended",
    "loaded_blocks": "Blocks loaded and verified, counted after the last copy",
    "loaded_bytes": "Bytes loaded and verified",
    "load_seconds": "Seconds from the start to the end of each load, summed",
    "failed_blocks": "Blocks that a lookup promised and a load did not bring; computed instead",
    "saves": "Saves ended",
    "saved_blocks": "Blocks that the node holds after a save",
    "saved_bytes": "Bytes of those blocks",
    "save_seconds": "Seconds from the start to the end of each save, summed",
    "dropped_blocks": "Blocks that a save dropped: node away, slow or full",
}


class TerraceStats(KVConnectorStats):
    """Counters since the last report. vLLM's own external-hit counters count when blocks are allocated; these after the copy."""

    def add(self, **counts: float) -> None:
        for name, count in counts.items():
            self.data[name] = self.data.get(name, 0) + count

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> TerraceStats:
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(self.data.get(name, 0), 4) for name in COUNTERS}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def take(self) -> TerraceStats | None:
        """What was counted, once."""
        if self.is_empty():
            return None
        taken = TerraceStats(data=self.data)
        self.reset()
        return taken


class TerraceMetrics(KVConnectorPromMetrics):
    """The counters as Prometheus knows them: `vllm:terrace_loaded_blocks_total` and so on."""

    def __init__(self, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], values: dict[int, Any]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, values)
        self._counters = {}
        for name, about in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:terrace_{name}", documentation=about, labelnames=labelnames)
            self._counters[name] = {engine: counter.labels(*labels) for engine, labels in values.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)


class _Tracked:
    """What the scheduler's half knows of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.hashes = bytearray()
        self.asks = 0
        self.first = 0  # first block that the lookup's answer offered
        self.found: int | None = None  # blocks of the chain that the node holds, until they are allocated
        self.loading: Transfer | None = None
        self.saved = 0  # blocks below this need no save
        self.computed = 0
        self.preemptions = request.num_preemptions
        self.jobs: set[int] = set()  # saves that read this request's blocks

    def chain(self, blocks: int) -> bytes:
        """The first hashes, joined; they only ever grow."""
        known = self.request.block_hashes
        width = len(known[0])
        for i in range(len(self.hashes) // width, blocks):
            self.hashes += known[i]
        return bytes(self.hashes[: blocks * width])


class Scheduler:
    """The half in the scheduler's process: decides what to load and what to save. Reads no KV."""

    def __init__(self, connect: Any, config: VllmConfig, block_tokens: int) -> None:
        transfer = config.kv_transfer_config
        events = config.kv_events_config
        self._connect = connect
        self.cache: Cache = connect("")
        self.tokens = block_tokens
        self.loads_wanted, self.saves_wanted = transfer.is_kv_consumer, transfer.is_kv_producer
        self.prompts_only = config.speculative_config is not None  # a draft may be taken back after its KV was written
        self.workers = config.parallel_config.world_size
        self.events_wanted = events is not None and events.enable_kv_cache_events
        self.requests: dict[str, _Tracked] = {}
        self.gone: dict[str, Transfer] = {}  # loads in hand whose request was aborted
        self.jobs: dict[int, tuple[Transfer, Request]] = {}  # saves in hand
        self.replies: dict[int, tuple[int, set[int]]] = {}
        self.saving: set[bytes] = set()  # hashes of blocks in hand
        self.events: list[BlockStored] = []
        self.stats = TerraceStats()
        self.step = Step()
        self.numbers = itertools.count(1)
        self.seen = ""

    def tracked(self, request: Request) -> _Tracked | None:
        """None for a request that Terrace leaves alone."""
        # LoRA: vLLM's hash has the adapter's name, not its bytes. A chain finer than a block: not one full-attention group.
        if request.lora_request is not None or len(request.block_hashes) > request.num_tokens // self.tokens:
            return None
        return self.requests.setdefault(request.request_id, _Tracked(request))

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` can be loaded; None: ask again in the next step."""
        tracked = self.tracked(request)
        # The last token is always left to compute, so that no block that others may share is written twice.
        blocks, first = (request.num_tokens - 1) // self.tokens, computed // self.tokens
        if tracked is None or blocks <= first or request.skip_reading_prefix_cache:
            if tracked is not None:
                tracked.found = first
            return 0, False
        # All of the chain is asked for, also what this engine has: what the node lacks of it is then saved again.
        chain = tracked.chain(blocks)
        found = self.cache.lookup(request.request_id, chain, len(chain) // blocks, 0, probe=not self.loads_wanted)
        if found is None:
            tracked.asks += 1
            if tracked.asks < MAX_ASKS:
                return None, False
            self.stats.add(lookups_given_up=1)
        tracked.first, tracked.found = first, found or 0
        tokens = max(0, tracked.found - first) * self.tokens if self.loads_wanted else 0
        return tokens, tokens > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        """The answer was taken (or not); start the load, or give the lease back."""
        tracked = self.requests.get(request.request_id)
        if tracked is None or tracked.loading is not None:
            return
        if tracked.found is not None:
            self.stats.add(lookups=1, lookup_blocks=tracked.found)
            tracked.saved = tracked.found
        if tokens > 0:
            count = tokens // self.tokens
            ids = blocks.get_block_ids()[0][tracked.first : tracked.first + count]
            lease = self.cache.lease(request.request_id)
            chain = tracked.chain(tracked.first + count)
            tracked.loading = Transfer(next(self.numbers), request.request_id, chain, tracked.first, ids, lease)
            self.step.loads.append(tracked.loading)
        elif tracked.found is not None or tracked.asks:
            self.cache.forget(request.request_id)
        tracked.asks, tracked.found = 0, None

    def plan(self, output: SchedulerOutput) -> Step:
        """The step's work, once per step."""
        self._watch()
        for request_id in {transfer.request for transfer, _ in self.jobs.values()} & self.requests.keys():
            self._notice_preemption(self.requests[request_id])
        if self.saves_wanted:
            for request_id, scheduled in output.num_scheduled_tokens.items():
                if (tracked := self.requests.get(request_id)) is not None:
                    self._plan_save(tracked, scheduled, output)
        step, self.step = self.step, Step(generation=self.step.generation)
        return step

    def _notice_preemption(self, tracked: _Tracked) -> None:
        if tracked.request.num_preemptions > tracked.preemptions:
            tracked.preemptions = tracked.request.num_preemptions
            self.step.preempted |= bool(tracked.jobs)
            tracked.jobs.clear()  # these end before anyone else writes to their blocks, see Worker.before

    def _plan_save(self, tracked: _Tracked, scheduled: int, output: SchedulerOutput) -> None:
        request, computed = tracked.request, tracked.request.num_computed_tokens
        if computed < tracked.computed:  # vLLM took blocks back after a failed load, and does not say so
            tracked.saved = min(tracked.saved, computed // self.tokens)
        tracked.computed = computed
        full = min((computed + scheduled) // self.tokens, len(request.block_hashes))
        if self.prompts_only:
            full = min(full, request.num_prompt_tokens // self.tokens)
        first = tracked.saved
        while first < full and request.block_hashes[first] in self.saving:  # another request is at it
            first += 1
        tracked.saved = max(tracked.saved, full)
        state = output.kv_connector_block_state
        groups = state.get_block_ids(request.request_id) if state is not None and first < full else None
        if groups is None or self.cache.state() != "ready":
            return
        save = Transfer(next(self.numbers), request.request_id, tracked.chain(full), first, groups[0][first:full])
        self.step.saves.append(save)
        self.jobs[save.job] = (save, request)
        self.saving.update(request.block_hashes[first:full])
        tracked.jobs.add(save.job)

    def finished(self, request: Request) -> bool:
        """True: keep the request's blocks until its saves have ended."""
        tracked = self.requests.pop(request.request_id, None)
        if tracked is None:
            return False
        if tracked.loading is not None:  # aborted meanwhile; vLLM keeps the blocks until the load is reported
            self.gone[request.request_id] = tracked.loading
            return False
        self.cache.forget(request.request_id)
        self._notice_preemption(tracked)
        if tracked.jobs:
            self.step.held.add(request.request_id)
        return bool(tracked.jobs)

    def update(self, output: KVConnectorOutput) -> None:
        """What the workers say after a step."""
        if output.invalid_block_ids:
            self._failed(output.invalid_block_ids)
        for request_id in output.finished_recving or ():
            if self.gone.pop(request_id, None) is None and request_id in self.requests:
                self.requests[request_id].loading = None
            self.cache.forget(request_id)
        if isinstance(output.kv_connector_worker_meta, Saved):
            for job, (workers, failed) in output.kv_connector_worker_meta.jobs.items():
                before, lost = self.replies.pop(job, (0, set()))
                if before + workers < self.workers:
                    self.replies[job] = (before + workers, lost | failed)
                else:
                    self._saved(job, lost | failed)

    def _failed(self, invalid: set[int]) -> None:
        """Lookups stop before what failed, or the request would ask for it, and fail, again and again."""
        loading = [tracked.loading for tracked in self.requests.values() if tracked.loading is not None]
        for load in [*loading, *self.gone.values()]:
            bad = [load.first + i for i, block in enumerate(load.block_ids) if block in invalid]
            if not bad:
                continue
            width = len(load.hashes) // (load.first + len(load.block_ids))
            self.cache.miss(b"".join(load.hashes[i * width : (i + 1) * width] for i in bad), width)
            if (tracked := self.requests.get(load.request)) is not None:
                tracked.saved = min(tracked.saved, bad[0])

    def _saved(self, job: int, failed: set[int]) -> None:
        save, request = self.jobs.pop(job)
        last = save.first + len(save.block_ids)
        hashes = request.block_hashes
        self.saving.difference_update(hashes[save.first : last])
        if (tracked := self.requests.get(save.request)) is not None:
            tracked.jobs.discard(job)
        for i, block in enumerate(save.block_ids, save.first) if self.events_wanted else ():
            if block not in failed:
                self.events.append(
                    BlockStored(
                        block_hashes=[maybe_convert_block_hash(hashes[i])],
                        parent_block_hash=maybe_convert_block_hash(hashes[i - 1]) if i else None,
                        token_ids=list(request.all_token_ids[i * self.tokens : (i + 1) * self.tokens]),
                        block_size=self.tokens,
                        lora_id=None,
                        lora_name=None,
                        medium="STORAGE",
                    )
                )

    def reset(self) -> bool:
        """The engine's weights may be others from now on, and their digest would be that of the old ones: so this engine
        moves to a namespace of its own until it is restarted. Nothing that was stored before can be found from there."""
        self.cache.close()
        self.requests.clear()  # whoever runs on must not save what old weights computed
        self.step.generation = os.urandom(8).hex()
        self.cache = self._connect(self.step.generation)
        return True

    def _watch(self) -> None:
        """Says once when the node is lost, and when it is back."""
        state = self.cache.state()
        if state == self.seen:
            return
        if state == "ready":
            logger.info("Terrace is there: %s", self.cache.path())
            if difference := self.cache.difference():
                logger.warning("Terrace: no prefix is shared with those who came before: %s", difference)
        elif state == "down":
            logger.warning("Terrace is away. The engine goes on without it, and uses it again when it is back")
        self.seen = state


class Worker:
    """The half in each worker's process: hands jobs to the cache's threads, and reports what became of them."""

    def __init__(self, connect: Any, blocks: int) -> None:
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
                self._end_load(load.job, load.block_ids, 0, 0, 0.0, "too many loads and saves in hand")

    def start_saves(self, step: Step) -> None:
        self._poll()
        self.held |= step.held
        for save in step.saves:
            self.saves[save.job] = save
            width = len(save.hashes) // (save.first + len(save.block_ids))
            # Loads run between steps, so none that failed can have reached this step's blocks. Still: nothing from a step with
            # a failure is kept, whatever a later vLLM does with the order.
            if self.failed or not self.cache.save(save.job, save.hashes, width, save.first, save.block_ids):
                self._end_save(save.job, save.block_ids, 0, 0, 0.0)

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose saves ended after they had finished, and requests whose load ended."""
        self._poll()
        sent = self.held - {save.request for save in self.saves.values()}
        received, self.received = self.received, set()
        self.held -= sent
        return sent, received

    def _poll(self) -> None:
        for job in self.cache.finished():
            if job.job in self.loads:
                self._end_load(job.job, job.failed_block_ids, job.blocks, job.bytes, job.seconds, job.reason)
            elif job.job in self.saves:
                self._end_save(job.job, job.failed_block_ids, job.blocks, job.bytes, job.seconds)

    def _end_load(self, job: int, failed: Sequence[int], blocks: int, size: int, seconds: float, why: str | None) -> None:
        load = self.loads.pop(job)
        self.received.add(load.request)
        self.failed.update(failed)
        self.stats.add(loads=1, loaded_blocks=blocks, loaded_bytes=size, load_seconds=seconds, failed_blocks=len(failed))
        if failed:
            logger.warning("Terrace: %d of %d blocks of %s are computed instead: %s", len(failed), len(load.block_ids), load.request, why)

    def _end_save(self, job: int, failed: Sequence[int], blocks: int, size: int, seconds: float) -> None:
        del self.saves[job]
        self.done[job] = (1, set(failed))
        self.stats.add(saves=1, saved_blocks=blocks, saved_bytes=size, save_seconds=seconds, dropped_blocks=len(failed))

    def _restart(self, generation: str) -> None:
        """Another namespace (see Scheduler.reset). What was in hand has failed."""
        self.cache.close()
        for job, load in list(self.loads.items()):
            self._end_load(job, load.block_ids, 0, 0, 0.0, "the cache was reset")
        for job, save in list(self.saves.items()):
            self._end_save(job, save.block_ids, 0, 0, 0.0)
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


def layer_span(name: str, tensor: Any, blocks: int) -> tuple[int, int, int, int]:
    """Where one layer's blocks lie: (address, blocks, stride in bytes, bytes of a block).

    Raises RuntimeError for a layout in which a block is not one run of bytes, and for memory that is not the CPU's.
    """
    if getattr(tensor, "device", None) is None or tensor.device.type != "cpu":
        raise RuntimeError(f"Terrace: layer {name} is not one tensor in CPU memory; {NO_GPU}")
    # The attention kernel's blocks may be smaller than the scheduler's; then several in a row are one of ours.
    parts, rest = divmod(tensor.shape[0], blocks)
    if rest or parts == 0 or not tensor[0].is_contiguous() or (parts > 1 and not tensor.is_contiguous()):
        raise RuntimeError(
            f"Terrace: layer {name} of shape {tuple(tensor.shape)}, stride {tensor.stride()} is not {blocks} whole blocks"
        )
    item = tensor.element_size()
    return tensor.data_ptr(), blocks, tensor.stride(0) * item * parts, tensor[0].numel() * item * parts


NO_GPU = "copies from and to GPU memory are not in this release, so this engine cannot use it yet: run vLLM on a CPU"


def settings_of(config: VllmConfig) -> dict[str, Any]:
    """`kv_connector_extra_config` as arguments of `Cache`."""
    settings = dict(config.kv_transfer_config.kv_connector_extra_config)
    known = ("endpoint", "token", "local", "strict", "lookup_timeout_ms", "transfer_timeout_ms", "lease_ms", "miss_ms",
             "threads", "max_jobs", "max_lookups")  # fmt: skip
    if unknown := settings.keys() - {*known, "label"}:
        raise ValueError(f"Terrace: no such setting: {', '.join(sorted(unknown))}; there are {', '.join(known)} and label")
    settings.setdefault("endpoint", "127.0.0.1:7070")
    settings.setdefault("token", os.environ.get("TERRACE_TOKEN"))  # a command line is everyone's to read
    return settings


def check(config: VllmConfig, groups: Sequence[Any]) -> None:
    """Refuses, at the start, what could not be right later. Raises ValueError with what to do."""
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    if config.device_config.device_type != "cpu":
        raise ValueError(f"Terrace: {NO_GPU}")
    if transfer.kv_load_failure_policy != "recompute":
        raise ValueError(
            'Terrace: add "kv_load_failure_policy": "recompute" to --kv-transfer-config; '
            "with vLLM's default a block that cannot be loaded ends its request with an error"
        )
    spec = groups[0].kv_cache_spec if len(groups) == 1 else None
    if type(spec).__name__ not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise ValueError(
            "Terrace: needs one KV cache group of full attention; with sliding windows add --disable-hybrid-kv-cache-manager"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError("Terrace: context parallelism is not supported: a block is then spread over ranks by token")


class TerraceConnector(KVConnectorBase_V1):
    """One of these in the scheduler and one in each worker; see the module's text."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check(vllm_config, kv_cache_config.kv_cache_groups)
        settings = settings_of(vllm_config)
        known = identity.of_vllm(vllm_config, kv_cache_config, label=settings.pop("label", None))
        block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        part, parts = (0, 0), known.parts
        if role == KVConnectorRole.WORKER:
            part = worker_part()

        def connect(generation: str) -> Cache:
            return Cache(spec=known.spec(generation), owner=known.owner, part=part, parts=parts, **settings)

        if role == KVConnectorRole.SCHEDULER:
            for line in known.warnings:
                logger.warning("Terrace: %s", line)
            logger.info("Terrace at %s: %s", settings["endpoint"], known.spec(""))
        self._scheduler = Scheduler(connect, vllm_config, block_tokens) if role == KVConnectorRole.SCHEDULER else None
        self._worker = Worker(connect, kv_cache_config.num_blocks) if role == KVConnectorRole.WORKER else None

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped save is a later miss, nothing more."""
        return False


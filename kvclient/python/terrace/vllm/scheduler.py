"""The half in the scheduler's process: what to load, what to save, whose blocks to keep. It touches no KV.

    matched ──None──► asked again next step        allocated ──► Load in the next Step, one lease until it has ended
            ──n blocks──► vLLM allocates them      plan      ──► Save of every block that the step fills
    finished ──► True while saves read the request's blocks
    update   ──► failed blocks are missed from now on; saves that ended become events

Units: tokens where vLLM speaks, blocks where Terrace does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockStored
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from terrace.vllm.setup import transfer_of
from terrace.vllm.stats import TerraceStats
from terrace.vllm.step import Saved, Step, Transfer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from terrace import Cache

logger = init_logger("vllm.terrace")

# Steps that may pass before an answer counts as "nothing there"; the lookup's own deadline comes first.
MAX_ASKS = 10_000


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

    def __init__(self, connect: Callable[[str], Cache], config: VllmConfig, block_tokens: int) -> None:
        transfer = transfer_of(config)
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
        # LoRA: vLLM's hash has the adapter's name, not its bytes. More hashes than blocks: they are not of our blocks.
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
        tracked.computed = computed + scheduled
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
        """The weights may be others from now on, and no digest says which: a namespace of its own until the restart.

        Nothing that was stored before can be found from there, and nothing has to be deleted.
        """
        self.cache.close()
        self.requests.clear()  # whoever runs on must not save what old weights computed
        self.step.generation = os.urandom(8).hex()
        self.cache = self._connect(self.step.generation)
        return True

    def take_events(self) -> list[BlockStored]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        self.cache.close()

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

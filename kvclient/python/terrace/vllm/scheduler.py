"""The half in the scheduler's process: tells a `Planner` what vLLM says, and vLLM what it plans. It touches no KV.

matched ──None──► asked again next step        allocated ──► a load in the next Step, one lease until it has ended
        ──n blocks──► vLLM allocates them      plan      ──► a save of every block that the step fills
finished ──► True while saves read the request's blocks
update   ──► failed blocks are missed from now on; saves that ended become events
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import BlockStored
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from terrace._terrace import Planner
from terrace.telling import Teller
from terrace.vllm.setup import transfer_of
from terrace.vllm.step import Saved, Step

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from terrace.vllm.setup import Connect


class Scheduler:
    """The half in the scheduler's process: decides what to load and what to save. Reads no KV."""

    def __init__(self, connect: Connect, config: VllmConfig, block_tokens: int) -> None:
        transfer, events = transfer_of(config), config.kv_events_config
        self.connect, self.generation, self.cache = connect, "", connect("")
        self.tokens, self.loads_wanted = block_tokens, transfer.is_kv_consumer
        self.planner = Planner(
            block_tokens,
            loads=transfer.is_kv_consumer,
            saves=transfer.is_kv_producer,
            prompts_only=config.speculative_config is not None,
            workers=config.parallel_config.world_size,
        )
        self.teller = Teller(init_logger("vllm.terrace"))
        self.requests: dict[str, Request] = {}
        self.saves: dict[int, Request] = {}  # in hand, by job
        self.events: list[BlockStored] | None = [] if events is not None and events.enable_kv_cache_events else None

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` can be loaded; None: ask again in the next step."""
        # LoRA: vLLM's hash has the adapter's name, not its bytes. More hashes than blocks: they are not of our blocks.
        if request.lora_request is not None or len(request.block_hashes) > request.num_tokens // self.tokens:
            return 0, False
        name = request.request_id
        self.requests[name] = request
        wanted = 0 if request.skip_reading_prefix_cache else request.num_tokens
        chain = self.planner.ask(name, request.block_hashes, wanted, computed, request.num_preemptions)
        if chain is None:
            return 0, False
        width = len(request.block_hashes[0])
        tokens = self.planner.answered(name, self.cache.lookup(name, chain, width, 0, not self.loads_wanted))
        return tokens, bool(tokens)

    def allocated(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        """The answer was taken (or not); start the load, or give the lease back."""
        name, ids = request.request_id, blocks.get_block_ids()[0] if tokens else []
        if self.planner.allocated(name, tokens, ids, self.cache.lease(name)):
            self.cache.forget(name)

    def plan(self, output: SchedulerOutput) -> Step:
        """The step's work, once per step."""
        self.teller.news(self.cache)
        for name in self.planner.saving():
            self.planner.preempted(name, self.requests[name].num_preemptions)
        for name, scheduled in output.num_scheduled_tokens.items():
            if (request := self.requests.get(name)) is not None:
                self._plan_save(request, scheduled, output)
        return Step(*self.planner.take(), self.generation)

    def _plan_save(self, request: Request, scheduled: int, output: SchedulerOutput) -> None:
        name, state = request.request_id, output.kv_connector_block_state
        computed, prompt = request.num_computed_tokens, request.num_prompt_tokens
        if not self.planner.fills(name, request.block_hashes, computed, scheduled, prompt) or state is None:
            return
        groups = state.get_block_ids(name)
        if groups is not None and self.cache.state() == "ready":
            job = self.planner.save(name, groups[0])
            if job is not None:
                self.saves[job] = request

    def finished(self, request: Request) -> bool:
        """True: keep the request's blocks until its saves have ended."""
        self.requests.pop(request.request_id, None)
        keep, forget = self.planner.finished(request.request_id, request.num_preemptions)
        if forget:
            self.cache.forget(request.request_id)
        return keep

    def update(self, output: KVConnectorOutput) -> None:
        """What the workers say after a step."""
        if output.invalid_block_ids and (bad := self.planner.failed(output.invalid_block_ids)):
            self.cache.miss(*bad)
        for name in output.finished_recving or ():
            self.planner.loaded(name)
            self.cache.forget(name)
        if isinstance(output.kv_connector_worker_meta, Saved):
            for job, (workers, failed) in output.kv_connector_worker_meta.jobs.items():
                if stored := self.planner.replied(job, workers, failed):
                    self._stored(self.saves.pop(job), *stored)

    def _stored(self, request: Request, first: int, end: int, missing: set[int]) -> None:
        """Blocks `first` to `end` were stored, but for the missing."""
        hashes = request.block_hashes
        self.cache.saved(b"".join(hashes[i] for i in range(first, end) if i not in missing), len(hashes[0]))
        if self.events is None:
            return
        names = [maybe_convert_block_hash(block) for block in request.block_hashes[max(first - 1, 0) : end]]
        names = names if first else [None, *names]
        for i in sorted(set(range(first, end)) - missing):
            self.events.append(
                BlockStored(
                    block_hashes=[names[i - first + 1]],
                    parent_block_hash=names[i - first],
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
        self.planner.reset()
        self.generation = os.urandom(8).hex()
        self.cache = self.connect(self.generation)
        return True

    def take_events(self) -> list[BlockStored]:
        events, self.events = self.events or [], None if self.events is None else []
        return events

    def counts(self) -> dict[str, float]:
        return self.planner.counts()

    def close(self) -> None:
        self.cache.close()

"""A real vLLM engine in this process, with or without Terrace, small and repeatable.

vLLM keeps one connector per process (its worker's is a global), so engines live one after the other: `Engine` is a
context. Importing vLLM costs 15 to 25 CPU seconds and an engine 2 to 5, so everything that can share a process does.
"""

import contextlib
import ctypes
import gc
import os
import random
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

BLOCK = 32
TOKENS, MANY_TOKENS = 16, 64  # generated: as a rule, and where more is to be shown
CACHE_BYTES = 64 << 20  # 8 KiB per token and four layers: 256 blocks of 256 KiB


def prompt(seed: int, tokens: int) -> list[int]:
    """Token ids that depend on nothing but the seed; a longer one begins with the shorter."""
    chance = random.Random(seed)
    return [chance.randrange(3, 512) for _ in range(tokens)]


A, B = prompt(1, 900), prompt(2, 937)
LONGER = A + prompt(3, 300)  # begins with all of A
CROWD = [prompt(10 + i, 600) for i in range(4)]
SHORT = prompt(20, 20)  # no whole block


def loadable(tokens: int) -> int:
    """Blocks of a prompt that a warm node can give: whole ones, and never the last token."""
    return (tokens - 1) // BLOCK


def tidy():
    """Once an engine is gone: makes room for the next in this process."""
    gc.collect()
    cleanup_dist_env_and_memory()


class Engine(contextlib.AbstractContextManager):
    def __init__(self, model, endpoint=None, *, algorithm="sha256_cbor", events=False, extra=None, **options):
        if endpoint is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="TerraceConnector",
                kv_connector_module_path="terrace.vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"endpoint": endpoint, **(extra or {})},
            )
        if events:
            options["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        options = {"max_model_len": 2048, "kv_cache_memory_bytes": CACHE_BYTES, **options}
        self.llm = LLM(
            model=model, dtype="float32", block_size=BLOCK, enforce_eager=True, skip_tokenizer_init=True,
            disable_log_stats=False, prefix_caching_hash_algo=algorithm, **options,
        )  # fmt: skip
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.halves = None
        if endpoint is not None:
            # Several workers are processes of their own.
            workers = [get_kv_transfer_group()._side] if has_kv_transfer_group() else []
            self.halves = self.scheduler.connector._side, *workers
        self.events = []
        if events:
            self.scheduler.kv_event_publisher.publish = lambda batch: self.events.extend(batch.events)

    def ready(self, seconds=20):
        """Waits until both halves have their node. Real users need not: until then lookups answer zero."""
        until = time.monotonic() + seconds
        while not all(half.cache.state() == "ready" for half in self.halves):
            assert time.monotonic() < until, [half.cache.state() for half in self.halves]
            time.sleep(0.01)
        return self

    def generate(self, *prompts, salt=None, tokens=TOKENS):
        """The greedy tokens of each prompt."""
        asked = [{"prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})} for ids in prompts]
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        answers = self.llm.generate(asked, how, use_tqdm=False)
        assert all(answer.outputs[0].finish_reason == "length" for answer in answers)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def settle(self, seconds=20):
        """Steps on until every save has ended and every block is back, as a serving engine does by itself."""
        until = time.monotonic() + seconds
        while self.core.scheduler.has_requests() or self.halves[0].planner.unanswered:
            assert time.monotonic() < until, "saves did not end"
            self.llm.llm_engine.step()
        self.llm.llm_engine.step()
        return self

    def forget(self):
        """Empties vLLM's own prefix cache, so that only Terrace can hit."""
        self.settle()
        assert self.llm.reset_prefix_cache()
        return self

    def counts(self, name):
        """A counter as Prometheus shows it."""
        found = [metric.value for metric in self.llm.get_metrics() if metric.name == f"vllm:terrace_{name}"]
        assert len(found) == 1, f"{name} is not there once"
        return found[0]

    def loaded(self, *prompts, **more):
        """Generates; the tokens, and how many blocks were loaded and verified for it."""
        before = self.counts("loaded_blocks")
        tokens = self.generate(*prompts, **more)
        return tokens, self.counts("loaded_blocks") - before

    def free_blocks(self):
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def kv(self, block_id, layer=0):
        """The bytes of a block of one layer, where Terrace copies them from."""
        address, _, stride, size = self.halves[1].layers[layer]
        return ctypes.string_at(address + block_id * stride, size)

    def close(self):
        if self.llm is None:
            return
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = self.core = self.scheduler = self.halves = None
        tidy()

    def __exit__(self, *exc):
        self.close()

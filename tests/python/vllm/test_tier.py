"""terrace.vllm_tier inside vLLM's own OffloadingConnector and TieringOffloadingManager, against a real node.

    connector (scheduler half) ─► TieringOffloadingManager ─► CPU pool (a real shared mapping) ─► TerraceTier ─► node

The only thing missing is the copy between a GPU and the pool, which needs one: a test writes the pool's rows itself.
"""

import dataclasses
import importlib
import inspect
import pathlib
import sys
import time

import pytest
import torch
from terrace import vllm_tier

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "unit"))

import fake_tiering
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import LookupResult, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.request import Request

BLOCK, BLOCKS_PER_CHUNK, ROWS = 32, 2, 24
CHUNK = BLOCK * BLOCKS_PER_CHUNK
PROMPT = [3 + i * 7 % 500 for i in range(6 * CHUNK)]


class Engine:
    """The scheduler's half of an engine with an offloading connector, stepped by hand."""

    def __init__(self, model, endpoint, events=False, hashing="sha256", lora=False, **tier):
        pages = 2 * BLOCK * 2 * 64 * 4 * 4  # K and V, tokens, heads, width, float32, layers
        settings = {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": ROWS * pages * BLOCKS_PER_CHUNK,
            "blocks_per_chunk": BLOCKS_PER_CHUNK,
            "secondary_tiers": [
                {"type": "TerraceTier", "module_path": "terrace.vllm_tier", "endpoint": endpoint, **tier}
            ],
        }
        transfer = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}
        config = EngineArgs(
            model=model, dtype="float32", block_size=BLOCK, max_model_len=1024, kv_transfer_config=transfer,
            prefix_caching_hash_algo=hashing, enable_lora=lora,
            kv_events_config={"enable_kv_cache_events": True} if events else None,
        ).create_engine_config()  # fmt: skip
        layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32)
        names = [f"model.layers.{i}.self_attn.attn" for i in range(4)]
        caches = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, layer)])
        self.config, hash_fn = config, get_hash_fn_by_name(hashing)
        init_none_hash(hash_fn)
        self.hasher = get_request_block_hasher(BLOCK, hash_fn)
        self.connector = OffloadingConnector(config, KVConnectorRole.SCHEDULER, caches)
        self.scheduler = self.connector.connector_scheduler
        self.manager = self.scheduler.manager
        (self.tier,) = self.manager.secondary_tiers
        self.pool = self.manager.primary_tier.get_kv_memoryview()
        wait_until(lambda: self.tier._cache.state() == "ready", "the node answers")

    def request(self, name, tokens, salt=None):
        request = Request(
            name, list(tokens), SamplingParams(max_tokens=4), None, block_hasher=self.hasher, cache_salt=salt
        )
        self.connector.on_new_request(request)
        return request

    def step(self, *scheduled):
        self.manager.on_schedule_end(ScheduleEndContext(scheduled, ()))

    def settle(self):
        def idle():
            self.step()
            return not self.manager.has_pending_work()

        wait_until(idle, "all transfers end")

    def hits(self, request, computed=0):
        """What the scheduler would load: asked step by step until it knows."""

        def known():
            self.found = self.connector.get_num_new_matched_tokens(request, computed)[0]
            self.step()
            return self.found is not None

        wait_until(known, "the lookup ends")
        return self.found

    def keys(self, request):
        status = self.scheduler._req_status[request.request_id]
        status.update_offload_keys()
        return list(status.group_states[0].offload_keys), status.req_context

    def compute(self, request, chunks, fill):
        """As if a GPU had computed and offloaded `chunks`: rows of the pool get `fill(chunk)`."""
        keys, context = self.keys(request)
        out = self.manager.prepare_store([keys[i] for i in chunks], context)
        rows = dict(zip(out.keys_to_store, out.store_spec.chunk_ids, strict=True))
        for i in chunks:
            if keys[i] in rows:
                self.write(int(rows[keys[i]]), fill(i))
        self.manager.complete_store(out.keys_to_store, context)

    def write(self, row, data):
        self.pool.cast("B")[row * len(data) : (row + 1) * len(data)] = data

    def read(self, request, chunks):
        keys, context = self.keys(request)
        wanted = [keys[i] for i in chunks]
        rows = self.manager.prepare_load(wanted, context).chunk_ids
        size = self.pool.strides[0]
        data = [bytes(self.pool.cast("B")[int(row) * size : (int(row) + 1) * size]) for row in rows]
        self.manager.complete_load(wanted, context)
        return data

    def finish(self, request):
        status = self.scheduler._req_status[request.request_id]
        self.manager.on_request_finished(status.req_context)


def wait_until(done, what, seconds=20):
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, f"{seconds} s and still not: {what}"
        time.sleep(0.005)


@pytest.fixture
def engine(model, node):
    engines = []

    def make(**settings):
        engines.append(Engine(model, node.endpoint, **settings))
        return engines[-1]

    yield make
    for made in engines:
        made.connector.shutdown()


def content(size, seed):
    return lambda chunk: bytes([(seed + chunk) % 251]) * (size - 8) + chunk.to_bytes(8, "little")


def test_another_engine_loads_what_one_stored_byte_for_byte(engine):
    first, second = engine(), engine()
    fill = content(first.pool.strides[0], 1)
    request = first.request("a", PROMPT)
    assert first.hits(request) == 0
    first.compute(request, range(6), fill)
    first.settle()
    longer = second.request("b", PROMPT + [9] * CHUNK)
    assert second.hits(longer) == len(PROMPT)
    assert second.read(longer, range(6)) == [fill(i) for i in range(6)]
    second.finish(longer)
    assert second.tier._cache.stats() and second.tier._chunks.requests == 0


def test_what_the_gpu_already_has_is_not_asked_for(engine):
    first, second = engine(), engine()
    request = first.request("a", PROMPT)
    fill = content(first.pool.strides[0], 2)
    first.compute(request, range(6), fill)
    first.settle()
    other = second.request("b", PROMPT + [9] * CHUNK)
    assert second.hits(other, computed=2 * CHUNK) == len(PROMPT) - 2 * CHUNK
    assert second.read(other, range(2, 6)) == [fill(i) for i in range(2, 6)]
    assert second.tier._cache.stats()["loaded_blocks"] == 4


def test_a_cache_salt_keeps_requests_apart(engine):
    first, second = engine(), engine()
    first.compute(first.request("a", PROMPT, salt="one"), range(6), content(first.pool.strides[0], 3))
    first.settle()
    assert second.hits(second.request("b", [*PROMPT, 9], salt="two")) == 0
    assert second.hits(second.request("c", [*PROMPT, 9], salt="one")) == len(PROMPT)


def test_a_load_that_fails_after_its_hit_is_a_miss_and_nobody_asks_for_ever(engine, node):
    first, second = engine(), engine(transfer_timeout_ms=1000)
    first.compute(first.request("a", PROMPT), range(6), content(first.pool.strides[0], 4))
    first.settle()
    other = second.request("b", [*PROMPT, 9])
    keys, context = second.keys(other)

    def found():
        second.tier.on_schedule_end(ScheduleEndContext((), ()))
        return second.tier.lookup(keys[0], context) is LookupResult.HIT

    wait_until(found, "the node has said that it has the block")
    node.kill()
    assert second.manager.lookup(keys[0], context) is LookupResult.HIT_PENDING  # the promotion that must fail
    second.settle()
    assert second.manager.lookup(keys[0], context) is LookupResult.MISS
    assert second.hits(other) == 0


def test_a_node_killed_and_restarted_is_used_again(engine, node):
    one = engine(transfer_timeout_ms=1000)
    fill = content(one.pool.strides[0], 5)
    node.kill()
    request = one.request("a", [*PROMPT, 9])
    assert one.hits(request) == 0
    one.compute(request, range(6), fill)  # dropped
    one.settle()
    node.start()
    wait_until(lambda: one.tier._cache.state() == "ready", "the restarted node is connected to", 60)
    again = one.request("b", [9, *PROMPT])
    assert one.hits(again) == 0
    one.compute(again, range(6), fill)
    one.settle()
    other = engine()
    late = other.request("c", [9, *PROMPT, 9])
    assert other.hits(late) == len(PROMPT)
    assert other.read(late, range(6)) == [fill(i) for i in range(6)]


# A call that waits for a frozen node waits for a deadline, 1 s or more. One that does not is done in well under 1 ms,
# and has this long on a machine that is busy with something else.
CALL_S = 0.25
CALLS = ("lookup", "submit_store", "submit_load", "get_finished_jobs")
OTHER_CALLS = ("on_new_request", "on_schedule_end", "on_request_finished", "touch", "has_pending_work", "get_stats")


def timed(tier):
    """The longest that each of the tier's calls takes from here on."""
    worst = {}

    def watch(name, call):
        def watched(*args, **more):
            began = time.monotonic()
            try:
                return call(*args, **more)
            finally:
                worst[name] = max(worst.get(name, 0.0), time.monotonic() - began)

        setattr(tier, name, watched)

    for name in CALLS + OTHER_CALLS:
        watch(name, getattr(tier, name))
    return worst


def test_a_frozen_node_holds_nobody_up(engine, node):
    lookup_s, transfer_s = 1, 2
    first, second = engine(), engine(lookup_timeout_ms=1000 * lookup_s, transfer_timeout_ms=1000 * transfer_s)
    first.compute(first.request("a", PROMPT), range(6), content(first.pool.strides[0], 6))
    first.settle()
    promised = second.request("b", [*PROMPT, 9])
    keys, context = second.keys(promised)

    def found():
        second.tier.on_schedule_end(ScheduleEndContext((), ()))
        return second.tier.lookup(keys[0], context) is LookupResult.HIT

    wait_until(found, "the node has said that it has the block")
    worst = timed(second.tier)
    node.freeze()
    began = time.monotonic()
    assert second.manager.lookup(keys[0], context) is LookupResult.HIT_PENDING  # a load that cannot end
    request = second.request("c", [9, *PROMPT])
    second.compute(request, range(3), content(second.pool.strides[0], 7))  # a store that cannot either
    assert second.tier._cache.state() == "ready", "nobody knows yet that it is frozen"
    asked = second.request("d", [8, *PROMPT])
    assert second.hits(asked) == 0
    second.manager.get_stats()
    second.settle()
    second.finish(asked)
    assert second.manager.lookup(keys[0], context) is LookupResult.MISS
    assert time.monotonic() - began < lookup_s + transfer_s + 4
    assert set(CALLS) <= set(worst), "each of them was called"
    assert max(worst.values()) < CALL_S, worst
    node.thaw()
    wait_until(lambda: second.tier._cache.state() == "ready", "the node that woke is used again", 60)
    third = engine()
    assert third.hits(third.request("c", [*PROMPT, 9])) == len(PROMPT)


def test_reset_drains_and_shares_nothing_with_the_old_weights(engine):
    first = engine()
    request = first.request("a", PROMPT)
    first.compute(request, range(6), content(first.pool.strides[0], 6))
    first.manager.reset_cache()
    wait_until(lambda: first.tier._cache.state() == "ready", "the new namespace is open")
    again = first.request("b", PROMPT)
    assert first.hits(again) == 0


def test_events_and_metrics_are_those_vllm_expects(engine):
    one = engine(events=True, enable_kv_events=True, locality="REMOTE")
    request = one.request("a", PROMPT)
    one.compute(request, range(6), content(one.pool.strides[0], 7))
    one.settle()
    stored = [event for event in one.manager.take_events() if event.locality is not None]
    assert sum(len(event.keys) for event in stored) == 6
    stats = one.manager.get_stats().reduce()
    assert stats[f"{vllm_tier.BLOCKS}:('saved',)"] == 6
    assert set(vllm_tier.TerraceTier.build_metric_definitions({})) >= {
        vllm_tier.BLOCKS,
        vllm_tier.BYTES,
        vllm_tier.READY,
    }


def test_identity_is_the_engines_own_and_the_log_says_what_differs(engine, caplog):
    first = engine(label="shared name")
    second = engine(label="shared name", hashing="sha256_cbor")
    for one in (first, second):
        one.manager.get_stats()
    (line,) = [record.getMessage() for record in caplog.records if "no prefix is shared" in record.getMessage()]
    assert "hashes sha256_cbor" in line
    assert first.tier._cache.difference() is None
    assert "hashes sha256_cbor" in second.tier._cache.difference()
    assert first.tier._weights == second.tier._weights != "not found"
    request = first.request("a", PROMPT)
    first.compute(request, range(6), content(first.pool.strides[0], 8))
    first.settle()
    assert second.hits(second.request("b", PROMPT)) == 0


def test_an_engine_with_adapters_shares_with_nobody(engine):
    first, second = engine(lora=True), engine(lora=True)
    request = first.request("a", PROMPT)
    first.compute(request, range(6), content(first.pool.strides[0], 9))
    first.settle()
    assert second.hits(second.request("b", [*PROMPT, 9])) == 0


@pytest.mark.parametrize("place", fake_tiering.FIELDS)
def test_the_fakes_of_the_unit_tests_are_like_the_real_classes(place):
    module, _, name = place.partition(":")
    real = getattr(importlib.import_module(module), name)
    fields = {field.name for field in dataclasses.fields(real)} if dataclasses.is_dataclass(real) else set(real._fields)
    assert set(fake_tiering.FIELDS[place]) <= fields
    if fake := getattr(fake_tiering, name, None):
        made = set(fake._fields if hasattr(fake, "_fields") else (field.name for field in dataclasses.fields(fake)))
        assert made <= fields


def test_every_method_has_the_base_classs_arguments():
    for name, method in inspect.getmembers(SecondaryTierManager, inspect.isfunction):
        ours = list(inspect.signature(getattr(vllm_tier.TerraceTier, name)).parameters)
        theirs = list(inspect.signature(method).parameters)
        assert ours[: len(theirs)] == theirs, name
    assert not vllm_tier.TerraceTier.__abstractmethods__

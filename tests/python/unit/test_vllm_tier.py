"""terrace.vllm_tier against fakes of vLLM's tiering classes and of the cache: behaviour, step by step, without vLLM."""

import ctypes

import fake_tiering
import pytest
from fake_cache import FakeCache, FakeNode

fake_tiering.install()

from fake_tiering import make_offload_key  # noqa: E402
from terrace import vllm_tier  # noqa: E402
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext  # noqa: E402
from vllm.v1.kv_offload.tiering.base import TransferJob  # noqa: E402

MISS, HIT, RETRY = LookupResult.MISS, LookupResult.HIT, LookupResult.RETRY
ROWS, STRIDE, TOKENS = 16, 64, 32


class Spec:
    """What a tier reads of TieringOffloadingSpec."""

    class config:
        groups = (
            type("Group", (), {"group_id": 0, "tokens_per_block": 16, "layer_names": ("a",)}),
            type("Group", (), {"group_id": 3, "tokens_per_block": 16, "layer_names": ("b",)}),
        )

    class kv_events_config:
        enable_kv_cache_events = True

    blocks_per_chunk = 2


@pytest.fixture
def node():
    return FakeNode()


@pytest.fixture
def make(monkeypatch, node):
    """A tier over its own pool: `make(slow=1)` makes lookups answer at the second asking."""

    def make(slow=0, max_jobs=256, **settings):
        caches = []

        def cache(endpoint, spec, *, owner, **_):
            assert len(owner) == 16
            caches.append(FakeCache(node, slow=slow, max_jobs=max_jobs))
            return caches[-1]

        monkeypatch.setattr(vllm_tier, "Cache", cache)
        monkeypatch.setattr(vllm_tier, "namespace", lambda *_: {"label": "m", "weights": "w"})
        pool = (ctypes.c_char * (ROWS * STRIDE))()
        view = memoryview(pool).cast("B").cast("B", shape=[ROWS, STRIDE])
        tier = vllm_tier.TerraceTier(Spec(), view, "TerraceTier", endpoint="x", enable_kv_events=True, **settings)
        tier.caches, tier.pool = caches, pool
        return tier

    return make


def chain(context, *names, group=0, tokens=TOKENS):
    """Keys of a request's chunks, noted as vLLM notes them."""
    keys = [make_offload_key(name.encode().ljust(32, b"."), group) for name in names]
    for i, key in enumerate(keys):
        context.set_offload_key_position(key, (i + 1) * tokens)
    return keys


def step(tier, *scheduled):
    tier.on_schedule_end(ScheduleEndContext(scheduled, ()))


def write(tier, row, text):
    ctypes.memmove(ctypes.addressof(tier.pool) + row * STRIDE, text.encode().ljust(STRIDE), STRIDE)


def read(tier, row):
    return bytes(tier.pool)[row * STRIDE : (row + 1) * STRIDE].decode().rstrip()


def run(tier):
    tier._cache.run()
    return {result.job_id: result for result in tier.get_finished_jobs()}


def store(tier, context, keys, job=0, rows=None):
    rows = list(range(len(keys))) if rows is None else rows
    for key, row in zip(keys, rows, strict=True):
        write(tier, row, key[:32].decode())
    tier.submit_store(TransferJob(job, keys, rows, False, context))
    return run(tier)[job]


def request(tier, name="r", *names, group=0):
    context = ReqContext(name)
    tier.on_new_request(context)
    return context, chain(context, *names, group=group)


def test_what_was_stored_is_loaded_by_another_engine(make):
    first, second = make(), make()
    assert store(first, *request(first, "r", "a", "b", "c")).success
    context, keys = request(second, "s", "a", "b", "c", "d")
    assert [second.lookup(key, context) for key in keys] == [HIT, HIT, HIT, MISS]
    second.submit_load(TransferJob(7, keys[:3], [9, 4, 5], True, context))
    result = run(second)[7]
    assert result.success and result.transfer_bytes
    assert [read(second, row).rstrip(".") for row in (9, 4, 5)] == ["a", "b", "c"]


def test_one_chain_is_one_lookup_and_an_answer_is_waited_for_by_retry(make):
    tier = make(slow=2)
    store(tier, *request(tier, "r", "a", "b", "c"))
    context, keys = request(tier, "s", "a", "b", "c", "x")
    for _ in range(2):
        assert [tier.lookup(key, context) for key in keys] == [RETRY] * 4
        step(tier)
    assert [tier.lookup(key, context) for key in keys] == [HIT, HIT, HIT, MISS]
    assert len(tier._cache.asked) == 1


def test_lookup_begins_where_the_engine_begins(make, node):
    tier = make()
    store(tier, *request(tier, "r", "a", "b", "c"))
    context, keys = request(tier, "s", "a", "b", "c")
    del node.blocks[(0, 0), keys[0]]
    assert tier.lookup(keys[1], context) == HIT
    assert tier.lookup(keys[0], context) == MISS


def test_a_gap_that_the_engine_fills_does_not_hide_what_follows(make, node):
    tier = make()
    store(tier, *request(tier, "r", "a", "b", "c", "d"))
    context, keys = request(tier, "s", "a", "b", "c", "d")
    del node.blocks[(0, 0), keys[1]]
    assert tier.lookup(keys[0], context) == HIT
    assert [tier.lookup(key, context) for key in keys[2:]] == [HIT, HIT]
    assert tier.lookup(keys[1], context) == MISS


def test_a_windowed_group_is_scanned_from_the_end_with_two_lookups(make):
    tier = make()
    names = [f"w{i}" for i in range(12)]
    store(tier, *request(tier, "r", *names, group=3))
    context, keys = request(tier, "s", *names, group=3)
    assert [tier.lookup(key, context) for key in reversed(keys)] == [HIT] * 12
    assert len(tier._cache.asked) == 2


def test_lookups_of_one_request_are_bounded(make):
    tier = make()
    names = [f"n{i}" for i in range(40)]
    context, keys = request(tier, "s", *names)
    assert {tier.lookup(key, context) for key in keys} == {MISS}
    assert len(tier._cache.asked) <= vllm_tier.Chunks.MAX_QUESTIONS


def test_groups_never_meet(make):
    tier = make()
    store(tier, *request(tier, "r", "a"))
    context, keys = request(tier, "s", "a", group=3)
    assert tier.lookup(keys[0], context) == MISS


def test_the_tail_of_a_prompt_stands_behind_its_chunks(make, node):
    tier = make()
    context, keys = request(tier, "r", "a", "b")
    tail = make_offload_key(b"t" * 32, 0)
    context.set_offload_key_position(tail, 2 * TOKENS + 16)
    assert store(tier, context, [*keys, tail]).success
    other, (a, b) = request(tier, "s", "a", "b")
    other.set_offload_key_position(tail, 2 * TOKENS + 16)
    assert [tier.lookup(key, other) for key in (a, b, tail)] == [HIT, HIT, HIT]


def test_a_key_of_no_known_place_is_a_chain_of_its_own(make):
    tier = make()
    context = ReqContext("r")
    tier.on_new_request(context)
    key = make_offload_key(b"k" * 32, 0)
    assert store(tier, context, [key]).success
    assert tier.lookup(key, ReqContext("s")) == HIT


def test_a_store_with_holes_is_cut_into_runs_and_ends_once(make, node):
    tier = make()
    context, keys = request(tier, "r", "a", "b", "c", "d", "e")
    assert store(tier, context, [keys[0], keys[1], keys[4]]).success
    assert len(tier._cache.used) == 2
    assert len(node.blocks) == 3


def test_a_failed_load_is_a_miss_until_it_was_saved_again(make):
    tier = make()
    context, keys = request(tier, "r", "a", "b", "c")
    store(tier, context, keys)
    tier._cache.bad = {keys[1]}
    other, keys = request(tier, "s", "a", "b", "c")
    assert [tier.lookup(key, other) for key in keys] == [HIT] * 3
    tier.submit_load(TransferJob(1, keys, [3, 4, 5], True, other))
    result = run(tier)[1]
    assert not result.success and set(result.successful_keys) == {keys[0], keys[2]}
    assert tier.lookup(keys[1], other) == MISS  # the same request, or it would ask for ever
    third, keys = request(tier, "t", "a", "b", "c")
    assert [tier.lookup(key, third) for key in keys[:2]] == [HIT, MISS]
    tier._cache.bad = set()
    assert store(tier, third, [keys[1]], job=2).success
    fourth, keys = request(tier, "u", "a", "b", "c")
    assert [tier.lookup(key, fourth) for key in keys] == [HIT] * 3


def test_a_load_that_cannot_start_fails_at_once_and_is_a_miss(make):
    tier = make(max_jobs=0)
    context, keys = request(tier, "r", "a", "b")
    tier.submit_load(TransferJob(1, keys, [0, 1], True, context))
    (result,) = tier.get_finished_jobs()
    assert (result.job_id, result.success, result.successful_keys) == (1, False, None)
    assert tier._cache.missed == set(keys)


def test_a_store_that_cannot_start_is_dropped_and_said(make):
    tier = make(max_jobs=0)
    result_of = tier.get_finished_jobs
    context, keys = request(tier, "r", "a")
    tier.submit_store(TransferJob(1, keys, [0], False, context))
    (result,) = result_of()
    assert not result.success
    assert tier.get_stats().counters[vllm_tier.BLOCKS, ("save_dropped",)] == 1


def test_leases_are_kept_while_a_load_reads_and_given_back_after(make, node):
    tier = make()
    store(tier, *request(tier, "r", "a"))
    context, keys = request(tier, "s", "a")
    assert tier.lookup(keys[0], context) == HIT
    tier.submit_load(TransferJob(1, keys, [3], True, context))
    tier.on_request_finished(context)
    assert len(node.leases) == 1
    run(tier)
    assert not node.leases and tier._chunks.requests == 1


def test_leases_are_given_back_when_the_request_is_scheduled(make, node):
    tier = make()
    store(tier, *request(tier, "r", "a"))
    context, keys = request(tier, "s", "a")
    assert tier.lookup(keys[0], context) == HIT
    step(tier)
    assert len(node.leases) == 1
    step(tier, "s")
    assert not node.leases


def test_a_node_that_is_away_is_a_miss_and_a_failed_job(make, node):
    tier = make()
    node.away = True
    context, keys = request(tier, "r", "a")
    assert tier.lookup(keys[0], context) == MISS
    assert not store(tier, context, keys).success
    assert tier.get_stats().gauges[vllm_tier.READY, ()] == 0


def test_an_exception_is_a_miss_and_a_failed_job(make):
    tier = make()
    context, keys = request(tier, "r", "a")

    def broken(*_):
        raise RuntimeError("broken")

    tier._cache.lookup = tier._cache.save = broken
    assert tier.lookup(keys[0], context) == MISS
    tier.submit_store(TransferJob(1, keys, [0], False, context))
    assert [result.success for result in tier.get_finished_jobs()] == [False]


def test_drain_ends_every_job_and_the_results_are_still_told(make):
    tier = make()
    context, keys = request(tier, "r", "a", "b")
    tier.submit_store(TransferJob(1, keys[:1], [0], False, context))
    tier.submit_store(TransferJob(2, keys[1:], [1], False, context))
    assert tier.has_pending_work()
    tier.drain_jobs()
    assert sorted(result.job_id for result in tier.get_finished_jobs()) == [1, 2]
    assert not tier.has_pending_work()


def test_a_transfer_that_does_not_end_has_the_pool_taken_from_it(make):
    tier = make()
    cache = tier._cache
    cache.wait = lambda job, timeout_ms: None
    context, keys = request(tier, "r", "a")
    tier.submit_load(TransferJob(1, keys, [0], True, context))
    tier.drain_jobs()
    assert [result.success for result in tier.get_finished_jobs()] == [False]
    assert cache.log == [("layout", 1), ("layout", 0), "close"]


def test_changed_weights_share_nothing_with_the_old_ones(make):
    tier = make()
    specs = []
    connect, vllm_tier.Cache = (
        vllm_tier.Cache,
        lambda endpoint, spec, **rest: specs.append(spec) or FakeCache(FakeNode()),
    )
    try:
        tier.drain_jobs()  # vLLM's reset_cache: sleep, or new weights
    finally:
        vllm_tier.Cache = connect
    assert specs[0]["weights"].startswith("w changed ")


def test_events_tell_what_was_stored(make):
    tier = make(locality="REMOTE")
    context, keys = request(tier, "r", "a", "b")
    store(tier, context, keys)
    (event,) = tier.take_events()
    assert (event.keys, event.removed, event.locality.value) == (keys, False, "REMOTE")
    assert not list(tier.take_events())


def test_stats_are_told_once(make):
    tier = make()
    store(tier, *request(tier, "r", "a", "b"))
    assert tier.get_stats().counters[vllm_tier.BLOCKS, ("saved",)] == 2
    assert tier.get_stats() is None
    assert set(tier.build_metric_definitions({})) == {vllm_tier.BLOCKS, vllm_tier.BYTES, vllm_tier.READY}


def test_the_pool_can_be_released_while_the_tier_lives(make):
    tier = make()
    tier._primary_kv_view.release()


def test_shutdown_closes_the_cache_and_fails_what_is_open(make):
    tier = make()
    context, keys = request(tier, "r", "a")
    tier.submit_store(TransferJob(1, keys, [0], False, context))
    cache = tier._cache
    tier.shutdown()
    assert cache.closed
    assert [result.success for result in tier.get_finished_jobs()] == [False]

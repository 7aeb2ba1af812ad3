"""terrace.sglang against fakes of SGLang's storage classes and of the cache: call by call, without SGLang."""

import hashlib
from typing import Any

import fake_hicache
import pytest
from fake_cache import FakeCache, FakeNode

fake_hicache.install()

import terrace.sglang as backend  # noqa: E402
from fake_hicache import HostPool, Indices, Page, PoolTransfer  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
)
from terrace._terrace import Found  # noqa: E402

PREFIX = HiCacheStorageExtraInfo(prefix_keys=[])


class Cache(FakeCache):
    """Does a job when it is waited for, and says which namespace it is of."""

    def __init__(self, nodes, spec, part):
        self.spec = spec
        super().__init__(nodes.setdefault(spec["packing"], FakeNode()), part=part)


@pytest.fixture
def nodes():
    """Namespaces of one node, by packing."""
    return {}


@pytest.fixture
def make(monkeypatch, nodes):
    made = []

    def make(pool=None, sides=(), hold_ms=30_000, zero_copy=1, **config):
        monkeypatch.setattr(backend, "Cache", lambda endpoint, spec, *, owner, part, **_: Cache(nodes, spec, part))
        config["extra_config"] = {"endpoint": "x", "hold_ms": hold_ms, "interface_v1": zero_copy}
        storage = backend.TerraceHiCache(HiCacheStorageConfig(**config), {})
        storage.register_mem_pool_host(pool or HostPool())
        for name, side in sides:
            storage.register_mem_host_pool_v2(side, name)
        made.append(storage)
        return storage

    yield make
    for storage in made:
        storage.close()


def keys(*names):
    return [hashlib.sha256(name.encode()).hexdigest() for name in names]


def fill(pool, *pages):
    for page in pages:
        pool.write(page, bytes([page]) * pool.piece * pool.pieces)


def after(*before):
    return HiCacheStorageExtraInfo(prefix_keys=keys(*before))


def test_pages_come_back_into_other_pages_byte_for_byte(make):
    one, two = HostPool(), HostPool()
    fill(one, 1, 2, 3)
    assert make(one).batch_set_v1(keys("a", "b", "c"), one.indices(1, 2, 3), PREFIX) == [True] * 3
    other = make(two)
    assert other.batch_exists(keys("a", "b", "c", "d"), PREFIX) == 3
    assert other.batch_get_v1(keys("a", "b", "c"), two.indices(7, 5, 9), PREFIX) == [True] * 3
    assert [two.read(page) for page in (7, 5, 9)] == [one.read(page) for page in (1, 2, 3)]


@pytest.mark.parametrize("layout", ["page_first", "interleaved"])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_every_even_layout_is_understood(make, layout, pieces):
    pool = HostPool(layout=layout, pieces=pieces)
    fill(pool, 4)
    storage = make(pool)
    assert storage.batch_set_v1(keys("a"), pool.indices(4), PREFIX) == [True]
    assert storage.batch_get_v1(keys("a"), pool.indices(11), PREFIX) == [True]
    assert pool.read(11) == pool.read(4)
    if layout == "interleaved":
        assert len(storage.pools["kv"].layers) == 1  # pieces that touch are one


def test_a_pool_of_uneven_pages_is_left_alone(make):
    pool = HostPool(odd=True)
    storage = make(pool)
    assert storage.batch_set_v1(keys("a"), pool.indices(1), PREFIX) == [False]
    assert storage.batch_exists(keys("a"), PREFIX) == 0


def test_the_chain_before_is_passed_on(make):
    storage = make()
    pool = storage.mem_pool_host
    fill(pool, 1, 2)
    storage.batch_set_v1(keys("a"), pool.indices(1), PREFIX)
    assert storage.batch_set_v1(keys("b"), pool.indices(2), after("a")) == [True]
    assert storage.batch_exists(keys("b", "c"), after("a")) == 1


def test_what_was_found_is_leased_until_it_was_read(make, nodes):
    storage = make()
    pool = storage.mem_pool_host
    storage.batch_set_v1(keys("a", "b"), pool.indices(1, 2), PREFIX)
    (node,) = nodes.values()
    assert storage.batch_exists(keys("a", "b"), PREFIX) == 2
    assert len(node.leases) == 1
    storage.batch_get_v1(keys("a"), pool.indices(3), PREFIX)
    assert len(node.leases) == 1
    storage.batch_get_v1(keys("b"), pool.indices(4), after("a"))
    assert not node.leases and not len(storage.found)


def test_a_lease_that_nobody_reads_ends_by_time(make, nodes):
    storage = make(hold_ms=0)
    storage.batch_set_v1(keys("a"), storage.mem_pool_host.indices(1), PREFIX)
    storage.batch_exists(keys("a"), PREFIX)
    (node,) = nodes.values()
    assert not node.leases


def test_leases_are_bounded(make, nodes):
    storage = make()
    storage.batch_set_v1(keys("a"), storage.mem_pool_host.indices(1), PREFIX)
    for _ in range(Found.MAX_HELD + 5):
        assert storage.batch_exists(keys("a"), PREFIX) == 1
    (node,) = nodes.values()
    assert len(node.leases) == Found.MAX_HELD


def test_a_failed_page_is_false_and_not_found_again(make):
    storage = make()
    pool = storage.mem_pool_host
    storage.batch_set_v1(keys("a", "b", "c"), pool.indices(1, 2, 3), PREFIX)
    storage.pools["kv"].cache.bad = {bytes.fromhex(keys("b")[0])}
    assert storage.batch_get_v1(keys("a", "b", "c"), pool.indices(4, 5, 6), PREFIX) == [True, False, True]
    assert storage.batch_exists(keys("a", "b", "c"), PREFIX) == 1


def test_a_node_that_is_away_is_false_everywhere(make, nodes):
    storage = make()
    pool = storage.mem_pool_host
    for node in nodes.values():
        node.away = True
    assert storage.batch_exists(keys("a"), PREFIX) == 0
    assert storage.batch_set_v1(keys("a"), pool.indices(1), PREFIX) == [False]
    assert storage.batch_get_v1(keys("a"), pool.indices(1), PREFIX) == [False]
    assert storage.batch_exists_v2(keys("a"), None, PREFIX).kv_hit_pages == 0
    assert storage.clear() is False


def test_exceptions_are_false(make):
    storage = make()
    storage.pools["kv"].cache.exists = storage.pools["kv"].cache.load = None
    pool = storage.mem_pool_host
    assert storage.batch_exists(keys("a"), PREFIX) == 0
    assert storage.batch_get_v1(keys("a", "b"), pool.indices(1, 2), PREFIX) == [False, False]
    assert storage.batch_set_v1(keys("a"), Indices([1, 2, 3, 4]), PREFIX) == [False]
    transfer = PoolTransfer(PoolName.KV, pool.indices(1), keys=keys("a"))
    assert storage.batch_get_v2([transfer]) == {"kv": [False]}


def test_a_copy_that_does_not_end_has_the_pool_taken_from_it(make):
    storage = make()
    pool = storage.mem_pool_host
    storage.batch_set_v1(keys("a"), pool.indices(1), PREFIX)
    cache = storage.pools["kv"].cache
    cache.wait = lambda job, timeout_ms: None
    assert storage.batch_get_v1(keys("a"), pool.indices(2), PREFIX) == [False]
    assert cache.log == [("layout", 2), ("layout", 0), ("layout", 2)]


def test_mla_pages_are_one_for_all_ranks(make):
    writer, reader = make(is_mla_model=True, tp_size=2), make(is_mla_model=True, tp_size=2, tp_rank=1)
    writer.batch_set_v1(keys("a"), writer.mem_pool_host.indices(1), PREFIX)
    assert reader.batch_exists(keys("a"), PREFIX) == 1


def test_shards_of_ranks_never_meet(make):
    ranks = [
        make(tp_size=2, tp_rank=0),
        make(tp_size=2, tp_rank=1),
        make(tp_size=2, pp_size=2, pp_rank=1),
        make(tp_size=2, attn_cp_size=2, attn_cp_rank=1),
    ]
    assert len({storage.pools["kv"].cache.part for storage in ranks[:2]}) == 2
    specs = [{**storage.pools["kv"].cache.spec, "part": storage.pools["kv"].cache.part} for storage in ranks]
    assert len({repr(spec) for spec in specs}) == 4


def test_states_are_each_ranks_own_even_below_mla(make):
    storage = make(is_mla_model=True, tp_size=4, tp_rank=3, sides=[(PoolName.MAMBA, HostPool(page_size=1))])
    assert storage.pools["mamba"].cache.part == (3, 0)
    assert storage.pools["kv"].cache.part == (0, 0)


def test_several_pools_move_together(make):
    side = HostPool(piece=8)
    storage = make(sides=[(PoolName.INDEXER, side)])
    pool = storage.mem_pool_host
    fill(pool, 1, 2)
    fill(side, 1, 2)
    names = keys("a", "b")
    stored = storage.batch_set_v2(
        [
            PoolTransfer(PoolName.KV, pool.indices(1, 2), keys=names),
            PoolTransfer(PoolName.INDEXER, side.indices(1), keys=names[:1]),
        ],
        PREFIX,
    )
    assert stored == {"kv": [True, True], "indexer": [True]}
    found = storage.batch_exists_v2(names, [PoolTransfer(PoolName.INDEXER)], PREFIX)
    assert (found.kv_hit_pages, found.extra_pool_hit_pages) == (1, {"kv": 2, "indexer": 1})
    loaded = storage.batch_get_v2([PoolTransfer(PoolName.INDEXER, side.indices(9), keys=names[:1])], PREFIX)
    assert loaded == {"indexer": [True]} and side.read(9) == side.read(1)
    assert storage.batch_get_v2([PoolTransfer(PoolName.SWA, side.indices(9), keys=names[:1])]) == {"swa": [False]}


def test_a_trailing_pool_needs_only_the_end_of_a_prefix(make):
    side = HostPool(page_size=1)
    storage = make(sides=[(PoolName.MAMBA, side)])
    pool, names = storage.mem_pool_host, keys(*"abcdef")
    storage.batch_set_v1(names, pool.indices(*range(6)), PREFIX)
    for at in (1, 4):  # states exist behind pages 1 and 4 only
        info = HiCacheStorageExtraInfo(prefix_keys=names[:at])
        storage.batch_set_v2([PoolTransfer(PoolName.MAMBA, side.indices(at), keys=[names[at]])], info)
    state = PoolTransfer(PoolName.MAMBA, keys=["last"], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    found = storage.batch_exists_v2(names, [state], PREFIX)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (5, [2, 5])


def test_a_policy_that_is_not_known_gives_no_verdict(make):
    storage = make(sides=[(PoolName.SWA, HostPool())])
    pool = storage.mem_pool_host
    storage.batch_set_v1(keys("a"), pool.indices(1), PREFIX)
    found = storage.batch_exists_v2(
        keys("a"), [PoolTransfer(PoolName.SWA, hit_policy=PoolHitPolicy.BLOCK_GROUPS)], PREFIX
    )
    assert (found.kv_hit_pages, found.extra_pool_hit_pages) == (1, {"kv": 1})


def test_a_logical_anchor_has_no_bytes_and_hides_nothing(make):
    anchor: Any = HostPool()
    anchor.kv_buffer = None
    storage = make(anchor)
    assert storage.batch_exists(keys("a", "b"), PREFIX) == 2
    assert storage.batch_set_v1(keys("a"), anchor.indices(1), PREFIX) == [True]


def test_the_older_interface_copies_pages_from_anywhere(make):
    storage = make()
    pages = [Page(bytes([i]) * 64) for i in range(3)]
    assert storage.batch_set(keys("a", "b", "c"), pages) is True
    targets = [Page(bytes(64)) for _ in range(4)]
    found = storage.batch_get(keys("a", "b", "c", "d"), targets)
    assert found == [*targets[:3], None]
    assert [bytes(page) for page in found[:3]] == [bytes(page) for page in pages]
    assert storage.exists(keys("b")[0]) and not storage.exists(keys("d")[0])
    assert storage.get(keys("c")[0], Page(bytes(64))) is not None
    assert storage.set("any name at all", target_location=pages[0].data_ptr(), target_sizes=64) is True
    assert storage.set("any name at all") is False
    assert storage.batch_set(keys("x"), [Page(b"other length")]) is False


def test_without_zero_copy_another_engine_finds_flat_pages_before_it_stores_any(make):
    make(zero_copy=0).batch_set(keys("a", "b"), [Page(bytes([i]) * 64) for i in range(2)])
    other = make(zero_copy=0)
    assert other.batch_exists(keys("a", "b", "c"), PREFIX) == 2
    found = other.batch_get(keys("a", "b"), [Page(bytes(64)) for _ in range(2)])
    assert [bytes(page) for page in found] == [bytes(64), b"\1" * 64]


def test_clear_forgets_everything(make):
    storage = make()
    storage.batch_set_v1(keys("a"), storage.mem_pool_host.indices(1), PREFIX)
    assert storage.clear() is True
    assert storage.batch_exists(keys("a"), PREFIX) == 0


def test_metrics_are_those_sglang_collects(make):
    storage = make(enable_storage_metrics=True)
    pool = storage.mem_pool_host
    storage.batch_set_v1(keys("a", "b"), pool.indices(1, 2), PREFIX)
    storage.batch_get_v1(keys("a"), pool.indices(1), PREFIX)
    stats = storage.get_stats()
    assert (stats.prefetch_pgs, stats.backup_pgs) == ([1], [2])
    assert storage.get_stats().backup_pgs == []


def test_models_and_layouts_never_share(make):
    specs = [
        make(model_name="one").pools["kv"].cache.spec,
        make(model_name="two").pools["kv"].cache.spec,
        make(HostPool(layout="interleaved")).pools["kv"].cache.spec,
        make(HostPool(page_size=8)).pools["kv"].cache.spec,
        make(tp_size=2).pools["kv"].cache.spec,
    ]
    assert len({repr(sorted(spec.items())) for spec in specs}) == 5

"""terrace.sglang as SGLang itself builds and calls it, against a real node: its factory, base class, host pools,
failure injector, and its own test of a zero-copy store."""

import dataclasses
import hashlib
import importlib
import inspect
import pathlib
import runpy
import time

import fake_hicache
import pytest
import terrace.sglang
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.storage import StorageBackendFactory
from terrace.sglang import TerraceHiCache
from terrace.sglang.pages import layers

PAGE, PAGES, LAYERS, HEADS, DIM = 16, 12, 3, 2, 8
PREFIX = HiCacheStorageExtraInfo(prefix_keys=[])


def config(node, **changed):
    extra = {
        "backend_name": "terrace",
        "module_path": "terrace.sglang",
        "class_name": "TerraceHiCache",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "endpoint": node.endpoint,
        "label": f"test {time.monotonic_ns()}",
    }
    facts = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
        "is_mla_model": False, "enable_storage_metrics": True, "is_page_first_layout": True,
        "model_name": "tiny", "extra_config": extra,
    }  # fmt: skip
    return HiCacheStorageConfig(**{**facts, **changed})


def ready(storage):
    until = time.monotonic() + 20
    backend = getattr(storage, "_backend", storage)
    while any(pool.cache.state() != "ready" for pool in backend.pools.values()):
        assert time.monotonic() < until, "the node does not answer"
        time.sleep(0.005)
    return storage


def host_pool(layout):
    """SGLang's own host pool of a model with separate K and V, without a GPU beside it."""
    from sglang.srt.mem_cache.pool_host import mha

    pool = mha.MHATokenToKVPoolHost.__new__(mha.MHATokenToKVPoolHost)
    pool.layout, pool.page_size, pool.page_num, pool.size = layout, PAGE, PAGES, PAGE * PAGES
    pool.layer_num, pool.head_num, pool.head_dim, pool.v_head_dim = LAYERS, HEADS, DIM, DIM
    pool.dtype, pool.device, pool.pin_memory, pool.allocator = torch.float32, "cpu", False, None
    pool._transfer_device = torch.device("cpu")
    mha.ALLOC_MEMORY_FUNCS = {"cpu": lambda dims, dtype, **_: torch.zeros(dims, dtype=dtype)}
    pool.kv_buffer = pool.init_kv_buffer()
    return pool


def fill(pool, *pages):
    for page in pages:
        data = torch.arange(2 * LAYERS * PAGE * HEADS * DIM, dtype=torch.float32) + 10_000 * page
        pool.set_from_flat_data_page(page * PAGE, data)


def page_of(pool, page):
    return pool.get_data_page(page * PAGE, flat=True)


def indices(*pages):
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def keys(*names):
    return [hashlib.sha256(name.encode()).hexdigest() for name in names]


@pytest.fixture
def make(node):
    made = []

    def make(pool, shared=None, **changed):
        facts = shared or config(node, **changed)
        storage = StorageBackendFactory.create_backend("dynamic", facts, pool)
        storage.register_mem_pool_host(pool)
        made.append(storage)
        return ready(storage)

    yield make
    for storage in made:
        storage.close()


def test_every_method_has_the_base_classs_arguments():
    for name, method in inspect.getmembers(HiCacheStorage, inspect.isfunction):
        ours = inspect.signature(inspect.unwrap(getattr(TerraceHiCache, name)))
        assert list(ours.parameters) == list(inspect.signature(method).parameters), name
    assert not getattr(TerraceHiCache, "__abstractmethods__", None)


def test_the_fakes_of_the_unit_tests_are_like_the_real_classes():
    for place, names in fake_hicache.FIELDS.items():
        module, _, name = place.partition(":")
        real = getattr(importlib.import_module(module), name)
        fields = {field.name for field in dataclasses.fields(real)} if dataclasses.is_dataclass(real) else set()
        for member in names:
            assert member in fields or hasattr(real, member), f"{place}.{member}"
        if dataclasses.is_dataclass(real):
            order = [field.name for field in dataclasses.fields(getattr(fake_hicache, name))]
            assert [field.name for field in dataclasses.fields(real) if field.name in order] == order


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_pages_of_sglangs_own_pools_come_back_byte_for_byte(make, node, layout):
    one, two, facts = host_pool(layout), host_pool(layout), config(node)
    fill(one, *range(PAGES))
    store, load = make(one, facts), make(two, dataclasses.replace(facts))
    assert store.batch_set_v1(keys("a", "b", "c"), indices(1, 5, 2), PREFIX) == [True] * 3
    assert load.batch_exists(keys("a", "b", "c", "d"), PREFIX) == 3
    after = HiCacheStorageExtraInfo(prefix_keys=keys("a"))
    assert load.batch_get_v1(keys("b", "c"), indices(9, 0), after) == [True, True]
    assert torch.equal(page_of(two, 9), page_of(one, 5)) and torch.equal(page_of(two, 0), page_of(one, 2))
    assert not page_of(two, 1).any(), "nothing else was touched"
    assert sum(layer[3] for layer in layers(one)) == page_of(one, 0).numel() * 4
    assert load.get_stats().prefetch_pgs == [2] and store.get_stats().backup_pgs == [3]


def test_the_older_interface_moves_the_same_pages(make, node):
    pool, facts = host_pool("page_first"), config(node)
    del facts.extra_config["interface_v1"]
    fill(pool, 3)
    store, load = make(pool, facts), make(pool, dataclasses.replace(facts))
    page = page_of(pool, 3)
    assert store.batch_set(keys("a", "b"), [page, page + 1]) is True
    assert load.batch_exists(keys("a", "b", "c"), PREFIX) == 2
    (first, second, none) = load.batch_get(keys("a", "b", "c"), [pool.get_dummy_flat_data_page() for _ in range(3)])
    assert torch.equal(first, page) and torch.equal(second, page + 1) and none is None


def test_side_pools_move_under_their_own_names(make, node):
    pool, side = host_pool("page_first"), host_pool("page_first_direct")
    fill(pool, *range(4))
    fill(side, *range(4))
    storage = make(pool)
    storage.register_mem_host_pool_v2(side, PoolName.INDEXER)
    storage.register_mem_host_pool_v2(pool, PoolName.KV)
    storage.on_host_pools_registered()
    ready(storage)
    names = keys(*"abcd")
    moved = storage.batch_set_v2(
        [
            PoolTransfer(PoolName.KV, host_indices=indices(0, 1, 2, 3), keys=names),
            PoolTransfer(PoolName.INDEXER, host_indices=indices(0, 1), keys=names[:2]),
        ],
        PREFIX,
    )
    assert moved == {PoolName.KV: [True] * 4, PoolName.INDEXER: [True] * 2}
    everywhere = storage.batch_exists_v2(names, [PoolTransfer(PoolName.INDEXER)], PREFIX)
    assert (everywhere.kv_hit_pages, everywhere.extra_pool_hit_pages[PoolName.INDEXER]) == (2, 2)
    trailing = PoolTransfer(PoolName.INDEXER, keys=["x"], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    assert storage.batch_exists_v2(names, [trailing], PREFIX).restorable_prefix_pages == [1, 2]
    assert storage.batch_get_v2([PoolTransfer(PoolName.INDEXER, indices(7), keys=names[1:2])]) == {"indexer": [True]}
    assert torch.equal(page_of(side, 7), page_of(side, 1))


def test_sglangs_own_test_of_a_zero_copy_store_passes(node, monkeypatch):
    theirs = importlib.import_module("sglang.srt.mem_cache.storage.mooncake_store.test_mooncake_store")
    made, pool_of = [], theirs.create_mock_host_kv_cache

    class Store(TerraceHiCache):
        def __init__(self, facts):
            super().__init__(dataclasses.replace(facts, extra_config=config(node).extra_config))
            made.append(self)

        def register_mem_pool_host(self, pool):
            super().register_mem_pool_host(pool)
            self._flat([(0, 4096)])  # opened here, since their test asks at once
            ready(self)

    def sized(*positional, **named):
        pool, buffer = pool_of(*positional, **named)
        pool.size = buffer.numel() // (pool.entries_per_page * pool.page_elements)  # which every real pool says
        return pool, buffer

    monkeypatch.setattr(theirs, "MooncakeStore", Store)
    monkeypatch.setattr(theirs, "create_mock_host_kv_cache", sized)
    theirs.test_single_operation()
    for mla, rank, size in ((False, 0, 1), (True, 0, 1), (False, 1, 4), (True, 3, 8)):
        theirs.test_batch_operation(theirs.make_hicache_storage_config(is_mla_model=mla, tp_rank=rank, tp_size=size))
    for storage in made:
        storage.close()


def test_sglangs_failure_injector_wraps_it(make, node):
    pool = host_pool("page_first")
    with envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.5):
        storage = make(pool)
    assert type(storage).__name__ == "HiCacheStorageFailureInjector"
    fill(pool, 1)
    stored = [storage.batch_set_v1(keys(f"k{i}"), indices(1), PREFIX) for i in range(40)]
    assert [True] in stored and [False] in stored


def test_a_node_that_is_away_is_false_and_never_an_exception(node):
    away = config(node)
    away.extra_config["endpoint"] = "127.0.0.1:1"
    storage = terrace.sglang.TerraceHiCache(away, {})
    pool = host_pool("page_first")
    storage.register_mem_pool_host(pool)
    began = time.monotonic()
    assert storage.batch_exists(keys("a"), PREFIX) == 0
    assert storage.batch_set_v1(keys("a"), indices(1), PREFIX) == [False]
    assert storage.batch_get_v1(keys("a"), indices(1), PREFIX) == [False]
    assert storage.clear() is False
    assert time.monotonic() - began < 10
    storage.close()


def test_the_example_runs(node, capsys):
    place = pathlib.Path(__file__).parents[3] / "examples" / "sglang_pages.py"
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(place))["main"](node.endpoint)
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "finds 64 of 65 and reads them: equal, over local" in said

"""Terrace behind SGLang's HiCache.

    GPU ─ HiCache host pool (pages) ─► TerraceHiCache ─ one terrace.Cache per host pool ─ Rust threads ─► node

    python -m sglang.launch_server --model-path MODEL --enable-hierarchical-cache --hicache-storage-backend dynamic \\
      --hicache-mem-layout page_first --hicache-storage-backend-extra-config '{"backend_name": "terrace",
        "module_path": "terrace.sglang", "class_name": "TerraceHiCache", "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": true, "endpoint": "127.0.0.1:7070"}'

A page of a host pool is a block: its pieces (K and V, or one per layer) are copied from and to where they lie, in any
of SGLang's layouts (`pages`). A page's SHA-256 is the block's engine hash, `prefix_keys` the chain before it.
`batch_exists` leases what it reports until it was read, `hold_ms` at most: nothing it named is evicted before.

    pool            namespace            part
    KV, side pools  one each, by name    the rank; the same for all where all have the same pages (MLA, one rank writes)
    flat pages      "flat"               likewise; SGLang's older interface, which copies once more

Units: pages, bytes, milliseconds.
Errors: none leaves this file but a setting that can never work; a node that is away, late, full or wrong is False, None
or 0, and SGLang computes. Every call ends: lookups by `lookup_timeout_ms`, copies by `transfer_timeout_ms` in Rust; a
copy later still has the pool's memory taken from it before False is said, since SGLang then reuses the pages.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from terrace import Cache, Finished
from terrace._terrace import Found, page_names
from terrace.sglang.pages import WIDTH, Layer, Pool, layers, spans
from terrace.sglang.space import namespace, rank, replicated
from terrace.telling import Teller, answers

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.pool_host import HostKVCache

    Indices: TypeAlias = torch.Tensor | range | None
    Extra: TypeAlias = HiCacheStorageExtraInfo | None

FLAT_PAGES = 128
"""Pages of the scratch of the older interface; SGLang's own limit of a batch."""
GRACE_MS = 2000
"""How much later than its own deadline a copy may be before its memory is taken from it."""
CACHE_SETTINGS = ("token", "local", "strict", "lease_ms", "miss_ms", "threads", "max_jobs", "max_lookups")


def no_pages(keys: list[str], *_: Any) -> list[bool]:
    return [False] * len(keys)


def no_transfers(transfers: list[PoolTransfer], *_: Any) -> dict[str, list[bool]]:
    return {transfer.name: no_pages(transfer.keys or []) for transfer in transfers}


class TerraceHiCache(HiCacheStorage):
    """A dynamic storage back end. Settings: those above, `label`, `hold_ms`, and `terrace.Cache`'s."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        settings = {**(storage_config.extra_config or {}), **(kwargs or {})}
        self.config = storage_config
        self.endpoint = str(settings.get("endpoint", "127.0.0.1:7070"))
        self.label = settings.get("label")
        self.zero_copy = bool(settings.get("interface_v1", 0))  # which of its interfaces SGLang uses for KV
        self.lookup_ms = int(settings.get("lookup_timeout_ms", 200))
        self.transfer_ms = int(settings.get("transfer_timeout_ms", 5000))
        self.hold = int(settings.get("hold_ms", 30_000)) / 1000
        self.found, self.closed = Found(self.hold), threading.Event()
        self.settings = {key: settings[key] for key in CACHE_SETTINGS if key in settings}
        self.settings.update(lookup_timeout_ms=self.lookup_ms, transfer_timeout_ms=self.transfer_ms)
        self.settings.setdefault("token", os.environ.get("TERRACE_TOKEN"))
        self.owner = os.urandom(16)
        self.pools: dict[str, Pool] = {}
        self.lock, self.scratch = threading.Lock(), threading.Lock()
        self.numbers = itertools.count(1)
        self.teller = Teller(logging.getLogger("sglang.terrace"), f"Terrace at {self.endpoint}")
        self.moved: list[Finished] = []
        self.sweeper = threading.Thread(target=self._sweep, name="terrace-leases", daemon=True)
        self.sweeper.start()

    # Which memory there is.

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        super().register_mem_pool_host(mem_pool_host)
        if self.zero_copy:
            self._register(mem_pool_host, PoolName.KV)
        else:
            self._flat(spans([mem_pool_host.get_dummy_flat_data_page()], None, 1))

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(host_pool_name) not in self.pools:
            self._register(host_pool, host_pool_name)

    def _register(self, pool: HostKVCache, pool_name: Any) -> None:
        if getattr(pool, "kv_buffer", self) is None:
            return  # a logical anchor: it has no bytes, its side pools have
        try:
            where = layers(pool)
        except Exception as error:
            self.teller.trouble(f"pool {pool_name} is not stored: {error!r}")
            return
        size = int(getattr(pool, "page_size", 1) or 1)
        self.pools[str(pool_name)] = self._open(pool, str(pool_name), where, size)

    def _open(self, pool: Any, packing: str, where: list[Layer], page_size: int) -> Pool:
        shared = replicated(self.config, pool, packing)
        spec = namespace(self.config, pool, packing, [layer[3] for layer in where], page_size, self.label)
        part = (rank(self.config, shared), 0)
        cache = Cache(self.endpoint, spec, owner=self.owner, part=part, **self.settings)
        return Pool(packing, cache, where, page_size)

    # v1: pages of the KV pool, from and to where they lie.

    @answers(lambda *_: 0)
    def batch_exists(self, keys: list[str], extra_info: Extra = None) -> int:
        pool = self.pools.get(PoolName.KV.value if self.zero_copy else "flat")
        if pool is None:
            return len(keys) if self._anchor() else 0
        return self._exists(pool, keys, extra_info)

    @answers(no_pages)
    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Extra = None) -> list[bool]:
        pool = self.pools.get(PoolName.KV.value)
        return self._load(pool, keys, host_indices, extra_info) if pool else [self._anchor()] * len(keys)

    @answers(no_pages)
    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Extra = None) -> list[bool]:
        pool = self.pools.get(PoolName.KV.value)
        return self._save(pool, keys, host_indices, extra_info) if pool else [self._anchor()] * len(keys)

    # v2: several pools.

    @answers(lambda *_: PoolTransferResult.empty())
    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: Extra = None,
    ) -> PoolTransferResult:
        pages = self.batch_exists(keys, extra_info)
        hits: dict[str, int] = {PoolName.KV: pages} if pages else {}
        usable = set(range(1, pages + 1))
        for transfer in pool_transfers or []:
            if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES) or not usable:
                continue  # no verdict; such a pool never shortens the prefix
            pool = self.pools.get(str(transfer.name))
            if pool is None:
                ends = set()
            elif transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                ends = set(range(1, self._exists(pool, keys[:pages], extra_info) + 1))
            else:
                ends = self._windows(pool, keys[:pages], max(1, len(transfer.keys or [])))
            if ends:
                hits[transfer.name] = max(ends)
            usable &= ends
        return PoolTransferResult(max(usable, default=0), hits, sorted(usable))

    @answers(no_transfers)
    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Extra = None) -> dict[str, list[bool]]:
        return self._each(transfers, extra_info, self._load)

    @answers(no_transfers)
    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Extra = None) -> dict[str, list[bool]]:
        return self._each(transfers, extra_info, self._save)

    def _each(
        self, transfers: list[PoolTransfer], extra_info: Extra, move: Callable[..., list[bool]]
    ) -> dict[str, list[bool]]:
        moved = no_transfers(transfers)
        for transfer in transfers:
            if pool := self.pools.get(str(transfer.name)):
                try:
                    moved[transfer.name] = move(pool, transfer.keys or [], transfer.host_indices, extra_info)
                except Exception as error:
                    self.teller.trouble(f"{transfer.name}: {error!r}")
        return moved

    def _windows(self, pool: Pool, keys: list[str], window: int) -> set[int]:
        """Prefix lengths whose last `window` pages are all there, of which the longest is leased.

        States are kept at some pages only, so each page is asked for by itself, the longest prefix first, for as long
        as one lookup may take.
        """
        until = time.monotonic() + self.lookup_ms / 1000
        there: dict[int, bool] = {}
        ends: set[int] = set()
        for end in range(len(keys), 0, -1):
            pages = range(max(0, end - window), end)
            for page in pages:
                if page not in there and time.monotonic() < until:
                    there[page] = pool.cache.exists(page_names([keys[page]]), WIDTH, self.lookup_ms) == 1
            if all(there.get(page) for page in pages) and (
                ends or all(self._exists(pool, [keys[page]], None) for page in pages)
            ):
                ends.add(end)
        return ends

    # What all of these come to.

    def _chain(self, keys: Sequence[str], extra_info: Extra) -> tuple[bytes, int]:
        before = extra_info.prefix_keys if extra_info is not None else None
        if extra_info is not None and before is None:
            self.teller.trouble(
                "add hicache_storage_pass_prefix_keys: without it the node cannot tell a prompt's head from its tail"
            )
        return page_names([*(before or ()), *keys]), len(before or ())

    def _exists(self, pool: Pool, keys: list[str], extra_info: Extra) -> int:
        if not keys or not self._ready(pool):
            return 0
        hashes, first = self._chain(keys, extra_info)
        request = f"exists/{next(self.numbers)}"
        count = min(pool.cache.exists(hashes, WIDTH, self.lookup_ms, first, request), len(keys))
        if not count:
            pool.cache.forget(request)
            return 0
        names = hashes[first * WIDTH : (first + count) * WIDTH]
        self._let_go(self.found.keep(pool.name, request, names, time.monotonic()))
        return count

    def _load(self, pool: Pool, keys: list[str], indices: Indices, extra_info: Extra) -> list[bool]:
        if not keys:
            return []
        request = self.found.of(pool.name, page_names(keys[:1]))
        lease = pool.cache.lease(request) if request else 0
        done = self._move(pool, keys, indices, extra_info, functools.partial(pool.cache.load, lease=lease))
        if request and (read := self.found.read(request, page_names(keys[-1:]))):
            self._let_go([read])
        return done

    def _let_go(self, lookups: list[tuple[str, str]]) -> None:
        for pool_name, request in lookups:
            self.pools[pool_name].cache.forget(request)

    def _sweep(self) -> None:
        while not self.closed.wait(max(0.05, self.hold / 4)):
            self._let_go(self.found.over(time.monotonic()))

    def _save(self, pool: Pool, keys: list[str], indices: Indices, extra_info: Extra) -> list[bool]:
        return self._move(pool, keys, indices, extra_info, pool.cache.save)  # what the node has is not sent again

    def _move(
        self, pool: Pool, keys: list[str], indices: Indices, extra_info: Extra, start: Callable[..., bool]
    ) -> list[bool]:
        """One job of the pool's cache, waited for: which of the pages it moved."""
        if not keys or not self._ready(pool):
            return [False] * len(keys)
        hashes, first = self._chain(keys, extra_info)
        rows, job = pool.rows(indices, len(keys)), next(self.numbers)
        if not start(job=job, hashes=hashes, width=WIDTH, first=first, block_ids=rows):
            return [False] * len(keys)
        return self._end(pool, job, rows)

    def _end(self, pool: Pool, job: int, rows: list[int]) -> list[bool]:
        """Waits for a job; afterwards nothing reads or writes its pages."""
        finished: Finished | None = pool.cache.wait(job, self.transfer_ms + GRACE_MS)
        if finished is None:
            self.teller.trouble("a copy is late beyond its own deadline")
            pool.cache.layout([])  # returns when no copy touches the pool any more
            finished = pool.cache.wait(job, 0)
            pool.cache.layout(pool.layers)
            if finished is None:
                return [False] * len(rows)
        bad = set(finished.failed_block_ids)
        if self.config.enable_storage_metrics and finished.blocks:
            with self.lock:
                self.moved.append(finished)
        if bad:
            self.teller.trouble(f"{len(bad)} of {len(rows)} pages were not {finished.kind}ed: {finished.reason}")
        return [row not in bad for row in rows]

    def _ready(self, pool: Pool) -> bool:
        self.teller.news(pool.cache)
        return pool.cache.state() == "ready"

    # The older interface: pages that SGLang copies into tensors of their own.

    @answers(lambda *_: None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return self.batch_get([key], [target_location], [target_sizes])[0]

    @answers(lambda keys, *_: [None] * len(keys))
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        targets = list(target_locations or [])
        where = spans(targets, target_sizes, len(keys))
        good: list[bool] = []
        with self.scratch:
            flat = self._flat(where)
            for at in range(0, len(keys), FLAT_PAGES):
                part = keys[at : at + FLAT_PAGES]
                good += self._load(flat, part, range(len(part)), None)
                for i in range(len(part)):
                    if good[at + i]:
                        ctypes.memmove(where[at + i][0], *flat.span(i))
        found = [True if isinstance(target, int) else target for target in targets]
        return [target if there else None for target, there in zip(found, good, strict=True)]

    @answers(lambda *_: False)
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return bool(self.batch_set([key], [target_location if value is None else value], None, [target_sizes]))

    @answers(lambda *_: False)
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        found = spans(list(target_locations if values is None else values), target_sizes, len(keys))
        with self.scratch:
            flat = self._flat(found)
            for at in range(0, len(keys), FLAT_PAGES):
                part = found[at : at + FLAT_PAGES]
                for i, (address, length) in enumerate(part):
                    ctypes.memmove(flat.span(i)[0], address, length)
                if not all(self._save(flat, keys[at : at + FLAT_PAGES], range(len(part)), None)):
                    return False
        return bool(keys)

    @answers(lambda *_: False)
    def exists(self, key: str) -> bool:
        pool = self.pools.get("flat", self.pools.get(PoolName.KV.value))
        return pool is not None and pool.cache.exists(page_names([key]), WIDTH, self.lookup_ms) == 1

    def _flat(self, found: list[tuple[int, int]]) -> Pool:
        """The pool of pages that lie anywhere: copied through a scratch, all of one length."""
        length = found[0][1]
        if "flat" not in self.pools:
            scratch = ctypes.create_string_buffer(FLAT_PAGES * length)
            where = [(ctypes.addressof(scratch), FLAT_PAGES, length, length)]
            self.pools["flat"] = self._open(getattr(self, "mem_pool_host", None), "flat", where, 1)
            self.pools["flat"].keep = scratch
        flat = self.pools["flat"]
        if any(span[1] != flat.span(0)[1] for span in found):
            raise ValueError(f"pages of {length} bytes where {flat.span(0)[1]} were before")
        return flat

    # The rest.

    @answers(lambda *_: False)
    def clear(self) -> bool:
        """Forgets, at the node and durably, everything in these namespaces: other engines' pages too."""
        for pool in self.pools.values():
            pool.cache.invalidate_all()
        return True

    def get_stats(self) -> Any:
        """What SGLang's metrics ask for: pages and GiB/s of each read and write since the last call."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self.lock:
            moved, self.moved = self.moved, []
        pages, rates = ({"load": [], "save": []} for _ in range(2))
        for done in moved:
            pages[done.kind].append(done.blocks)
            rates[done.kind].append(done.bytes / 2**30 / max(done.seconds, 1e-9))
        return StorageMetrics(pages["load"], pages["save"], rates["load"], rates["save"])

    def stats(self) -> dict[str, dict[str, int]]:
        """Counters of each pool's cache since the start."""
        return {pool_name: pool.cache.stats() for pool_name, pool in self.pools.items()}

    def close(self) -> None:
        self.closed.set()
        self.sweeper.join(timeout=5)
        for pool in self.pools.values():
            pool.cache.close()

    def _anchor(self) -> bool:
        return getattr(getattr(self, "mem_pool_host", None), "kv_buffer", self) is None

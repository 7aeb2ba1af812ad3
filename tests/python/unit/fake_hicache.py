"""As much of SGLang's HiCache (and of torch) as `terrace.sglang` touches; checked against the real classes in
tests/python/sglang.

`install()` puts modules of these names into `sys.modules`, unless the real ones are there.
"""

import ctypes
from dataclasses import dataclass
from enum import Enum
from typing import Any

import fakes

# What the back end reads and makes, by the real class's place. The test of the fakes reads this table too.
FIELDS = {
    "sglang.srt.mem_cache.hicache_storage:HiCacheStorageConfig": [
        "tp_rank", "tp_size", "pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size", "is_mla_model", "is_storage_writer",
        "enable_storage_metrics", "model_name", "extra_config", "dcp_size", "logical_page_size",
    ],
    "sglang.srt.mem_cache.hicache_storage:HiCacheStorageExtraInfo": ["prefix_keys"],
    "sglang.srt.mem_cache.hicache_storage:PoolTransfer": ["name", "host_indices", "keys", "hit_policy"],
    "sglang.srt.mem_cache.hicache_storage:PoolTransferResult": [
        "kv_hit_pages", "extra_pool_hit_pages", "restorable_prefix_pages",
    ],
    "sglang.srt.mem_cache.hicache_storage:PoolName": ["KV", "MAMBA", "DRAFT"],
    "sglang.srt.mem_cache.hicache_storage:PoolHitPolicy": ["ALL_PAGES", "TRAILING_PAGES"],
    "sglang.srt.observability.metrics_collector:StorageMetrics": [
        "prefetch_pgs", "backup_pgs", "prefetch_bandwidth", "backup_bandwidth",
    ],
}  # fmt: skip


@dataclass
class HiCacheStorageConfig:
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False
    enable_storage_metrics: bool = False
    is_page_first_layout: bool = True
    model_name: str | None = "tiny"
    dp_rank: int = 0
    extra_config: dict | None = None
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None

    @property
    def is_storage_writer(self):
        return not self.is_mla_model or self.tp_rank == self.dcp_rank


@dataclass
class HiCacheStorageExtraInfo:
    prefix_keys: list[str] | None = None
    extra_info: dict | None = None


class PoolName(str, Enum):
    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"
    DRAFT = "draft"

    def __str__(self):
        return self.value


class PoolHitPolicy(str, Enum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    name: PoolName
    host_indices: Any = None
    device_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict
    restorable_prefix_pages: list | None = None

    @classmethod
    def empty(cls):
        return cls(0, {})


@dataclass
class StorageMetrics:
    prefetch_pgs: list
    backup_pgs: list
    prefetch_bandwidth: list
    backup_bandwidth: list


class HiCacheStorage:
    def register_mem_pool_host(self, mem_pool_host):
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool, host_pool_name):
        if not hasattr(self, "registered_pools"):
            self.registered_pools = {}
        self.registered_pools[host_pool_name] = host_pool


class Indices(list):
    def __getitem__(self, at):
        return Indices(super().__getitem__(at)) if isinstance(at, slice) else super().__getitem__(at)

    def tolist(self):
        return list(self)


class Page:
    """A contiguous tensor of bytes."""

    def __init__(self, data):
        self.buffer = ctypes.create_string_buffer(data, len(data))

    def is_contiguous(self):
        return True

    def data_ptr(self):
        return ctypes.addressof(self.buffer)

    def numel(self):
        return len(self.buffer)

    def element_size(self):
        return 1

    def __bytes__(self):
        return self.buffer.raw


class HostPool:
    """A page-first pool of K and V, or of any number of pieces of `piece` bytes per page."""

    def __init__(self, pages=16, page_size=4, piece=32, pieces=2, layout="page_first", odd=False):
        self.size, self.page_size, self.layout = pages * page_size, page_size, layout
        self.piece, self.pieces, self.odd = piece, pieces, odd
        self.layer_num, self.head_num, self.head_dim, self.dtype = 2, 2, 2, "torch.float32"
        self.buffer = ctypes.create_string_buffer(pages * piece * pieces)
        self.kv_buffer = self.buffer

    def address(self, page, piece):
        base, pages = ctypes.addressof(self.buffer), self.size // self.page_size
        if self.layout == "interleaved":
            return base + (page * self.pieces + piece) * self.piece
        return base + (piece * pages + page) * self.piece + (1 if self.odd and page else 0)

    def get_page_buffer_meta(self, indices):
        pages = [token // self.page_size for token in indices.tolist()[:: self.page_size]]
        where = [self.address(page, piece) for page in pages for piece in range(self.pieces)]
        return where, [self.piece] * len(where)

    def get_dummy_flat_data_page(self):
        return Page(bytes(self.piece * self.pieces))

    def write(self, page, data):
        for i in range(self.pieces):
            ctypes.memmove(self.address(page, i), data[i * self.piece : (i + 1) * self.piece], self.piece)

    def read(self, page):
        return b"".join(ctypes.string_at(self.address(page, i), self.piece) for i in range(self.pieces))

    def indices(self, *pages):
        return Indices(page * self.page_size + i for page in pages for i in range(self.page_size))


def install():
    """Makes `import terrace.sglang` work without SGLang and torch."""
    here = globals()
    names = ("HiCacheStorage", "HiCacheStorageConfig", "HiCacheStorageExtraInfo", "PoolHitPolicy", "PoolName",
             "PoolTransfer", "PoolTransferResult")  # fmt: skip
    contents = {
        "torch": {"arange": lambda *bounds, dtype=None: Indices(range(*bounds)), "int64": None},
        "sglang.srt.mem_cache.hicache_storage": {name: here[name] for name in names},
        "sglang.srt.observability.metrics_collector": {"StorageMetrics": StorageMetrics},
    }
    fakes.put(contents)

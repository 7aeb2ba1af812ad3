"""Pages through SGLang's storage interface, without a model or a GPU: stored by one back end, read by another.

    kvserver --data-dir /tmp/terrace &
    python examples/sglang_pages.py 127.0.0.1:7070

Needs the packages terrace and sglang. What to expect:

    stored 64 pages of 256 KiB
    another engine finds 64 of 65 and reads them: equal, over local
"""

import hashlib
import sys
import time

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo

from terrace.sglang import TerraceHiCache

PAGE, PAGES, BYTES = 64, 64, 128 << 10


class Pages:
    """A host pool as SGLang's are: one page is a piece of keys and a piece of values."""

    page_size, size, layout, dtype = PAGE, PAGE * PAGES, "page_first", torch.uint8

    def __init__(self) -> None:
        self.kv_buffer = torch.zeros((2, PAGES, BYTES), dtype=torch.uint8)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        pages = [token // PAGE for token in indices.tolist()[::PAGE]]
        where = [self.kv_buffer[kind, page].data_ptr() for page in pages for kind in (0, 1)]
        return where, [BYTES] * len(where)


def engine(endpoint: str, pool: Pages) -> TerraceHiCache:
    config = HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
        enable_storage_metrics=False, is_page_first_layout=True, model_name="example",
        extra_config={"endpoint": endpoint, "interface_v1": 1},
    )  # fmt: skip
    storage = TerraceHiCache(config)
    storage.register_mem_pool_host(pool)
    until = time.monotonic() + 10
    while storage.pools["kv"].cache.state() != "ready":
        if time.monotonic() > until:
            sys.exit(f"no node at {endpoint}: {storage.pools['kv'].cache.difference()}")
        time.sleep(0.01)
    return storage


def main(endpoint: str) -> None:
    ours, theirs = Pages(), Pages()
    ours.kv_buffer.random_(generator=torch.Generator().manual_seed(0))  # one name, one content: as a model's pages are
    keys = [hashlib.sha256(b"page %d" % i).hexdigest() for i in range(PAGES + 1)]  # SGLang hashes tokens
    whole, start = torch.arange(PAGE * PAGES), HiCacheStorageExtraInfo(prefix_keys=[])

    first = engine(endpoint, ours)
    stored = first.batch_set_v1(keys[:PAGES], whole, start)
    print(f"stored {stored.count(True)} pages of {2 * BYTES >> 10} KiB")
    first.close()

    second = engine(endpoint, theirs)
    found = second.batch_exists(keys, start)
    second.batch_get_v1(keys[:found], whole[: found * PAGE], start)
    same = "equal" if torch.equal(ours.kv_buffer, theirs.kv_buffer) else "NOT EQUAL"
    way = second.pools["kv"].cache.path()["in_use"]
    print(f"another engine finds {found} of {len(keys)} and reads them: {same}, over {way}")
    second.close()
    sys.exit(0 if same == "equal" else 1)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7070")

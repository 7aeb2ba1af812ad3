"""SGLang's host pools: where their pages lie, and the cache that copies them. `_terrace.page_layers` has the layouts.

Units: bytes, pages.
Errors: ValueError for a pool or indices that are no whole pages; the back end then leaves that pool alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from terrace import Cache
from terrace._terrace import page_layers

if TYPE_CHECKING:
    from sglang.srt.mem_cache.pool_host import HostKVCache

WIDTH = 32
"""Bytes of a page's name: SGLang's SHA-256."""

Layer = tuple[int, int, int, int]
"""(address, pages, stride, bytes) of one piece of all pages, as `Cache.layout` takes it."""


def layers(pool: HostKVCache) -> list[Layer]:
    """Where the pieces of all pages lie, asked of the pool itself and checked at three pages."""
    size = int(getattr(pool, "page_size", 1) or 1)
    pages = int(pool.size) // size

    def at(page: int) -> tuple[list[int], list[int]]:
        tokens = torch.arange(page * size, (page + 1) * size, dtype=torch.int64)
        where: tuple[list[int], list[int]] = pool.get_page_buffer_meta(tokens)
        return where

    first, sizes = at(0)
    return page_layers(first, at(pages // 2)[0], at(pages - 1)[0], sizes, pages)


class Pool:
    """One host pool: its pages' places, and the cache that copies them."""

    def __init__(self, name: str, cache: Cache, where: list[Layer], page_size: int) -> None:
        self.name, self.cache, self.layers, self.page_size = name, cache, where, page_size
        self.keep: Any = None  # owner of memory that nobody else owns
        cache.layout(where)

    def rows(self, indices: torch.Tensor | range | None, keys: int) -> list[int]:
        """The pages' numbers. Raises ValueError unless `indices` are the tokens of `keys` whole pages."""
        indices = range(0) if indices is None else indices
        count, firsts = len(indices), indices[:: self.page_size]
        tokens = list(firsts) if isinstance(firsts, range) else firsts.tolist()
        if count != keys * self.page_size or any(token % self.page_size for token in tokens):
            raise ValueError(f"{count} tokens are not {keys} whole pages of {self.page_size}")
        return [token // self.page_size for token in tokens]

    def span(self, page: int) -> tuple[int, int]:
        """Address and length of a page that is one piece."""
        ((address, _, stride, length),) = self.layers
        return address + page * stride, length


def spans(things: Sequence[Any], sizes: Sequence[Any] | None, count: int) -> list[tuple[int, int]]:
    """Address and length of tensors, or of addresses and their sizes. Raises ValueError for what is neither."""
    found = []
    for thing, size in zip(things, sizes or [None] * len(things), strict=True):
        if isinstance(thing, int) and isinstance(size, int):
            found.append((thing, size))
        elif getattr(thing, "is_contiguous", bool)():
            found.append((thing.data_ptr(), thing.numel() * thing.element_size()))
        else:
            raise ValueError("neither a contiguous tensor nor an address and its size")
    if not found or len(found) != count:
        raise ValueError(f"{count} keys and {len(found)} pages")
    return found

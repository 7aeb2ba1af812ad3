"""SGLang's pages: their names, and where a host pool keeps their pieces.

    page p of a pool = its pieces in the order of `get_page_buffer_meta`, piece i at  address_i + p * stride_i

    page_first     K of all layers │ V of all layers                   2 pieces
    layer_first    K of layer 0 │ V of layer 0 │ K of layer 1 …        2 pieces per layer
    state pools    temporal │ convolution 0 │ …                        1 piece each

Units: bytes, pages.
Errors: ValueError for a pool or indices that are no whole pages; the back end then leaves that pool alone.
Why the pool is asked instead of its tensors read: its layouts are SGLang's affair and change; what it says of three
pages shows whether all lie at even distances.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from terrace import Cache

if TYPE_CHECKING:
    from sglang.srt.mem_cache.pool_host import HostKVCache

WIDTH = 32
"""Bytes of a page's name: SGLang's SHA-256."""

Layer = tuple[int, int, int, int]
"""(address, pages, stride, bytes) of one piece of all pages, as `Cache.layout` takes it."""


def name(key: str) -> bytes:
    """32 bytes for any key: SGLang's own are SHA-256 in hex, others are hashed."""
    try:
        raw = bytes.fromhex(key)
        if len(raw) == WIDTH:
            return raw
    except ValueError:
        pass
    return hashlib.sha256(b"terrace.sglang key\0" + key.encode()).digest()


def layers(pool: HostKVCache) -> list[Layer]:
    """(address, pages, stride, bytes) of each piece of a page, asked of the pool itself and checked at three pages.

    Pieces that touch become one. Raises ValueError for a pool whose pages do not lie at even distances.
    """
    size = int(getattr(pool, "page_size", 1) or 1)
    pages = int(pool.size) // size

    def at(page: int) -> tuple[list[int], list[int]]:
        tokens = torch.arange(page * size, (page + 1) * size, dtype=torch.int64)
        where: tuple[list[int], list[int]] = pool.get_page_buffer_meta(tokens)
        return where

    (start, sizes), (last, _), (middle, _) = at(0), at(pages - 1), at(pages // 2)
    found: list[Layer] = []
    for address, end, between, length in zip(start, last, middle, sizes, strict=True):
        stride = (end - address) // (pages - 1) if pages > 1 else length
        if end != address + stride * (pages - 1) or between != address + stride * (pages // 2) or stride < length:
            raise ValueError(f"{type(pool).__name__} ({pool.layout}): pages do not lie at even distances")
        if found and found[-1][0] + found[-1][3] == address and found[-1][2] == stride:
            address, length = found[-1][0], found.pop()[3] + length
        found.append((address, pages, stride, length))
    return found


class Pool:
    """One host pool: its pages' places, and the cache that copies them."""

    def __init__(self, cache: Cache, where: list[Layer], page_size: int) -> None:
        self.cache, self.layers, self.page_size = cache, where, page_size
        self.was = ""
        self.keep: Any = None  # owner of memory that nobody else owns
        cache.layout(where)

    def rows(self, indices: torch.Tensor | range | None, keys: int) -> list[int]:
        """The pages' numbers. Raises ValueError unless `indices` are the tokens of `keys` whole pages."""
        tokens = list(indices or ()) if isinstance(indices, range | None) else indices.tolist()
        if len(tokens) != keys * self.page_size or any(token % self.page_size for token in tokens[:: self.page_size]):
            raise ValueError(f"{len(tokens)} tokens are not {keys} whole pages of {self.page_size}")
        return [token // self.page_size for token in tokens[:: self.page_size]]

    def span(self, page: int) -> tuple[int, int]:
        """Address and length of a page that is one piece."""
        ((address, _, stride, length),) = self.layers
        return address + page * stride, length


def spans(things: Sequence[Any], sizes: Sequence[Any], count: int) -> list[tuple[int, int]]:
    """Address and length of tensors, or of addresses and their sizes. Raises ValueError for what is neither."""
    found = []
    for thing, size in zip(things, sizes, strict=True):
        if isinstance(thing, int) and isinstance(size, int):
            found.append((thing, size))
        elif getattr(thing, "is_contiguous", bool)():
            found.append((thing.data_ptr(), thing.numel() * thing.element_size()))
        else:
            raise ValueError("neither a contiguous tensor nor an address and its size")
    if not found or len(found) != count:
        raise ValueError(f"{count} keys and {len(found)} pages")
    return found

"""A prefix is of use from its head on, so of a load of many blocks the first blocks of the prefix are there first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import WIDTH, Memory, hashes, saved

import terrace

BLOCKS, LAYERS, LAYER_BYTES = 16, 3, 1 << 20  # blocks of 3 MiB: over gRPC five go in one call
LOADS = 50

# Where the engine has them is in no order, so that only the chain's order can be seen.
IDS = [(7 * i + 3) % BLOCKS for i in range(BLOCKS)]


@pytest.mark.parametrize("local", ["auto", "off"])
def test_the_first_blocks_of_a_prefix_come_first(connect: Callable[..., terrace.Cache], local: str) -> None:
    memory = Memory(blocks=BLOCKS, layers=LAYERS, block_bytes=LAYER_BYTES)
    cache, names = connect(local=local, transfer_timeout_ms=20_000), hashes(BLOCKS)
    cache.layout(memory.layout())
    memory.fill(b"\1" * len(memory.buffer))
    assert saved(cache, 1, names, IDS).ok
    last_bytes = [((LAYERS - 1) * BLOCKS + block + 1) * LAYER_BYTES - 1 for block in IDS]

    seen = set()
    for job in range(2, LOADS):
        memory.clear()
        assert cache.load(job, 0, names, WIDTH, 0, IDS)
        while (done := cache.wait(job, 0)) is None:
            # From the chain's end to its head: blocks that come meanwhile can only be seen in front of the others.
            there = [memory.buffer[at] != b"\0" for at in reversed(last_bytes)][::-1]
            count = sum(there)
            assert there == [True] * count + [False] * (BLOCKS - count), "a block came before one in front of it"
            seen.add(count)
        assert done.ok, done.reason
        if seen - {0, BLOCKS}:
            return
    pytest.fail("no load was ever seen half done")

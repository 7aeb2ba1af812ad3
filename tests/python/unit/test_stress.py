"""Many requests at once, while the node comes and goes: whatever is reported loaded is right."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable

import pytest
from conftest import WIDTH, Memory, Node, hashes

import terrace

BLOCKS, SALTS, PHASE_BLOCKS, LIMIT_S = 4, 6, 16, 90.0


def restart(node: Node) -> None:
    node.kill()
    node.start()


def freeze(node: Node) -> None:
    node.freeze()
    time.sleep(0.4)  # longer than lookups have: they must be given up meanwhile
    node.thaw()


@pytest.mark.parametrize("local", ["auto", "off"])
def test_whatever_is_reported_loaded_is_right(node: Node, connect: Callable[..., terrace.Cache], local: str) -> None:
    memory = Memory(blocks=64, layers=4, block_bytes=16384)
    cache = connect(local=local, max_jobs=8, miss_ms=50, transfer_timeout_ms=1000, lookup_timeout_ms=300, lease_ms=500)
    cache.layout(memory.layout())
    chance, piece = random.Random(7), memory.block_bytes
    # What each prompt's blocks hold, layer by layer.
    truth = [[[chance.randbytes(piece) for _ in range(memory.layers)] for _ in range(BLOCKS)] for _ in range(SALTS)]
    free = list(range(0, 64, BLOCKS))
    running: dict[int, tuple[str, int, int, str]] = {}  # job: kind, salt, first of its blocks, request
    job = checked = 0
    disturbances = [restart, freeze, restart]
    began = time.monotonic()
    ended = False
    while not ended or running:
        if checked >= PHASE_BLOCKS and not ended:
            checked, ended = 0, not disturbances
            if disturbances:
                disturbances.pop()(node)
        if free and not ended:
            job, at, salt = job + 1, free.pop(chance.randrange(len(free))), chance.randrange(SALTS)
            ids, names, request = list(range(at, at + BLOCKS)), hashes(BLOCKS, salt), f"r{job}"
            if chance.random() < 0.4:
                kind = "save"
                for i, layers in enumerate(truth[salt]):
                    for layer, data in enumerate(layers):
                        place = (layer * memory.blocks + at + i) * piece
                        ctypes.memmove(memory.address + place, data, piece)
                taken = cache.save(job, names, WIDTH, 0, ids)
            else:
                kind = "load"
                found = cache.exists(names, WIDTH, 300, request=request)
                taken = found > 0 and cache.load(job, cache.lease(request), names, WIDTH, 0, ids[:found])
            if taken:
                running[job] = (kind, salt, at, request)
            else:
                free.append(at)
                cache.forget(request)
        for done in cache.finished():
            kind, salt, at, request = running.pop(done.job)
            assert done.kind == kind
            cache.forget(request)
            if kind == "load":
                for i in range(done.blocks + len(done.failed_block_ids)):
                    if at + i not in done.failed_block_ids:
                        assert memory.block(at + i) == b"".join(truth[salt][i]), done
                        checked += 1
            free.append(at)
        assert time.monotonic() - began < LIMIT_S, (running, cache.state(), cache.stats())
    assert cache.stats()["leases"] == 0

"""The cache with blocks on a device: on the host device, which goes the way of a GPU in ordinary memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import terrace
from conftest import WIDTH, Memory, Node, ask, hashes, loaded, saved

Connect = Callable[..., terrace.Cache]


@pytest.mark.parametrize("local", ["auto", "off"])
def test_blocks_go_through_the_device_and_come_back(connect: Connect, local: str) -> None:
    cache, memory = connect(local=local), Memory()
    cache.layout(memory.layout(), device="host")
    before, names = memory.scramble(), hashes(12)
    done = saved(cache, 1, names, list(range(12)))
    assert (done.kind, done.blocks, done.ok, done.reason) == ("save", 12, True, None)
    assert ask(cache, "r", names, first=3) == 9
    memory.clear()
    done = loaded(cache, 2, cache.lease("r"), names, list(range(28, 19, -1)), first=3)
    assert (done.kind, done.blocks, done.bytes, done.failed_block_ids) == ("load", 9, 9 * 3 * 8192, [])
    for i in range(9):
        assert memory.block(28 - i) == memory.block(3 + i, before)
    assert memory.block(19) == memory.block(29) == bytes(3 * 8192)


def test_a_device_and_the_processor_make_the_same_blocks(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout())
    before, names = memory.scramble(), hashes(8)
    assert saved(cache, 1, names[: 4 * WIDTH], [0, 1, 2, 3]).ok
    cache.layout(memory.layout(), device="host")
    assert saved(cache, 2, names, list(range(8))).ok
    assert cache.stats()["present_blocks"] == 4
    memory.clear()
    assert loaded(cache, 3, 0, names[: 4 * WIDTH], [8, 9, 10, 11]).ok
    cache.layout(memory.layout())
    assert loaded(cache, 4, 0, names, list(range(12, 16)), first=4).ok
    for i in range(8):
        assert memory.block(8 + i) == memory.block(i, before)


def test_more_blocks_than_all_slots_hold(connect: Connect) -> None:
    # 12 blocks of 6 MiB, two to a slot: more than the slots for saves, or for loads, hold at once.
    memory = Memory(blocks=12, layers=3, block_bytes=2 << 20)
    cache = connect(transfer_timeout_ms=60_000)
    cache.layout(memory.layout(), device="host")
    memory.fill(os.urandom(1 << 20) * (len(memory.buffer) >> 20))
    ids, names = list(range(12)), hashes(12)
    stamps = [os.urandom(64) for _ in ids]
    data = bytearray(memory.buffer)
    for block, stamp in zip(ids, stamps, strict=True):
        data[block * memory.block_bytes : block * memory.block_bytes + 64] = stamp
    memory.fill(bytes(data))
    before = bytes(memory.buffer)
    done = cache.save(1, names, WIDTH, 0, ids) and cache.wait(1, 60_000)
    assert done and done.ok, done
    memory.clear()
    done = cache.load(2, 0, names, WIDTH, 0, ids) and cache.wait(2, 60_000)
    assert done and done.ok, done
    assert bytes(memory.buffer) == before


def test_blocks_that_are_not_there_are_reported_and_the_rest_arrives(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout(), device="host")
    before, names = memory.scramble(), hashes(6)
    saved(cache, 1, names[: 3 * WIDTH], [0, 1, 2])
    done = loaded(cache, 2, 0, names, [10, 11, 12, 13, 14])
    assert (done.blocks, done.failed_block_ids) == (3, [13, 14])
    for i in range(3):
        assert memory.block(10 + i) == memory.block(i, before)


def test_layers_of_several_shapes_and_strides_are_one_block(connect: Connect) -> None:
    cache, memory = connect(), Memory(blocks=40, layers=1)
    base = memory.address
    # Two interleaved layers, and a third of another shape behind them, from an odd address on.
    layers = [(base, 8, 4096, 1000), (base + 2048, 8, 4096, 1000), (base + 40_001, 8, 700, 699)]
    cache.layout(layers, device="host")
    before, names = memory.scramble(), hashes(2)
    assert saved(cache, 1, names, [5, 2]).ok
    memory.clear()
    assert loaded(cache, 2, 0, names, [0, 7]).ok
    after = bytearray(len(before))
    for source, target in [(5, 0), (2, 7)]:
        for address, _, stride, length in layers:
            start, end = address - base + source * stride, address - base + target * stride
            after[end : end + length] = before[start : start + length]
    assert bytes(memory.buffer) == bytes(after)


def test_a_device_that_is_not_there_is_refused_in_words(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    with pytest.raises(ValueError, match="cuda:4000"):
        cache.layout(memory.layout(), device="cuda:4000")
    with pytest.raises(ValueError, match="is none"):
        cache.layout(memory.layout(), device="tpu:0")
    with pytest.raises(ValueError, match="another device"):
        cache.layout(memory.layout(), device="host", stream=12345)
    with pytest.raises(ValueError, match="call layout first"):
        cache.save(1, hashes(1), WIDTH, 0, [0])
    with pytest.raises(RuntimeError, match="cuda:4000"):
        terrace.Transfer("cuda:4000", memory.layout())


def test_a_frozen_node_keeps_no_block_of_a_device(node: Node, connect: Connect) -> None:
    cache, memory = connect(transfer_timeout_ms=60_000), Memory()
    cache.layout(memory.layout(), device="host")
    memory.scramble()
    names = hashes(4)
    saved(cache, 1, names, [0, 1, 2, 3])
    node.freeze()
    try:
        assert cache.save(2, hashes(4, salt=1), WIDTH, 0, [4, 5, 6, 7])
        cache.wait_gathered(100)
        memory.scramble()
        assert cache.load(3, 0, names, WIDTH, 0, [8, 9, 10, 11])
        cache.close()  # waits for nobody but the device
        memory.clear()
    finally:
        node.thaw()
    assert bytes(memory.buffer) == bytes(len(memory.buffer))
    assert {done.job: done.ok for done in cache.finished()} == {2: False, 3: False}


def test_a_transfer_by_itself_saves_and_loads(connect: Connect) -> None:
    memory = Memory()
    transfer = terrace.Transfer("host", memory.layout())
    assert transfer.block_bytes == 3 * 8192
    assert transfer.blocks_per_batch == (16 << 20) // (3 * 8192)
    before = memory.scramble()
    saved_blocks = transfer.save([4, 0, 30])
    assert saved_blocks == b"".join(memory.block(i, before) for i in [4, 0, 30])
    transfer.load([1, 2, 3], saved_blocks)
    assert [memory.block(i) for i in [1, 2, 3]] == [memory.block(i, before) for i in [4, 0, 30]]
    with pytest.raises(RuntimeError, match="written twice"):
        transfer.load([1, 1], bytes(2 * 3 * 8192))
    with pytest.raises(ValueError, match="must be"):
        transfer.load([1], b"short")
    # Heads before tokens in memory, tokens before heads in the block.
    layer_bytes = memory.blocks * memory.block_bytes
    strided = terrace.Transfer.strided(
        "host",
        [memory.address + layer * layer_bytes for layer in range(3)],
        (1, memory.blocks, 16, 4),
        (0, 8192, 128, 16 * 128),
        128,
    )
    page = memory.block(6)[:8192]
    rows = [page[(head * 16 + token) * 128 :][:128] for token in range(16) for head in range(4)]
    assert strided.save([6])[:8192] == b"".join(rows)

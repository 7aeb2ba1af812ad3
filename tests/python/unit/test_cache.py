"""The engine-facing cache against a real node: bytes, promises, and every way a node can fail."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable

import pytest
from conftest import OWNER, WIDTH, Memory, Node, ask, hashes, loaded, saved, until

import terrace

Connect = Callable[..., terrace.Cache]


@pytest.mark.parametrize("local", ["auto", "off"])
def test_what_was_saved_is_loaded_into_other_blocks(connect: Connect, local: str) -> None:
    cache, memory = connect(local=local), Memory()
    cache.layout(memory.layout())
    before, names = memory.scramble(), hashes(12)
    done = saved(cache, 1, names, list(range(12)))
    assert (done.kind, done.blocks, done.ok, done.reason) == ("save", 12, True, None)

    assert ask(cache, "r", names, first=3) == 9
    memory.clear()
    done = loaded(cache, 2, cache.lease("r"), names, list(range(20, 29)), first=3)
    assert (done.kind, done.blocks, done.bytes, done.failed_block_ids) == ("load", 9, 9 * 3 * 8192, [])
    for i in range(9):
        assert memory.block(20 + i) == memory.block(3 + i, before)
    assert memory.block(19) == memory.block(29) == bytes(3 * 8192)
    stats, path = cache.stats(), cache.path()
    assert (stats["saved_blocks"], stats["loaded_blocks"], stats["loaded_bytes"]) == (12, 9, 9 * 3 * 8192)
    assert path["in_use"] == ("local" if local == "auto" else "grpc")
    assert path["local_got_blocks" if local == "auto" else "grpc_got_blocks"] == 9


def test_a_lookup_does_not_wait_and_answers_the_same_until_forgotten(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout())
    names = hashes(8)
    saved(cache, 1, names[: 5 * WIDTH], list(range(5)))
    assert cache.lookup("r", names, WIDTH, 0) is None
    assert ask(cache, "r", names) == 5
    lease = cache.lease("r")
    saved(cache, 2, names, [5, 6, 7], first=5)
    assert (cache.lookup("r", names, WIDTH, 0), cache.lease("r")) == (5, lease)
    cache.forget("r")
    assert cache.lease("r") == 0
    assert ask(cache, "r", names) == 8
    assert ask(cache, "probe", names, probe=True) == 8
    assert (cache.lease("probe"), cache.stats()["leases"]) == (0, 1)


def test_a_lease_of_the_scheduler_serves_a_worker_of_the_same_owner(connect: Connect) -> None:
    scheduler, worker, memory = connect(), connect(), Memory()
    worker.layout(memory.layout())
    names = hashes(4)
    saved(worker, 1, names, [0, 1, 2, 3])
    assert ask(scheduler, "r", names) == 4
    assert loaded(worker, 2, scheduler.lease("r"), names, [4, 5, 6, 7]).ok


@pytest.mark.parametrize("local", ["auto", "off"])
def test_a_load_of_many_blocks_is_one_lookup_one_lease_and_one_call(node: Node, connect: Connect, local: str) -> None:
    cache, memory = connect(local=local), Memory(blocks=256)
    cache.layout(memory.layout())
    names = hashes(128)
    assert saved(cache, 1, names, list(range(128))).ok
    before = node.calls()
    assert ask(cache, "r", names) == 128
    assert loaded(cache, 2, cache.lease("r"), names, list(range(128, 256))).ok
    until(lambda: (node.calls() - before)["get"] > 0, "the call to be counted")  # it may be behind its answer
    made = node.calls() - before
    assert (made["lookup"], made["get"], cache.stats()["leases"]) == (1, 1, 1)


def test_a_lookup_asks_for_every_part(connect: Connect) -> None:
    names, parts = hashes(4), [(0, 0), (1, 0)]
    workers = [connect(part=part) for part in parts]
    memories = [Memory(), Memory()]
    for worker, memory in zip(workers, memories, strict=True):
        worker.layout(memory.layout())
        memory.scramble()
    scheduler = connect(parts=parts)
    saved(workers[0], 1, names, [0, 1, 2, 3])
    assert ask(scheduler, "early", names) == 0
    saved(workers[1], 1, names[: 3 * WIDTH], [0, 1, 2])
    assert ask(scheduler, "r", names) == 3
    for worker, memory in zip(workers, memories, strict=True):
        assert loaded(worker, 2, scheduler.lease("r"), names, [8, 9, 10]).ok
        assert memory.block(8) == memory.block(0)
    assert memories[0].block(8) != memories[1].block(8)


def test_a_block_that_failed_to_load_is_not_promised_again_until_it_was_saved(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout())
    names = hashes(6)
    saved(cache, 1, names[: 3 * WIDTH], [0, 1, 2])
    done = loaded(cache, 2, 0, names, [10, 11, 12, 13, 14])
    assert (done.blocks, done.failed_block_ids, done.ok) == (3, [13, 14], False)
    assert done.reason is not None and "miss" in done.reason
    # A node that has them now, from another engine, is not believed at once.
    other = connect()
    other.layout(memory.layout())
    saved(other, 1, names, list(range(6)))
    assert ask(cache, "r", names) == 3
    saved(cache, 3, names, list(range(6)))
    cache.forget("r")
    assert ask(cache, "r", names) == 6


def test_a_miss_cuts_an_answer_already_given(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout())
    names = hashes(6)
    saved(cache, 1, names, list(range(6)))
    assert ask(cache, "r", names, first=1) == 5
    cache.miss(names[4 * WIDTH : 5 * WIDTH], WIDTH)
    assert cache.lookup("r", names, WIDTH, 1) == 3
    assert ask(cache, "next", names, first=4) == 0
    # Saved again through another cache, as a scheduler hears of its workers.
    cache.saved(names[4 * WIDTH : 5 * WIDTH], WIDTH)
    cache.forget("r")
    assert ask(cache, "r", names, first=1) == 5


def test_blocks_the_node_has_are_not_sent_again(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout())
    names = hashes(6)
    saved(cache, 1, names[: 4 * WIDTH], list(range(4)))
    assert saved(cache, 2, names, list(range(6))).ok
    assert (cache.stats()["present_blocks"], cache.path()["local_put_blocks"]) == (4, 6)


def test_the_queue_is_bounded_and_a_report_makes_room(connect: Connect) -> None:
    cache, memory = connect(max_jobs=2), Memory()
    cache.layout(memory.layout())
    names = hashes(1)
    assert cache.save(1, names, WIDTH, 0, [0])
    assert cache.save(2, names, WIDTH, 0, [0])
    assert not cache.save(3, names, WIDTH, 0, [0])
    reported: list[int] = []

    def both() -> bool:
        reported.extend(done.job for done in cache.finished())
        return len(reported) == 2

    until(both, "two reports")
    assert sorted(reported) == [1, 2]
    assert cache.wait(1, 0) is None
    assert cache.save(3, names, WIDTH, 0, [0])


def test_what_can_never_work_is_refused_in_words(connect: Connect, node: Node) -> None:
    cache, memory = connect(), Memory()
    names = hashes(4)
    with pytest.raises(ValueError, match="call layout first"):
        cache.save(1, names, WIDTH, 0, [0])
    with pytest.raises(ValueError, match="overlap"):
        cache.layout([(memory.address, 4, 8192, 8192), (memory.address + 8191, 4, 8192, 8192)])
    cache.layout(memory.layout())
    with pytest.raises(ValueError, match="block 32 is not one of the engine's 32"):
        cache.load(1, 0, names, WIDTH, 0, [32])
    with pytest.raises(ValueError, match="block 3 is named twice"):
        cache.load(1, 0, names, WIDTH, 0, [3, 3])
    with pytest.raises(ValueError, match="has 4 blocks; 2 from 3 on are wanted"):
        cache.load(1, 0, names, WIDTH, 3, [0, 1])
    with pytest.raises(ValueError, match="no multiple of 32"):
        cache.lookup("r", names[:-1], WIDTH, 0)
    with pytest.raises(ValueError, match="kv_dtyp is no field"):
        terrace.Cache(node.endpoint, {"label": "x", "kv_dtyp": "bf16"}, owner=OWNER)
    with pytest.raises(ValueError, match="16 are wanted"):
        terrace.Cache(node.endpoint, {"label": "x"}, owner=b"short")
    with pytest.raises(ValueError, match="endpoint"):
        terrace.Cache("https://x", {"label": "x"}, owner=OWNER)


def test_an_engine_runs_without_a_node_and_uses_one_that_comes(node: Node, connect: Connect) -> None:
    node.kill()
    cache, memory = connect(ready=False), Memory()
    cache.layout(memory.layout())
    names = hashes(2)
    assert cache.state() == "connecting"
    assert cache.lookup("r", names, WIDTH, 0) == 0
    done = saved(cache, 1, names, [0, 1])
    assert (done.blocks, done.failed_block_ids, done.reason) == (0, [0, 1], "the node is away")
    assert loaded(cache, 2, 7, names, [3, 4]).failed_block_ids == [3, 4]
    node.start()
    until(lambda: cache.state() == "ready", "the node to be found")
    assert saved(cache, 3, names, [0, 1]).ok


def test_a_node_that_is_killed_is_a_miss_and_is_used_again_when_it_is_back(node: Node, connect: Connect) -> None:
    cache, memory = connect(transfer_timeout_ms=1000), Memory()
    cache.layout(memory.layout())
    names = hashes(4)
    saved(cache, 1, names, [0, 1, 2, 3])
    assert ask(cache, "r", names) == 4
    node.kill()
    done = loaded(cache, 2, cache.lease("r"), names, [4, 5, 6, 7])
    assert not done.ok and done.seconds < 3
    until(lambda: cache.state() == "down", "the loss to be noticed")
    assert cache.lookup("other", names, WIDTH, 0) == 0
    assert cache.difference() is not None
    node.start()
    until(lambda: cache.state() == "ready", "the node to be found again")
    cache.forget("r")
    assert saved(cache, 3, hashes(4, salt=1), [0, 1, 2, 3]).ok
    assert ask(cache, "again", hashes(4, salt=1)) == 4
    assert cache.stats()["opened"] >= 2


def test_news_of_the_node_is_told_once(node: Node, connect: Connect) -> None:
    cache = connect(local="off")
    assert cache.news() == (True, "is there, over grpc")
    assert cache.news() is None
    node.kill()
    until(lambda: cache.lookup("r", hashes(1), WIDTH, 0) == 0 and cache.state() == "down", "the loss to be noticed")
    good, line = cache.news() or (True, "")
    assert not good and line.startswith("is away (") and line.endswith("is back")
    assert cache.news() is None
    node.start()
    until(lambda: cache.state() == "ready", "the node to be found again")
    assert cache.news() == (True, "is there, over grpc")


def test_block_ids_may_be_their_bytes(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout())
    before, names = memory.scramble(), hashes(2)
    assert cache.save(1, names, WIDTH, 0, array("I", [5, 3]).tobytes())
    done = cache.wait(1, 20_000)
    assert done is not None and done.ok
    assert loaded(cache, 2, 0, names, [8, 9]).ok
    assert [memory.block(8), memory.block(9)] == [memory.block(5, before), memory.block(3, before)]
    with pytest.raises(ValueError, match="four bytes each"):
        cache.save(3, names, WIDTH, 0, b"abc")


@pytest.mark.parametrize("local", ["auto", "off"])
def test_a_frozen_node_holds_up_nobody(node: Node, connect: Connect, local: str) -> None:
    cache = connect(local=local, lookup_timeout_ms=200, transfer_timeout_ms=60_000, lease_ms=60_000)
    memory = Memory()
    cache.layout(memory.layout())
    memory.scramble()
    names = hashes(4)
    saved(cache, 1, names, [0, 1, 2, 3])
    node.freeze()
    try:
        began = time.monotonic()
        assert ask(cache, "r", names) == 0
        # Looked at first: the loss may be noticed while the lookup is on its way.
        ready = cache.state() == "ready"
        assert cache.lookup("r2", names, WIDTH, 0) == 0 or ready
        assert time.monotonic() - began < 2
        # A save under way gives the engine its blocks back when it wants them.
        began = time.monotonic()
        assert cache.save(2, hashes(4, salt=1), WIDTH, 0, [4, 5, 6, 7])
        cache.wait_gathered(100)
        assert time.monotonic() - began < 2
        memory.scramble()
    finally:
        node.thaw()
    until(lambda: cache.state() == "ready", "the node to thaw")
    memory.clear()
    until(lambda: loaded(cache, time.monotonic_ns(), 0, names, [8, 9, 10, 11]).ok, "a load after the thaw")


def test_closing_ends_every_job_and_later_calls_are_misses(node: Node, connect: Connect) -> None:
    cache, memory = connect(transfer_timeout_ms=60_000), Memory()
    cache.layout(memory.layout())
    node.freeze()
    try:
        assert cache.save(1, hashes(4), WIDTH, 0, [0, 1, 2, 3])
        assert cache.load(2, 0, hashes(4), WIDTH, 0, [8, 9, 10, 11])
        began = time.monotonic()
        cache.close()
        assert time.monotonic() - began < 3
    finally:
        node.thaw()
    assert {done.job: done.ok for done in cache.finished()} == {1: False, 2: False}
    assert cache.lookup("r", hashes(4), WIDTH, 0) == 0
    assert cache.exists(hashes(4), WIDTH, 1000) == 0
    with pytest.raises(ValueError, match="layout"):
        cache.load(3, 0, hashes(4), WIDTH, 0, [0])
    with pytest.raises(ConnectionError):
        cache.invalidate_all()
    cache.close()


def test_waiting_lets_other_threads_run(node: Node, connect: Connect) -> None:
    cache, memory = connect(transfer_timeout_ms=1500), Memory()
    cache.layout(memory.layout())
    node.freeze()
    turns, stop = 0, threading.Event()

    def spin() -> None:
        nonlocal turns
        while not stop.wait(0.001):
            turns += 1

    thread = threading.Thread(target=spin)
    try:
        assert cache.load(1, 0, hashes(2), WIDTH, 0, [0, 1])
        thread.start()
        cache.wait(1, 300)
    finally:
        node.thaw()
        stop.set()
        thread.join()
    assert turns > 10


def test_exists_waits_and_leases_under_a_name(connect: Connect) -> None:
    cache, memory = connect(), Memory()
    cache.layout(memory.layout())
    names = hashes(6)
    saved(cache, 1, names[: 4 * WIDTH], [0, 1, 2, 3])
    assert cache.exists(names, WIDTH, 5000) == 4
    assert cache.stats()["lookups_known"] == 0
    assert cache.exists(names, WIDTH, 5000, first=1, request="batch") == 3
    assert cache.lease("batch") != 0
    cache.forget("batch")
    assert cache.invalidate_all() == 4
    assert cache.exists(names, WIDTH, 5000) == 0


def test_another_layout_takes_over_when_the_copies_are_done(connect: Connect) -> None:
    cache, first, second = connect(), Memory(), Memory()
    cache.layout(first.layout())
    first.scramble()
    names = hashes(8)
    saved(cache, 1, names, list(range(8)))
    assert cache.load(2, 0, names, WIDTH, 0, list(range(8, 16)))
    cache.layout(second.layout())
    done = cache.wait(2, 5000)
    assert done is not None
    cache.layout([])
    with pytest.raises(ValueError, match="call layout first"):
        cache.load(3, 0, names, WIDTH, 0, [0])
    cache.layout(second.layout())
    assert loaded(cache, 4, 0, names, list(range(8))).ok
    assert [second.block(i) for i in range(8)] == [first.block(i) for i in range(8)]


def test_blocks_of_another_length_are_not_taken_for_ours(connect: Connect) -> None:
    cache, small, large = connect(), Memory(layers=1), Memory(layers=2)
    names = hashes(2)
    cache.layout(small.layout())
    saved(cache, 1, names, [0, 1])
    cache.layout(large.layout())
    done = loaded(cache, 2, 0, names, [0, 1])
    assert done.failed_block_ids == [0, 1]
    assert done.reason == "a block has 8192 bytes, the engine's have 16384"


def test_a_difference_is_told_in_one_line(connect: Connect, node: Node) -> None:
    connect(label="model")
    other = terrace.Cache(node.endpoint, {"label": "model", "kv_dtype": "bf16"}, owner=OWNER)
    until(lambda: other.state() == "ready", "the cache to be ready")
    assert other.difference() == 'kv_dtype was "u8", is "bf16"'
    other.close()
    strict = terrace.Cache(node.endpoint, {"label": "model", "kv_dtype": "f32"}, owner=OWNER, strict=True)
    until(lambda: strict.state() == "down", "the refusal")
    assert "kv_dtype" in (strict.difference() or "")
    strict.close()


def test_a_forked_child_can_end_without_the_threads_it_has_not_got(connect: Connect) -> None:
    cache = connect()
    child = os.fork()
    if child == 0:
        try:
            cache.close()
            os._exit(0)
        finally:
            os._exit(1)
    until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the child's end")
    assert ask(cache, "r", hashes(2)) == 0


FORKED = """
import ctypes, gc, os, sys, time, terrace
def until(true):
    while not true():
        time.sleep(0.002)
cache = terrace.Cache(sys.argv[1], {"label": "unit"}, owner=b"unit tests' own.")
until(lambda: cache.state() == "ready")
buffer = (ctypes.c_char * 8192)()
layers = [(ctypes.addressof(buffer), 2, 4096, 4096)]
cache.layout(layers, device=sys.argv[2])
transfer = terrace.Transfer("host", layers)
names = bytes(range(64))
assert cache.save(1, names, 32, 0, [0, 1]) and cache.wait(1, 20_000).ok
child = os.fork()
if child == 0:
    assert cache.wait_gathered(0)
    for call in (lambda: cache.layout([]), lambda: cache.save(2, names, 32, 0, [0, 1])):
        try:
            call()
        except ValueError as error:
            assert "fork" in str(error), error
        else:
            raise AssertionError("the parent's cache was used")
    cache.close()
    del cache, transfer
    gc.collect()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert cache.load(3, 0, names, 32, 0, [0, 1]) and cache.wait(3, 20_000).ok
assert transfer.save([0])
cache.close()
"""


def test_a_forked_child_drops_the_cache_and_the_parent_goes_on(node: Node) -> None:
    subprocess.run([sys.executable, "-c", FORKED, node.endpoint, "host"], check=True, timeout=60)


def test_closing_gives_back_leases_and_staging_even_of_a_frozen_node(node: Node, connect: Connect) -> None:
    cache, memory, other = connect(lease_ms=60_000), Memory(), terrace.Client(node.endpoint)
    cache.layout(memory.layout())
    saved(cache, 1, hashes(2), [0, 1])
    assert ask(cache, "r", hashes(2)) == 2 and other.stats()["leases"] == 1
    node.freeze()
    try:
        cache.close()
    finally:
        node.thaw()
    until(lambda: other.stats()["leases"] == 0, "the lease's end")
    # The object is there still, and nothing that the node granted it is.
    granted = ("terrace_local_connections", "terrace_local_staging_bytes")
    until(lambda: all(other.stats()[name] == 0 for name in granted), "the end of the connections")
    other.close()

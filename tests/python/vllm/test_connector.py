"""vLLM's connector on a real engine: the same tokens as without Terrace, whatever happens to the node.

One process, engines one after the other. What was hit is counted by Terrace after its last copy and check, never by
vLLM's counters, which count when blocks are allocated.
"""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import threading
import time

import pytest
from engine import BLOCK, CROWD, LONGER, MANY_TOKENS, SHORT, A, B, Engine, loadable, tidy
from node import Node

QUICK = {"lookup_timeout_ms": 200, "transfer_timeout_ms": 1500}
USUAL = {"lookup_timeout_ms": 200, "transfer_timeout_ms": 5000}  # the defaults
AWAY = {}  # a node that is known to be away is not asked, and one that was killed does not keep its caller waiting
MARGIN_S = 4.0  # what a machine that is busy with other things may add; a stall of 20 s stays far outside


@pytest.fixture
def node():
    with_room = Node(ram="128MiB")
    yield with_room
    with_room.close()


def test_a_restarted_engine_hits_what_the_first_one_saved(model, node, expected):
    with Engine(model, node.endpoint, events=True) as cold:
        cold.ready()
        assert cold.loaded(A, B) == (expected(A, B), 0)
        cold.settle()
        whole = (len(A) + 15) // BLOCK + (len(B) + 15) // BLOCK  # 15 of the 16 generated tokens have KV
        assert cold.counts("saved_blocks") == whole
        assert cold.counts("dropped_blocks") == cold.counts("failed_blocks") == 0
        stored = [e for e in cold.events if type(e).__name__ == "BlockStored" and e.medium == "STORAGE"]
        assert len(stored) == whole
        # Saves of different requests end in any order.
        roots = [e.token_ids for e in stored if e.parent_block_hash is None]
        assert sorted(roots) == sorted([A[:BLOCK], B[:BLOCK]])
        assert cold.scheduler.connector.requires_kv_delivery is False

    with Engine(model, node.endpoint) as warm:
        warm.ready()
        assert warm.loaded(A, B) == (expected(A, B), loadable(len(A)) + loadable(len(B)))
        assert warm.counts("loaded_bytes") == warm.counts("loaded_blocks") * 4 * len(warm.kv(1))
        warm.settle()
        assert warm.counts("saved_blocks") == 0, "what the node has is not sent again"

        # A longer prompt with the same beginning.
        warm.forget()
        assert warm.loaded(LONGER) == (expected(LONGER), len(A) // BLOCK)

        # Nothing to find in a prompt without a whole block, and no harm.
        assert warm.loaded(SHORT) == (expected(SHORT), 0)

        # A salt is another's business: nothing is shared with those who have none, all with those who have the same.
        warm.forget()
        assert warm.loaded(A, salt="tenant") == (expected(A), 0)
        warm.forget()
        assert warm.loaded(A, salt="tenant") == (expected(A), loadable(len(A)))

        # Weights may have changed: nothing of before is found.
        warm.settle()
        assert warm.llm.reset_prefix_cache(reset_connector=True)
        warm.ready()
        assert warm.loaded(A) == (expected(A), 0)
        warm.forget()
        assert warm.loaded(A) == (expected(A), loadable(len(A)))


def test_chunked_prefill_and_the_default_hash(model, node, expected):
    """`sha256` is vLLM's default; its names have nothing in common with those of `sha256_cbor`."""
    with Engine(model, node.endpoint, algorithm="sha256", max_num_batched_tokens=256, max_num_seqs=8) as engine:
        engine.ready()
        assert engine.loaded(A, B) == (expected(A, B), 0)
        engine.forget()
        assert engine.loaded(A, B) == (expected(A, B), loadable(len(A)) + loadable(len(B)))


def test_hashes_of_one_seed_are_shared_and_the_log_tells_others_apart(model, node, expected, monkeypatch, caplog):
    """vLLM's names of blocks start from PYTHONHASHSEED, where that is set; each algorithm makes other names."""

    def loaded(algorithm, seed):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        caplog.clear()
        with Engine(model, node.endpoint, algorithm=algorithm) as engine:
            engine.ready()
            tokens, blocks = engine.loaded(A)
            engine.settle()
        assert tokens == expected(A)
        return blocks, [r.getMessage() for r in caplog.records if "no prefix is shared" in r.getMessage()]

    assert loaded("sha256_cbor", "1") == (0, [])
    assert loaded("sha256_cbor", "1") == (loadable(len(A)), [])
    for algorithm, seed in (("sha256_cbor", "2"), ("sha256", "2")):
        blocks, (line,) = loaded(algorithm, seed)
        assert blocks == 0 and "packing" in line and f"hashes {algorithm} from seed" in line
        assert loaded(algorithm, seed) == (loadable(len(A)), [])


def alone(model, node, **options):
    """What an engine with these options does in a process of its own."""
    script = [sys.executable, pathlib.Path(__file__).with_name("alone.py"), model, node.endpoint, json.dumps(options)]
    # Two workers on as few cores as there are.
    surroundings = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(script, capture_output=True, text=True, timeout=600, env=surroundings, check=False)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_drafts_change_no_token_and_only_prompts_are_stored(model, node, expected):
    """Speculative decoding: what a draft wrote may be taken back, so blocks that are generated are not stored."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    said = alone(model, node, speculative_config=drafts)
    assert said["drafted"] > 0, "nothing was drafted"
    assert said["cold"] == said["warm"] == expected(A, B, tokens=MANY_TOKENS)
    assert said["loaded"] == [0, loadable(len(A)) + loadable(len(B))] and said["failed"] == 0
    assert said["saved"] == len(A) // BLOCK + len(B) // BLOCK


def test_two_workers_load_what_both_have_stored(model, node, expected):
    """Tensor parallel: each worker stores and loads its part of a block; a hit is a block of which both are there."""
    said = alone(model, node, tensor_parallel_size=2)
    assert said["cold"] == said["warm"] == expected(A, B, tokens=MANY_TOKENS)
    assert said["loaded"] == [0, 2 * (loadable(len(A)) + loadable(len(B)))] and said["failed"] == 0
    assert said["saved"] == 2 * sum((len(ids) + MANY_TOKENS - 1) // BLOCK for ids in (A, B))


def test_preempted_requests_keep_their_tokens(model, node, expected):
    blocks = 4 * 19 + 2  # room for all four prompts, not for what they generate
    stored = sum(loadable(len(ids)) for ids in CROWD)
    for at_least in (0, stored):  # cold: only what it has saved itself; warm: all prompts, and more once preempted
        with Engine(model, node.endpoint, num_gpu_blocks_override=blocks, max_num_batched_tokens=640) as engine:
            engine.ready()
            tokens, loaded = engine.loaded(*CROWD, tokens=MANY_TOKENS)
            assert tokens == expected(*CROWD, tokens=MANY_TOKENS)
            assert preemptions(engine) > 0
            assert loaded >= at_least and engine.counts("failed_blocks") == 0
            engine.settle()
            assert engine.free_blocks() == blocks - 1, "every block came back"


def preemptions(engine):
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")


def damage(node, data):
    """Flips a bit in the node's memory wherever these bytes lie, as a bad memory cell would. How often."""
    needle, hits = data[:64], 0
    process = pathlib.Path("/proc", str(node.process.pid))
    with (process / "maps").open() as maps, (process / "mem").open("r+b", 0) as memory:
        for line in maps:
            span, mode, *_ = line.split()
            if not mode.startswith("rw"):
                continue
            first, last = (int(edge, 16) for edge in span.split("-"))
            try:
                memory.seek(first)
                held = memory.read(last - first)
            except OSError:
                continue
            at = held.find(needle)
            while at >= 0:
                memory.seek(first + at + 7)
                memory.write(bytes([held[at + 7] ^ 1]))
                hits += 1
                at = held.find(needle, at + 1)
    return hits


def test_a_corrupted_block_is_computed_again(model, node, expected):
    with Engine(model, node.endpoint) as engine:
        engine.ready()
        assert engine.loaded(A) == (expected(A), 0)
        engine.settle()
        assert damage(node, engine.kv(1 + 10)) > 0  # vLLM gives out block ids from 1 on; this is the prompt's block 10
        engine.forget()
        tokens, loaded = engine.loaded(A)
        assert tokens == expected(A)
        assert loaded == loadable(len(A)) - 1 and engine.counts("failed_blocks") == 1
        engine.forget()
        tokens, loaded = engine.loaded(A)
        assert tokens == expected(A) and engine.counts("failed_blocks") == 1, "the next lookup missed it"
        assert loaded in (10, loadable(len(A))), "unless it was saved again meanwhile"


def stopwatch(call):
    started = time.monotonic()
    answer = call()
    return answer, time.monotonic() - started


def in_time(call, plain, waits):
    """Its answer, in no more time than the same work without a failure and the deadlines it may have to sit out."""
    answer, seconds = stopwatch(call)
    allowed = plain + sum(waits.values()) / 1000 + MARGIN_S
    assert seconds < allowed, f"{seconds:.1f} s, where {plain:.1f} s are plain and {allowed:.1f} s allowed"
    return answer


def test_a_node_that_is_away_at_the_start_is_used_when_it_comes(model, node, expected):
    node.kill()
    with Engine(model, node.endpoint) as engine:
        answer, away = stopwatch(lambda: engine.loaded(A))
        assert answer == (expected(A), 0)
        node.start()
        engine.ready()
        answer, plain = stopwatch(lambda: engine.loaded(B))
        assert answer == (expected(B), 0)
        assert away < plain + MARGIN_S, "nobody was there to wait for"
        engine.forget()
        assert in_time(lambda: engine.loaded(B), plain, USUAL) == (expected(B), loadable(len(B)))

        # Killed, and back at once: what it kept on its disk or nothing, but the same tokens, and used again.
        node.kill()
        node.start()
        engine.forget()
        assert in_time(lambda: engine.generate(A, B), 2 * plain, USUAL) == expected(A, B)
        engine.ready().forget()
        tokens, loaded = in_time(lambda: engine.loaded(A, B), 2 * plain, USUAL)
        assert tokens == expected(A, B)
        engine.forget()
        tokens, loaded = in_time(lambda: engine.loaded(A, B), 2 * plain, USUAL)
        assert tokens == expected(A, B) and loaded == loadable(len(A)) + loadable(len(B))


def test_a_node_killed_and_restarted_while_requests_run_costs_no_token(model, node, expected):
    """One call, six requests, one after the other: the node dies as loads start, and is back before the last three."""
    crowd = [A, B, *CROWD]
    with Engine(model, node.endpoint, max_num_seqs=1) as engine:
        engine.ready()
        cold, plain = stopwatch(lambda: engine.loaded(*crowd))
        assert cold == (expected(*crowd), 0)
        engine.forget()

        restart = threading.Thread(target=lambda: (node.kill(), node.start()))
        at_allocation(engine, restart.start)
        client, ended, waited = engine.llm.llm_engine, [], []

        def step(real=client.step):
            if len(ended) == 3 and not waited:
                waited.append(stopwatch(lambda: (restart.join(), engine.ready()))[1])
            answers = real()
            ended.extend(answer for answer in answers if answer.finished)
            return answers

        client.step = step
        tokens, seconds = stopwatch(lambda: engine.generate(*crowd))
        del client.step
        assert tokens == expected(*crowd)
        assert waited and len(ended) == len(crowd), "three ended before it was back, three after"
        assert seconds < plain + waited[0] + sum(USUAL.values()) / 1000 + MARGIN_S
        engine.ready().forget()
        assert in_time(lambda: engine.generate(*crowd), plain, USUAL) == expected(*crowd)
        engine.forget()
        warm = sum(loadable(len(ids)) for ids in crowd)
        assert in_time(lambda: engine.loaded(*crowd), plain, USUAL) == (expected(*crowd), warm)


def test_a_frozen_node_costs_a_moment_and_no_token(model, node, expected):
    """Frozen where it hurts most: after it promised blocks, before it gives them."""
    with Engine(model, node.endpoint, extra=QUICK) as engine:
        engine.ready()
        cold, plain = stopwatch(lambda: engine.loaded(A, B))
        assert cold == (expected(A, B), 0)
        engine.forget()
        engine.ready()

        at_allocation(engine, node.freeze)
        tokens, loaded = in_time(lambda: engine.loaded(A), plain, QUICK)
        assert tokens == expected(A)
        assert loaded + engine.counts("failed_blocks") == loadable(len(A))
        # While it is frozen: nothing is loaded, nothing waits for long.
        in_time(engine.settle, 0, QUICK)
        assert in_time(lambda: engine.loaded(B), plain, AWAY) == (expected(B), 0)
        node.thaw()
        engine.ready(60).forget()
        assert in_time(lambda: engine.generate(A, B), plain, QUICK) == expected(A, B)
        engine.ready(60).forget()
        assert in_time(lambda: engine.loaded(B), plain, QUICK) == (expected(B), loadable(len(B)))


def at_allocation(engine, act):
    """Acts once, after a lookup was answered and before its load starts."""
    scheduler, acted = engine.halves[0], []
    allocated = scheduler.allocated

    def hook(request, blocks, tokens):
        allocated(request, blocks, tokens)
        if tokens and not acted:
            acted.append(True)
            act()

    scheduler.allocated = hook


def test_a_node_killed_before_a_load_is_a_failed_load(model, node, expected):
    with Engine(model, node.endpoint) as engine:
        engine.ready()
        cold, plain = stopwatch(lambda: engine.loaded(A))
        assert cold == (expected(A), 0)
        engine.forget()
        at_allocation(engine, node.kill)
        tokens, loaded = in_time(lambda: engine.loaded(A), plain, AWAY)
        assert tokens == expected(A)
        assert loaded + engine.counts("failed_blocks") == loadable(len(A))
        engine.forget()
        assert in_time(lambda: engine.loaded(A), plain, AWAY) == (expected(A), 0)
        engine.settle()
        assert engine.free_blocks() == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


def test_an_abort_during_a_load_gives_every_block_back(model, node, expected):
    with Engine(model, node.endpoint, extra={"transfer_timeout_ms": 3000}) as engine:
        engine.ready()
        cold, plain = stopwatch(lambda: engine.loaded(A))
        assert cold == (expected(A), 0)
        engine.forget()
        at_allocation(engine, node.freeze)
        client = engine.llm.llm_engine
        from vllm import SamplingParams

        client.add_request(
            "doomed", {"prompt_token_ids": A}, SamplingParams(temperature=0, max_tokens=4, detokenize=False)
        )
        until = time.monotonic() + 20
        while not engine.halves[1].hauls.loading:
            assert time.monotonic() < until
            client.step()
        client.abort_request(["doomed"])
        threading.Timer(0.5, node.thaw).start()
        engine.settle(3 + MARGIN_S)  # a load that is lost ends by its own deadline
        assert not engine.halves[0].planner.tracked
        assert engine.free_blocks() == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
        engine.ready(30)
        assert in_time(lambda: engine.generate(A), plain, USUAL) == expected(A)


def test_the_example_finds_what_its_last_run_computed(model, node, monkeypatch, capfd):
    """In this process, so that vLLM is imported once; its blocks are the kernel's own 128 tokens."""
    example = pathlib.Path(__file__).resolve().parents[3] / "examples" / "vllm_prefix.py"
    for loaded in (0, 11):
        monkeypatch.setattr(sys, "argv", [example.name, model, "--endpoint", node.endpoint])
        runpy.run_path(str(example), run_name="__main__")
        tidy()
        assert f"from Terrace  {loaded} blocks" in capfd.readouterr().out

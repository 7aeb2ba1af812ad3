"""vLLM's connector on a real engine: the same tokens as without Terrace, whatever happens to the node.

One process, engines one after the other. What was hit is counted by Terrace after its last copy and check, never by
vLLM's counters, which count when blocks are allocated.
"""

import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading
import time

import pytest
from engine import BLOCK, TOKENS, Engine, loadable, prompt, tidy
from node import Node

A, B = prompt(1, 900), prompt(2, 937)
LONGER = A + prompt(3, 300)  # begins with all of A
CROWD = [prompt(10 + i, 600) for i in range(4)]
SHORT = prompt(20, 20)  # no whole block


@pytest.fixture(scope="module")
def expected(model):
    """Tokens of the same engine without Terrace."""
    prompts = [A, B, LONGER, SHORT, *CROWD]
    with Engine(model) as engine:
        answers = engine.generate(*prompts)
    return lambda *asked: [answers[prompts.index(ids)] for ids in asked]


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


def alone(model, node, **options):
    """What an engine with these options does in a process of its own."""
    script = [sys.executable, pathlib.Path(__file__).with_name("alone.py"), model, node.endpoint, json.dumps(options)]
    shares = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # two workers on as few cores as there are
    ended = subprocess.run(script, capture_output=True, text=True, timeout=600, env={**os.environ, **shares}, check=False)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_drafts_change_no_token_and_only_prompts_are_stored(model, node, expected):
    """Speculative decoding: what a draft wrote into a block may be taken back, so blocks that are generated stay here."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    said = alone(model, node, speculative_config=drafts)
    assert said["drafted"] > 0, "nothing was drafted"
    assert [tokens[:TOKENS] for tokens in said["cold"]] == expected(A, B) and said["warm"] == said["cold"]
    assert said["loaded"] == [0, loadable(len(A)) + loadable(len(B))] and said["failed"] == 0
    assert said["saved"] == len(A) // BLOCK + len(B) // BLOCK


def test_two_workers_load_what_both_have_stored(model, node, expected):
    """Tensor parallel: each worker stores and loads its part of every block; a hit is a block of which both are there."""
    said = alone(model, node, tensor_parallel_size=2)
    assert [tokens[:TOKENS] for tokens in said["cold"]] == expected(A, B) and said["warm"] == said["cold"]
    assert said["loaded"] == [0, 2 * (loadable(len(A)) + loadable(len(B)))] and said["failed"] == 0
    assert said["saved"] == 2 * ((len(A) + 63) // BLOCK + (len(B) + 63) // BLOCK)


def test_preempted_requests_keep_their_tokens(model, node, expected):
    blocks = 4 * 19 + 2  # room for all four prompts, not for what they generate
    for _ in ("cold", "warm"):
        with Engine(model, node.endpoint, num_gpu_blocks_override=blocks, max_num_batched_tokens=640) as engine:
            engine.ready()
            longer = engine.generate(*CROWD, tokens=64)
            assert [tokens[:16] for tokens in longer] == expected(*CROWD)
            engine.settle()
            assert preemptions(engine) > 0
            assert engine.free_blocks() == blocks - 1, "every block came back"
    assert engine.halves is None


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


def test_a_node_that_is_away_at_the_start_is_used_when_it_comes(model, node, expected):
    node.kill()
    with Engine(model, node.endpoint) as engine:
        assert engine.loaded(A) == (expected(A), 0)
        node.start()
        engine.ready()
        assert engine.loaded(B) == (expected(B), 0)
        engine.forget()
        assert engine.loaded(B) == (expected(B), loadable(len(B)))

        # Killed, and back at once: what it kept on its disk or nothing, but the same tokens, and used again.
        node.kill()
        node.start()
        engine.forget()
        assert engine.generate(A, B) == expected(A, B)
        engine.ready().forget()
        tokens, loaded = engine.loaded(A, B)
        assert tokens == expected(A, B)
        engine.forget()
        tokens, loaded = engine.loaded(A, B)
        assert tokens == expected(A, B) and loaded == loadable(len(A)) + loadable(len(B))


def stopwatch(call):
    started = time.monotonic()
    answer = call()
    return answer, time.monotonic() - started


def test_a_frozen_node_costs_a_moment_and_no_token(model, node, expected):
    """Frozen where it hurts most: after it promised blocks, before it gives them."""
    quick = {"transfer_timeout_ms": 1500, "lookup_timeout_ms": 200}
    with Engine(model, node.endpoint, extra=quick) as engine:
        engine.ready()
        assert engine.loaded(A, B) == (expected(A, B), 0)
        engine.forget()
        engine.ready()

        at_allocation(engine, lambda: node.signal(signal.SIGSTOP))
        (tokens, _), seconds = stopwatch(lambda: engine.loaded(A))
        assert tokens == expected(A) and seconds < 60
        # While it is frozen: nothing is loaded, nothing waits for long.
        engine.settle()
        tokens, _ = stopwatch(lambda: engine.generate(B))
        assert tokens == expected(B)
        node.signal(signal.SIGCONT)
        engine.ready(60).forget()
        engine.generate(A, B)
        engine.ready(60).forget()
        assert engine.loaded(B) == (expected(B), loadable(len(B)))


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
        assert engine.loaded(A) == (expected(A), 0)
        engine.forget()
        at_allocation(engine, node.kill)
        tokens, loaded = engine.loaded(A)
        assert tokens == expected(A)
        assert loaded + engine.counts("failed_blocks") == loadable(len(A))
        engine.settle()
        assert engine.free_blocks() == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


def test_an_abort_during_a_load_gives_every_block_back(model, node, expected):
    with Engine(model, node.endpoint, extra={"transfer_timeout_ms": 3000}) as engine:
        engine.ready()
        assert engine.loaded(A) == (expected(A), 0)
        engine.forget()
        at_allocation(engine, lambda: node.signal(signal.SIGSTOP))
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
        threading.Timer(0.5, lambda: node.signal(signal.SIGCONT)).start()
        engine.settle(30)
        assert not engine.halves[0].planner.tracked
        assert engine.free_blocks() == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
        engine.ready(30)
        assert engine.generate(A) == expected(A)


def test_the_example_finds_what_its_last_run_computed(model, node, monkeypatch, capfd):
    """In this process, so that vLLM is imported once; its blocks are the kernel's own 128 tokens."""
    example = pathlib.Path(__file__).resolve().parents[3] / "examples" / "vllm_prefix.py"
    for loaded in (0, 11):
        monkeypatch.setattr(sys, "argv", [example.name, model, "--endpoint", node.endpoint])
        runpy.run_path(str(example), run_name="__main__")
        tidy()
        assert f"from Terrace  {loaded} blocks" in capfd.readouterr().out

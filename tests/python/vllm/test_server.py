"""The OpenAI server end to end: its own processes, its own connector halves, one node shared with an engine here."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request

from engine import BLOCK, CACHE_BYTES, TOKENS, A, B, Engine, loadable
from node import Node, free_port

START_SECONDS = 400  # three processes that each import vLLM, on two busy cores


@contextlib.contextmanager
def serve(model, endpoint, log):
    """`vllm serve`, which the CPU build calls by its module; its address."""
    port = free_port()
    transfer = {
        "kv_connector": "TerraceConnector",
        "kv_connector_module_path": "terrace.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"endpoint": endpoint},
    }
    arguments = {
        "model": model, "host": "127.0.0.1", "port": port, "dtype": "float32", "max-model-len": 2048,
        "block-size": BLOCK, "prefix-caching-hash-algo": "sha256_cbor", "kv-cache-memory-bytes": CACHE_BYTES,
        "kv-transfer-config": json.dumps(transfer),
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        )
        address = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + START_SECONDS
            while not answers(address):
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                raise


def answers(address):
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def complete(address, model, ids):
    body = {"model": model, "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    asked = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({**body, "return_token_ids": True}).encode(),
        {"content-type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(asked, timeout=120))
    return answer["choices"][0]["token_ids"]


def counts(address):
    """`vllm:terrace_*` as Prometheus gets them."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vllm:terrace_")]
    return {
        name.split("{")[0].removeprefix("vllm:terrace_"): float(value)
        for name, value in lines
        if "_created" not in name
    }


def until_saved(address, blocks, seconds=60):
    until = time.monotonic() + seconds
    while counts(address)["saved_blocks_total"] < blocks:
        assert time.monotonic() < until, counts(address)
        time.sleep(0.2)


def test_a_server_and_an_engine_share_one_node(model, expected, tmp_path):
    node = Node(ram="128MiB")
    try:
        with Engine(model, node.endpoint) as engine:
            engine.ready()
            assert engine.loaded(A) == (expected(A), 0)
            engine.settle()
            # Both are alive now; the server's processes never saw this prompt.
            with serve(model, node.endpoint, tmp_path / "log") as address:
                assert [complete(address, model, A)] == expected(A)
                assert counts(address)["loaded_blocks_total"] == loadable(len(A))
                assert counts(address)["load_seconds_total"] > 0
                assert [complete(address, model, B)] == expected(B)
                # Its saves end by themselves: the server's loop goes on while a finished request's blocks are held.
                until_saved(address, (len(B) + TOKENS - 1) // BLOCK)
                assert engine.loaded(B) == (expected(B), loadable(len(B)))
                # While it lives: vLLM kills its engine when it is told to end, and its server may say that it died.
                said = (tmp_path / "log").read_text()
                assert "Terrace is there" in said and "Traceback" not in said
    finally:
        node.close()

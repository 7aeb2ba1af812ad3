"""One vLLM engine in a process of its own, driven by lines of JSON: the other half of `engine.py`.

    {"generate": seed, "tokens": n}   a prompt of n tokens drawn from seed; answers its time to first token
    {"reset": true}                   drops the engine's own prefix cache
    {"account": true}                 so far: CPU seconds of the process, and of Terrace in it; blocks it loaded

Terrace's share is the connector's methods on the engine's threads (each call's own thread time) and all of the
package's own threads (by their names).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

THREADS = "terrace"


class Accounts:
    """Thread time of the outermost call into the connector."""

    def __init__(self) -> None:
        self.nanos = 0
        self.inside = threading.local()

    def wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.inside, "yes", False):
                return method(*args, **kwargs)
            self.inside.yes = True
            started = time.thread_time_ns()
            try:
                return method(*args, **kwargs)
            finally:
                self.nanos += time.thread_time_ns() - started
                self.inside.yes = False

        return timed

    def watch(self, cls: type) -> None:
        for name in dir(cls):
            member = inspect.getattr_static(cls, name)
            if not name.startswith("_") and inspect.isfunction(member):
                setattr(cls, name, self.wrap(member))


class OwnThreads:
    """CPU time of the package's own threads, with what those that have ended had when they were last seen."""

    def __init__(self) -> None:
        self.nanos: dict[str, int] = {}

    def seconds(self) -> float:
        for task in Path("/proc/self/task").iterdir():
            try:
                if (task / "comm").read_text().startswith(THREADS):
                    self.nanos[task.name] = int((task / "schedstat").read_text().split(" ", 1)[0])
            except OSError:
                continue  # it ended
        return sum(self.nanos.values()) / 1e9


def guard_scan() -> None:
    """vLLM looks into every object of every loaded module; LMCache has some whose `__dict__` is no dictionary."""
    from vllm.triton_utils import dispatcher

    def safe(value: Any) -> Any:
        found = vars(value)
        return found if hasattr(found, "get") else {}

    dispatcher.vars = safe


def main() -> None:
    settings = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    accounts, threads = Accounts(), OwnThreads()
    extra: dict[str, Any] = {}
    if transfer := settings.get("transfer"):
        if module := transfer.get("kv_connector_module_path"):
            accounts.watch(getattr(importlib.import_module(module), transfer["kv_connector"]))
        else:
            guard_scan()
        extra["kv_transfer_config"] = KVTransferConfig(**transfer)
    llm = LLM(
        model=settings["model"],
        dtype="float32",
        max_model_len=settings["max_tokens"],
        max_num_batched_tokens=settings["max_tokens"],
        enforce_eager=True,
        block_size=32,
        enable_prefix_caching=True,
        prefix_caching_hash_algo="sha256_cbor",
        skip_tokenizer_init=True,
        disable_log_stats=False,
        kv_cache_memory_bytes=settings["kv_cache_bytes"],
        **extra,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def loaded() -> int:
        name = "vllm:terrace_loaded_blocks"
        return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == name)

    def reset() -> bool:
        # Blocks that a connector still saves are given back in a step after that; without a request nobody steps.
        core = llm.llm_engine.engine_core.engine_core
        for _ in range(500):
            if llm.reset_prefix_cache():
                return True
            core.step()
            time.sleep(0.01)
        return False

    def generate(seed: int, tokens: int) -> dict[str, Any]:
        draw = random.Random(seed)
        prompt = [draw.randrange(3, settings["vocab"]) for _ in range(tokens)]
        started = time.perf_counter()
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        ttft_s = time.perf_counter() - started
        return {"ttft_s": ttft_s, "token": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}

    def answer(ask: dict[str, Any]) -> dict[str, Any]:
        if "generate" in ask:
            return generate(ask["generate"], ask["tokens"])
        if "reset" in ask:
            return {"reset": reset()}
        terrace_s = accounts.nanos / 1e9 + threads.seconds()
        return {"process_s": time.process_time(), "terrace_s": terrace_s, "loaded_blocks": loaded()}

    generate(0, 256)  # the first request of a process pays for what all others share
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()

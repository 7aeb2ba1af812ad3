"""One engine in a process of its own: `alone.py MODEL ENDPOINT OPTIONS`, the options of the engine as JSON.

Computes two prompts, empties the engine's own cache, computes them again from what the node has, and prints one line of
JSON. For engines after which, or beside which, this vLLM starts no other in a process: drafts by n-grams import numba,
whose modules vLLM's next start cannot look into; several workers are processes themselves.
"""

import json
import sys
import time

from engine import MANY_TOKENS, A, B, Engine, prompt

PATIENCE_S = 60


def stored_once(engine, workers):
    """Waits until every worker has its node: what they store of a fresh prompt is whole."""
    until, seed = time.monotonic() + PATIENCE_S, 100
    while True:
        before, seed = engine.counts("saved_blocks"), seed + 1
        engine.generate(prompt(seed, 80))
        engine.settle()
        if engine.counts("saved_blocks") - before == 2 * workers:
            return
        assert time.monotonic() < until, "the workers do not find the node"


def main(model, endpoint, options):
    with Engine(model, endpoint, **options) as engine:
        stored_once(engine.ready(), options.get("tensor_parallel_size", 1))
        before = engine.counts("saved_blocks")
        cold, none = engine.loaded(A, B, tokens=MANY_TOKENS)
        engine.settle()
        saved = engine.counts("saved_blocks") - before
        engine.forget()
        warm, loaded = engine.loaded(A, B, tokens=MANY_TOKENS)
        drafted = [metric.value for metric in engine.llm.get_metrics() if "spec_decode_num_draft" in metric.name]
        failed = engine.counts("failed_blocks") + engine.counts("dropped_blocks")
    said = {"cold": cold, "warm": warm, "loaded": [none, loaded], "saved": saved, "failed": failed}
    print(json.dumps({**said, "drafted": sum(drafted)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))

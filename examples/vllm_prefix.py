"""A vLLM engine whose prefixes outlive it: run it twice against one node, and compare.

    kvserver &
    python examples/vllm_prefix.py MODEL          # computes the document, and saves it
    python examples/vllm_prefix.py MODEL          # another process: loads it, prefills only the question

Needs vLLM and the package `terrace`; `make test-vllm` installs both, for a CPU, and a small model in .venv-vllm/model.
"""

import argparse
import os
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # all in this process, for the numbers at the end

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--endpoint", default="127.0.0.1:7070")
    parser.add_argument("--tokens", type=int, default=1500, help="length of the document")
    a = parser.parse_args()

    llm = LLM(
        a.model,
        enforce_eager=True,
        max_model_len=a.tokens + 128,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=False,
        prefix_caching_hash_algo="sha256_cbor",
        skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="TerraceConnector",
            kv_connector_module_path="terrace.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"endpoint": a.endpoint},
        ),
    )
    time.sleep(0.5)  # the node is looked for in the background; until it is found, every lookup answers zero
    document = [3 + i * 7919 % 500 for i in range(a.tokens)]
    how = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    answer = llm.generate([{"prompt_token_ids": document}], how, use_tqdm=False)[0]

    counts = {metric.name: metric.value for metric in llm.get_metrics() if metric.name.startswith("vllm:terrace_")}
    print(f"tokens        {list(answer.outputs[0].token_ids)}")
    print(f"first token   {answer.metrics.first_token_latency * 1000:.0f} ms")
    blocks, size = counts["vllm:terrace_loaded_blocks"], counts["vllm:terrace_loaded_bytes"]
    print(f"from Terrace  {blocks} blocks, {size} bytes, verified")
    llm.llm_engine.engine_core.shutdown()  # lets saves in hand end


if __name__ == "__main__":
    main()

"""Which of a real vLLM's settings keep engines apart, and which do not. No engine is started."""

import copy
import types

import pytest
import torch
from terrace import identity
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

BLOCK = 32


@pytest.fixture(scope="module")
def config(model):
    transfer = {
        "kv_connector": "TerraceConnector", "kv_connector_module_path": "terrace.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "engine_id": "one",
    }  # fmt: skip
    settings = EngineArgs(
        model=model, dtype="float32", block_size=BLOCK, max_model_len=1024, kv_transfer_config=transfer,
        prefix_caching_hash_algo="sha256_cbor",
    )  # fmt: skip
    return settings.create_engine_config()


def spec(config, block=BLOCK):
    layer = FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=64, dtype=torch.float32)
    caches = KVCacheConfig(
        num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["model.layers.0.self_attn.attn"], layer)]
    )
    return identity.vllm(config, caches)


def changed(config, place, value):
    """The specs of this engine and of one that differs in one setting: `model_config.dtype` and so on."""
    other = copy.deepcopy(config)
    *path, name = place.split(".")
    holder = other
    for step in path:
        holder = getattr(holder, step)
    object.__setattr__(holder, name, value)
    return spec(config), spec(other)


APART = {
    "model_config.revision": "v2",
    "model_config.dtype": torch.bfloat16,
    "model_config.quantization": "gptq",
    "model_config.hf_overrides": {"sliding_window": 64},
    "model_config.hf_config.rms_norm_eps": 0.5,
    "model_config.tokenizer": "/nowhere",
    "cache_config.cache_dtype": "fp8",
    "cache_config.prefix_caching_hash_algo": "sha256",
    "parallel_config.tensor_parallel_size": 2,
    "parallel_config.pipeline_parallel_size": 2,
    "load_config.load_format": "dummy",
    "speculative_config": types.SimpleNamespace(method="eagle", model="draft"),
}

ALIKE = {
    "kv_transfer_config.engine_id": "two",
    "scheduler_config.max_num_seqs": 3,
    "model_config.max_model_len": 512,
    "cache_config.gpu_memory_utilization": 0.1,
    "parallel_config.data_parallel_size": 4,
}


@pytest.mark.parametrize("place", APART)
def test_what_changes_a_blocks_bytes_or_their_meaning_keeps_engines_apart(config, place):
    one, other = changed(config, place, APART[place])
    assert one != other


@pytest.mark.parametrize("place", ALIKE)
def test_what_does_not_lets_them_share(config, place):
    one, other = changed(config, place, ALIKE[place])
    assert one == other


def test_blocks_of_another_length_weights_or_instruction_set_are_others(config, model, monkeypatch, tmp_path):
    one = spec(config)
    assert spec(config, block=2 * BLOCK)["block_tokens"] == 2 * BLOCK
    assert one["weights"] != "not found" and "avx" in one["packing"].lower()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SSE")
        assert spec(config)["packing"] != one["packing"]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "7")
        assert spec(config)["packing"] != one["packing"]
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    _, other = changed(config, "model_config.model", str(tmp_path))
    assert other["weights"] != one["weights"]
    assert spec(config) == one

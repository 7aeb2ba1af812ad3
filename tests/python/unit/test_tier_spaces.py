"""Who shares with whom, below vLLM's CPU tier and behind SGLang's HiCache: what is told of an engine and what not."""

import types

import fake_hicache
import fake_tiering

fake_tiering.install()
fake_hicache.install()

from fake_hicache import HiCacheStorageConfig, HostPool  # noqa: E402
from terrace import identity  # noqa: E402
from terrace.sglang import space as pages  # noqa: E402
from terrace.vllm_tier import space as rows  # noqa: E402


def spec(**changed):
    """What TieringOffloadingSpec tells a tier."""
    group = types.SimpleNamespace(group_id=0, tokens_per_block=16, layer_names=("a",))
    parallel = types.SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)
    facts = {"groups": ("group 0",), "parallel": parallel, "kv_cache_layout": "NHD", "canonical_layout": False}
    config = types.SimpleNamespace(model=types.SimpleNamespace(name="m"), **{**facts, **changed})
    config.groups = (group,) if config.groups == ("group 0",) else config.groups
    return types.SimpleNamespace(config=config, blocks_per_chunk=4)


def connector(monkeypatch, lora=None, **changed):
    """A frame like the one in which vLLM builds its connector."""
    monkeypatch.setattr(identity, "vllm", lambda config, caches, label: {"label": "m", "weights": "w", "packing": "p"})
    vllm_config, kv_cache_config = types.SimpleNamespace(lora_config=lora), object()
    assert vllm_config and kv_cache_config
    return rows.namespace(spec(**changed), 4096, None)


def test_rows_take_the_engines_identity_from_the_frame_that_has_it(monkeypatch):
    made = connector(monkeypatch)
    assert (made["weights"], made["block_tokens"], made["engine_class"]) == ("w", 64, "vllm tier")
    assert made == connector(monkeypatch)
    assert made["label"] != "m", "the connector's own blocks are other bytes"


def test_rows_of_other_layouts_are_other_namespaces(monkeypatch):
    parallel = types.SimpleNamespace(tp_size=2, pp_size=1, pcp_size=1, dcp_size=1)
    made = [
        connector(monkeypatch),
        connector(monkeypatch, kv_cache_layout="HND"),
        connector(monkeypatch, canonical_layout=True),
        connector(monkeypatch, parallel=parallel),
    ]
    assert len({one["packing"] for one in made}) == 4


def test_an_engine_that_tells_too_little_shares_with_nobody(monkeypatch):
    one, two = rows.namespace(spec(), 4096, None), rows.namespace(spec(), 4096, None)
    assert one["weights"] != two["weights"]
    assert connector(monkeypatch, lora="on")["weights"] != connector(monkeypatch, lora="on")["weights"]


def test_pages_depend_on_the_servers_arguments_and_on_adapters_weights(monkeypatch, tmp_path):
    def made(**arguments):
        server = types.SimpleNamespace(model_path="m", **arguments)
        monkeypatch.setattr(pages, "server_args", lambda: server)
        return pages.namespace(HiCacheStorageConfig(), HostPool(), "kv", [32, 32], 4, None)

    adapter = tmp_path / "adapter_model.safetensors"
    adapter.write_bytes(b"one")
    first = made(lora_paths=[f"name={tmp_path}"])
    adapter.write_bytes(b"two")
    several = [first, made(lora_paths=[f"name={tmp_path}"]), made(), made(quantization="fp8"), made(revision="2")]
    assert len({repr(one) for one in several}) == 5
    assert made() == made()


def test_texts_and_counts_are_what_a_namespace_takes(monkeypatch):
    monkeypatch.setattr(pages, "server_args", lambda: None)
    long = pages.namespace(HiCacheStorageConfig(model_name="m" * 200), None, "flat", [1], 1, "l" * 999)
    assert len(str(long["label"])) <= 128
    assert all(len(value) <= 256 if isinstance(value, str) else 1 <= value <= 65536 for value in long.values())

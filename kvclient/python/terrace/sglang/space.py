"""Who may share pages with whom: the namespace and the part of a host pool's pages.

Two engines share when these are equal: model, revision, weights, dtype of KV, geometry and layout of the pool, bytes of
a page's pieces, parallel sizes, and what changes the numbers on the way (quantization, RoPE overrides). A rank's own
shard is a part; pages that are the same on all ranks of a tensor-parallel group (MLA) are one part, which SGLang lets
one rank write. A pool's name is in the label, so that an engine's own pools are not said to differ from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from terrace import identity

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

ARGUMENTS = (
    "dtype", "quantization", "kv_cache_dtype", "json_model_override_args", "model_impl", "load_format",
    "attention_backend",
)  # fmt: skip
"""Arguments of the server that change the bytes of a page without changing its shape."""
MLA_POOLS = ("MLATokenToKVPoolHost", "DeepSeekV4PagedHostPool")


def replicated(config: HiCacheStorageConfig, pool: Any, pool_name: str) -> bool:
    """Whether all tensor-parallel ranks hold the same pages, of which one rank then writes.

    States are each rank's own even below MLA, and so is a draft model's KV unless it is MLA itself.
    """
    if not config.is_mla_model or "mamba" in pool_name:
        return False
    return "draft" not in pool_name or any(kind.__name__ in MLA_POOLS for kind in type(pool).__mro__)


def rank(config: HiCacheStorageConfig, shared: bool) -> int:
    """The part's number among all ranks that hold different bytes of a page."""
    slices: int = config.pp_rank * config.attn_cp_size + config.attn_cp_rank
    return slices if shared else slices * config.tp_size + config.tp_rank


def namespace(
    config: HiCacheStorageConfig, pool: Any, name: str, pieces: Sequence[int], page_size: int, label: str | None
) -> identity.Spec:
    """The spec of the namespace of one pool's pages, whose pieces have these bytes."""
    server = server_args()
    model = getattr(server, "model_path", None) or config.model_name or "none"
    revision = getattr(server, "revision", None)
    tokenizer = getattr(server, "tokenizer_path", None)
    layout = getattr(pool, "layout", "none")
    rules = [config.model_name, config.dcp_size, config.logical_page_size, type(pool).__name__, list(pieces)]
    rules += [str(getattr(server, argument, None)) for argument in ARGUMENTS]
    for adapter in getattr(server, "lora_paths", None) or ():  # SGLang's keys have its name and path, not its weights
        place = str(getattr(adapter, "lora_path", adapter)).partition("=")
        rules.append(identity.weights(place[2] or place[0]))
    return {
        "label": identity.text(f"{label or identity.name_of(model, revision)} {name}", identity.LABEL_BYTES),
        "model": identity.text(identity.name_of(model, revision)),
        "weights": identity.weights(model, revision),
        "tokenizer": identity.tokenizer(tokenizer) if tokenizer else "none",
        "kv_dtype": str(getattr(pool, "dtype", "u8")).removeprefix("torch."),
        "layers": count(pool, "layer_num"),
        "kv_heads": count(pool, "head_num"),
        "head_size": count(pool, "head_dim"),
        "packing": identity.text(f"sglang {name} {layout}, configuration {identity.digest(*rules)}"),
        "block_tokens": page_size,
        "tensor_parallel": config.tp_size,
        "pipeline_parallel": config.pp_size,
        "context_parallel": config.attn_cp_size,
        "engine_class": "sglang",
    }


def server_args() -> Any:
    """The running server's arguments; None outside of one, as in a test."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:
        return None


def count(pool: Any, field: str) -> int:
    value: object = getattr(pool, field, 1)
    return value if isinstance(value, int) and 1 <= value <= 65536 else 1

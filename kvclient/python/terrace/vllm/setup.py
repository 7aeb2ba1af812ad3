"""What vLLM's connector finds out, and refuses, when an engine starts.

Errors are raised while the engine starts and say what to type instead; nothing here runs later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm.logger import init_logger

from terrace import Cache, identity

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.terrace")

NO_GPU = "copies from and to GPU memory are not in this release, so this engine cannot use it yet: run vLLM on a CPU"

SETTINGS = {
    "endpoint", "label", "token", "local", "strict", "lookup_timeout_ms", "transfer_timeout_ms", "lease_ms", "miss_ms",
    "threads", "max_jobs", "max_lookups",
}  # fmt: skip


Connect: TypeAlias = Callable[[str], Cache]
"""Makes a `Cache` for a generation of the engine's weights; "" is the first."""


def setup(config: VllmConfig, caches: KVCacheConfig, worker: bool) -> Connect:
    """Checks everything, before anything can go wrong."""
    check(config, caches.kv_cache_groups)
    settings = settings_of(config)
    spec = identity.vllm(config, caches, label=settings.pop("label", None))
    engine, algorithm = str(transfer_of(config).engine_id), config.cache_config.prefix_caching_hash_algo
    # One owner per engine, whatever its processes: a lease that the scheduler took is the workers' to use.
    owner = blake2b(engine.encode(), digest_size=16).digest()
    sizes = config.parallel_config.tensor_parallel_size, config.parallel_config.pipeline_parallel_size
    parts = [(tensor + sizes[0] * stage, 0) for stage in range(sizes[1]) for tensor in range(sizes[0])]
    part = parts[worker_rank(sizes[0])] if worker else parts[0]
    if not worker:
        logger.info("Terrace at %s; shared with engines that are equal in %s", settings["endpoint"], spec)
        if not identity.hash_root(algorithm, engine)[1]:
            logger.warning(
                "Terrace: nobody else can ever hit what this engine stores, nor can it after a restart: %s starts "
                "from a random root. Use --prefix-caching-hash-algo sha256_cbor, or set PYTHONHASHSEED everywhere",
                algorithm,
            )
        if spec["weights"] == "not found":
            logger.warning("Terrace: no weights on disk to take a digest of; only the name tells models apart")

    def connect(generation: str) -> Cache:
        weights = f"{spec['weights']} changed {generation}" if generation else spec["weights"]
        return Cache(spec={**spec, "weights": weights}, owner=owner, part=part, parts=parts, **settings)

    return connect


def transfer_of(config: VllmConfig) -> KVTransferConfig:
    assert config.kv_transfer_config is not None, "vLLM makes no connector without it"
    return config.kv_transfer_config


def settings_of(config: VllmConfig) -> dict[str, Any]:
    """`kv_connector_extra_config` as arguments of `Cache`."""
    settings = dict(transfer_of(config).kv_connector_extra_config)
    if unknown := sorted(settings.keys() - SETTINGS):
        raise ValueError(f"Terrace: no such setting: {', '.join(unknown)}; there are {', '.join(sorted(SETTINGS))}")
    settings.setdefault("endpoint", "127.0.0.1:7070")
    settings.setdefault("token", os.environ.get("TERRACE_TOKEN"))  # a command line is everyone's to read
    return settings


def check(config: VllmConfig, groups: Sequence[Any]) -> None:
    """Refuses, at the start, what could not be right later. Raises ValueError with what to do."""
    parallel, transfer = config.parallel_config, transfer_of(config)
    if config.device_config.device_type != "cpu":
        raise ValueError(f"Terrace: {NO_GPU}")
    if transfer.kv_load_failure_policy != "recompute":
        raise ValueError(
            'Terrace: add "kv_load_failure_policy": "recompute" to --kv-transfer-config; '
            "with vLLM's default a block that cannot be loaded ends its request with an error"
        )
    spec = groups[0].kv_cache_spec if len(groups) == 1 else None
    if type(spec).__name__ not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise ValueError(
            "Terrace: needs one KV cache group of full attention; with sliding windows add "
            "--disable-hybrid-kv-cache-manager"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError("Terrace: context parallelism is not supported: a block is then spread over ranks by token")


def worker_rank(tensor: int) -> int:
    """This worker's place among the ranks that share a request's blocks."""
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() + tensor * get_pp_group().rank_in_group


def layer_span(name: str, tensor: Any, blocks: int) -> tuple[int, int, int, int]:
    """Where one layer's blocks lie: (address, blocks, stride in bytes, bytes of a block).

    Raises RuntimeError for a layout in which a block is not one run of bytes, and for memory that is not the CPU's.
    """
    if getattr(tensor, "device", None) is None or tensor.device.type != "cpu":
        raise RuntimeError(f"Terrace: layer {name} is not one tensor in CPU memory; {NO_GPU}")
    # The attention kernel's blocks may be smaller than the scheduler's; then several in a row are one of ours.
    parts, rest = divmod(tensor.shape[0], blocks)
    if rest or parts == 0 or not tensor[0].is_contiguous() or (parts > 1 and not tensor.is_contiguous()):
        raise RuntimeError(
            f"Terrace: layer {name}, shape {tuple(tensor.shape)}, stride {tensor.stride()}: not {blocks} whole blocks"
        )
    item = tensor.element_size()
    return tensor.data_ptr(), blocks, tensor.stride(0) * item * parts, tensor[0].numel() * item * parts

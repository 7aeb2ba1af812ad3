"""Who may share rows with whom: the engine's identity, as far as rows of vLLM's CPU pool depend on it."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from terrace import identity

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

logger = logging.getLogger("vllm.terrace_tier")


def namespace(spec: OffloadingSpec, stride: int, label: str | None) -> identity.Spec:
    """The spec of the namespace of rows of `stride` bytes.

    vLLM 0.32 hands a tier an extract of its configuration, without the model's revision and how blocks are hashed. Both
    decide who may share, so they are taken from the frame that builds the connector and has them in hand. Where it is
    not found, this engine shares with nobody; nor does one with LoRA adapters, whose weights no key tells.
    """
    config, chunk, frame = spec.config, spec.blocks_per_chunk, sys._getframe(1)
    while frame.f_back is not None and not {"vllm_config", "kv_cache_config"} <= frame.f_locals.keys():
        frame = frame.f_back
    engine, caches = frame.f_locals.get("vllm_config"), frame.f_locals.get("kv_cache_config")
    base: identity.Spec
    if engine is not None and caches is not None:
        base = identity.vllm(engine, caches, label=label)
        if engine.lora_config is not None:
            logger.warning("Terrace: vLLM's keys have an adapter's name only; with LoRA the tier shares with no engine")
            base["weights"] = f"{base['weights']} with adapters of {os.urandom(8).hex()}"
    else:
        logger.warning("Terrace: this vLLM does not tell its configuration; the tier shares with no other engine")
        base = {"label": label or config.model.name, "weights": os.urandom(16).hex()}
    rows = [config.groups, config.parallel.tp_size, config.parallel.pp_size, config.parallel.pcp_size]
    rows += [config.parallel.dcp_size, config.kv_cache_layout, config.canonical_layout, chunk, stride]
    tokens = chunk * max(group.tokens_per_block for group in config.groups)
    packing = identity.text(f"rows {identity.digest(*rows)} of {base.get('packing', 'none')}")
    label = identity.text(f"{base['label']} rows", identity.LABEL_BYTES)  # the connector's blocks are other bytes
    return {**base, "label": label, "packing": packing, "block_tokens": tokens, "engine_class": "vllm tier"}

"""From an engine's facts to the spec of a namespace: what must be equal before two engines may share a block.

    model, revision ─┐
    weights on disk ─┤
    configuration ───┼─► {"label": …, "model": …, "weights": …, …} ─► Cache(spec=…)
    KV's layout ─────┤
    block hashes ────┘

The rule: whatever changes the bytes of a block, or their meaning, is in here; whatever does not (paths, hosts, ports,
batch sizes) is not, or engines that could share would not. Two specs that differ get two namespaces, and the node says
in one line what differs.

Errors: a fact that cannot be found is said to be missing ("not found") and is then the same for all who lack it; the
name and the revision still keep models apart. Texts are cut to what a namespace takes, with a digest of the rest.
"""

from __future__ import annotations

import json
import os
import platform
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

Spec = dict[str, str | int]

LABEL_BYTES = 128
TEXT_BYTES = 256

# Bytes read at each place that is sampled, and places in a file whose tensors are not known.
SAMPLE_BYTES = 64
SAMPLES = 256

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
# Of a model's configuration: where it came from, not what it computes.
HOUSEKEEPING = ("_name_or_path", "transformers_version", "architectures")

TOKENIZER = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt")


def text(value: object, limit: int = TEXT_BYTES) -> str:
    """A text that a namespace takes: one too long keeps its head and a digest of all of it."""
    data = str(value).encode()
    if len(data) <= limit:
        return str(value)
    return data[: limit - 33].decode(errors="ignore") + "~" + digest(data)


def digest(*parts: object) -> str:
    """32 hex digits of everything given."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def folder(model: str, revision: str | None = None) -> Path | None:
    """Where a model's files are: itself, or the Hugging Face cache's snapshot. Touches no network."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except Exception:  # no such package, or no such name: not found either way
        return None
    return Path(found).parent if isinstance(found, str) else None


def weights(model: str, revision: str | None = None) -> str:
    """A digest of the weights: every file's header and size, and a few bytes out of each tensor.

    Headers and sizes alone are equal for a model and its fine-tuned child; the samples are not. Reading all of it would
    take as long as loading the model, once more per process.
    """
    if Path(model).is_file():
        return digest(sample(Path(model)))
    place = folder(model, revision)
    files = sorted(path for path in place.iterdir() if path.suffix in WEIGHTS) if place else []
    best = [
        path for path in files if path.suffix == ".safetensors"
    ] or files  # a copy in another format says nothing new
    return digest(*map(sample, best)) if best else "not found"


def sample(path: Path) -> tuple[str, int, bytes]:
    """Name, size, and a digest of the header and of bytes out of every tensor."""
    size, state = path.stat().st_size, blake2b(digest_size=16)
    with path.open("rb") as file:
        places = [size * i // SAMPLES for i in range(SAMPLES)]
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, size))
            state.update(header)
            try:
                spans = [value["data_offsets"] for name, value in json.loads(header).items() if name != "__metadata__"]
                places = sorted(8 + length + (first + last) // 2 for first, last in spans)
            except (ValueError, KeyError, AttributeError):
                pass  # a header of another kind: the places spread over the file do
        for place in places:
            file.seek(place)
            state.update(file.read(SAMPLE_BYTES))
    return path.name, size, state.digest()


def tokenizer(model: str, revision: str | None = None) -> str:
    """A digest of the tokenizer's files."""
    place = folder(model, revision)
    files = [place / name for name in TOKENIZER if (place / name).is_file()] if place else []
    return digest(*((path.name, blake2b(path.read_bytes()).digest()) for path in files)) if files else "not found"


def name_of(model: str, revision: str | None = None) -> str:
    """A name that is the same on every host: a folder's own name, or the hub's, with the revision."""
    name = Path(model).name if os.path.exists(model) else model  # noqa: PTH110
    return f"{name}@{revision}" if revision else name


def hash_root(algorithm: str, engine: str) -> tuple[str, bool]:
    """What the chains of block hashes start from, and whether any other engine can have the same.

    As in vLLM: PYTHONHASHSEED where it is set; else a constant, but for the xxhash kinds, which draw a random one.
    """
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is not None:
        return f"seed {digest(seed)[:16]}", True
    if algorithm.startswith("xxhash"):
        return f"random {digest(engine)[:16]}", False
    return "default", True


def cpu_kernel(dtype: Any, block_tokens: int, head_size: int, cache_dtype: str) -> str:
    """Which of its layouts vLLM's CPU attention packs keys and values into, on this machine."""
    import torch

    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        kernel = _get_attn_isa(dtype, block_tokens, head_size, cache_dtype)
    except (ImportError, TypeError):  # another release keeps it elsewhere
        kernel = "unknown"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {kernel}"


def vllm(config: VllmConfig, caches: KVCacheConfig, *, label: str | None = None) -> Spec:
    """The spec of a vLLM engine's blocks; the same in its scheduler and in each of its workers.

    `label` names the namespace for people; the model's name by default.
    """
    model, cache, parallel, transfer = (
        config.model_config,
        config.cache_config,
        config.parallel_config,
        config.kv_transfer_config,
    )
    name = name_of(model.model, model.revision)
    block_tokens = caches.kv_cache_groups[0].kv_cache_spec.block_size
    engine = str(transfer.engine_id) if transfer is not None else ""
    algorithm = cache.prefix_caching_hash_algo
    root, _ = hash_root(algorithm, engine)
    device = config.device_config.device_type
    kernel = cpu_kernel(model.dtype, block_tokens, model.get_head_size(), cache.cache_dtype) if device == "cpu" else ""
    # Positions, quantization and whatever else of the configuration turns the same weights into other keys and values.
    told = {key: value for key, value in model.hf_config.to_dict().items() if key not in HOUSEKEEPING}
    rules = [json.dumps(told, sort_keys=True, default=str), str(model.hf_overrides), str(model.quantization)]
    if any(kind in rules[0] for kind in ("longrope", "dynamic", "yarn")):  # positions that depend on the longest prompt
        rules += [str(model.max_model_len)]
    rules += [str(os.environ.get("VLLM_PP_LAYER_PARTITION")), str(getattr(cache, "kv_cache_dtype_skip_layers", None))]
    drafts = config.speculative_config
    if drafts is not None:  # a draft model's layers are in the same blocks
        rules += [str(drafts.method), str(drafts.model)]
    if getattr(cache, "calculate_kv_scales", False):  # scales found at run time are no one else's
        rules += [engine]
    if config.load_config.load_format == "dummy":
        weighed = f"dummy {model.seed}"
    else:
        weighed = weights(model.model, model.revision)
    return {
        "label": text(label or name, LABEL_BYTES),
        "model": text(name),
        "weights": weighed,
        "tokenizer": tokenizer(model.tokenizer, model.tokenizer_revision) if model.tokenizer else "none",
        "kv_dtype": str(model.dtype).removeprefix("torch.") if cache.cache_dtype == "auto" else cache.cache_dtype,
        "layers": model.get_total_num_hidden_layers(),
        "kv_heads": model.get_total_num_kv_heads(),
        "head_size": model.get_head_size(),
        "packing": text(f"vllm {device} {kernel}, hashes {algorithm} from {root}, configuration {digest(*rules)}"),
        "block_tokens": block_tokens,
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "context_parallel": 1,
        "engine_class": "vllm",
    }

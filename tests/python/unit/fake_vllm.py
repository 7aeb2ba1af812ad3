"""As much of vLLM as its connector touches, so that its halves can be tested without it (2.5 GB, 25 s to import).

`install()` puts modules of these names into `sys.modules`, unless the real ones are there. Whether the real ones still
look like this is checked in `tests/python/vllm/test_fakes.py`, name by name, from `FIELDS`.
"""

import logging
import types
from dataclasses import dataclass, field
from typing import Any

import fakes

# What the connector reads, by the real class's place. The test of the fakes reads this table too.
FIELDS = {
    "vllm.v1.request:Request": [
        "request_id", "block_hashes", "num_tokens", "num_computed_tokens", "num_prompt_tokens", "num_preemptions",
        "lora_request", "skip_reading_prefix_cache", "all_token_ids",
    ],
    "vllm.v1.core.sched.output:SchedulerOutput": ["num_scheduled_tokens", "kv_connector_block_state"],
    "vllm.v1.core.sched.output:KVConnectorBlockState": ["get_block_ids"],
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": ["get_block_ids"],
    "vllm.v1.outputs:KVConnectorOutput": ["finished_sending", "finished_recving", "invalid_block_ids",
                                          "kv_connector_worker_meta"],
    "vllm.distributed.kv_events:BlockStored": ["block_hashes", "parent_block_hash", "token_ids", "block_size",
                                               "lora_id", "lora_name", "medium"],
}  # fmt: skip


@dataclass(eq=False)
class Request:
    request_id: str
    tokens: list[int]
    block_tokens: int = 4
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    lora_request: Any = None
    skip_reading_prefix_cache: bool = False

    def __post_init__(self):
        self.num_prompt_tokens = len(self.tokens)
        self.block_hashes = []
        self.grow()

    def grow(self, *tokens):
        self.tokens.extend(tokens)
        self.num_tokens = len(self.tokens)
        self.all_token_ids = self.tokens
        self.block_hashes = []
        for i in range(len(self.tokens) // self.block_tokens):
            prefix = self.tokens[: (i + 1) * self.block_tokens]
            self.block_hashes.append(("%032x" % (hash(tuple(prefix)) & (1 << 128) - 1)).encode())


@dataclass
class KVConnectorBlockState:
    tables: dict[str, list[int]]

    def get_block_ids(self, req_id):
        return (self.tables[req_id],) if req_id in self.tables else None


@dataclass
class SchedulerOutput:
    num_scheduled_tokens: dict[str, int]
    kv_connector_block_state: KVConnectorBlockState | None


@dataclass
class KVCacheBlocks:
    ids: list[int]

    def get_block_ids(self):
        return (self.ids,)


@dataclass
class KVConnectorOutput:
    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    invalid_block_ids: set[int] = field(default_factory=set)
    kv_connector_worker_meta: Any = None


@dataclass(kw_only=True)
class BlockStored:
    block_hashes: list
    parent_block_hash: Any
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    lora_name: str | None
    medium: str | None


@dataclass
class KVConnectorStats:
    data: dict[str, Any] = field(default_factory=dict)


class KVConnectorPromMetrics:
    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        self._counter_cls = metric_types["counter"]


def install():
    """Makes `import terrace.vllm` work without vLLM."""
    empty = lambda *bases: type("Empty", bases, {})  # noqa: E731
    contents: dict[str, dict[str, Any]] = {
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.distributed.kv_events": {"BlockStored": BlockStored},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": empty(), "KVConnectorMetadata": empty(), "KVConnectorWorkerMetadata": empty(),
            "KVConnectorRole": types.SimpleNamespace(SCHEDULER=0, WORKER=1),
        },
        "vllm.distributed.kv_transfer.kv_connector.v1.metrics": {
            "KVConnectorStats": KVConnectorStats, "KVConnectorPromMetrics": KVConnectorPromMetrics,
        },
        "vllm.v1.core.kv_cache_utils": {"maybe_convert_block_hash": lambda block: block},
    }  # fmt: skip
    fakes.put(contents)

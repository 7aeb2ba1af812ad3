"""As much of vLLM's tiering as `terrace.vllm_tier` touches; checked against the real classes in tests/python/vllm.

`install()` puts modules of these names into `sys.modules`, unless the real ones are there.
"""

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import fakes

# What the tier reads and makes, by the real class's place. The test of the fakes reads this table too.
FIELDS = {
    "vllm.v1.kv_offload.base:ReqContext": ["req_id", "_offload_key_positions"],
    "vllm.v1.kv_offload.base:ScheduleEndContext": ["new_req_ids", "preempted_req_ids"],
    "vllm.v1.kv_offload.base:OffloadingEvent": ["keys", "medium", "removed", "locality"],
    "vllm.v1.kv_offload.tiering.base:TransferJob": [
        "job_id", "keys", "chunk_ids", "is_promotion", "req_context", "submit_time",
    ],
    "vllm.v1.kv_offload.tiering.base:JobResult": [
        "job_id", "success", "successful_keys", "transfer_time", "transfer_bytes",
    ],
    "vllm.v1.kv_offload.config:OffloadingConfig": [
        "groups", "model", "parallel", "kv_cache_layout", "canonical_layout",
    ],
    "vllm.v1.kv_offload.config:OffloadingGroupConfig": ["tokens_per_block", "layer_names", "group_id"],
}  # fmt: skip


class LookupResult(Enum):
    MISS = 1
    HIT = 2
    HIT_PENDING = 3
    RETRY = 4


class Medium(Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(Enum):
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


@dataclass
class ReqContext:
    req_id: str
    kv_transfer_params: dict | None = None
    _offload_key_positions: dict[bytes, int] = field(default_factory=dict, repr=False, init=False)

    def set_offload_key_position(self, key, end_token):
        self._offload_key_positions[key] = end_token

    def get_offload_key_position(self, key):
        return self._offload_key_positions.get(key)


class RequestOffloadingContext:
    pass


class ScheduleEndContext(NamedTuple):
    new_req_ids: Any
    preempted_req_ids: Any


@dataclass
class OffloadingEvent:
    keys: list
    medium: Medium
    removed: bool
    locality: Locality | None = None


@dataclass(frozen=True)
class Metadata:
    documentation: str
    labelnames: tuple[str, ...] = ()


@dataclass
class TransferJob:
    job_id: int
    keys: list
    chunk_ids: list
    is_promotion: bool
    req_context: ReqContext
    submit_time: float = field(default_factory=time.monotonic)


@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: Any = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


class SecondaryTierManager:
    def __init__(self, offloading_spec, primary_kv_view, tier_type, backpressure_detector=None):
        self._offloading_spec = offloading_spec
        self._primary_kv_view = primary_kv_view
        self._block_size_bytes = primary_kv_view.strides[0]
        self.tier_type = tier_type
        self.locality = None
        self._bp_detector = backpressure_detector


class OffloadingConnectorStats:
    def __init__(self):
        self.counters, self.gauges = {}, {}

    def increase_counter(self, name, value=1, labelvalues=()):
        self.counters[name, labelvalues] = self.counters.get((name, labelvalues), 0) + value

    def set_gauge(self, name, value, labelvalues=()):
        self.gauges[name, labelvalues] = value

    def is_empty(self):
        return not self.counters and not self.gauges


def make_offload_key(block_hash, group):
    return block_hash + group.to_bytes(4, "big")


def install():
    """Makes `import terrace.vllm_tier` work without vLLM."""
    here = globals()
    contents: dict[str, dict[str, Any]] = {
        "vllm.config": {"get_current_vllm_config_or_none": lambda: None},
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics": {
            "OffloadingConnectorStats": OffloadingConnectorStats,
        },
        "vllm.v1.kv_offload.base": {
            "OffloadKey": bytes,
            "OffloadingCounterMetadata": Metadata,
            "OffloadingGaugeMetadata": Metadata,
            "OffloadingMetricMetadata": Metadata,
            "get_offload_group_idx": lambda key: int.from_bytes(key[-4:], "big"),
            **{
                name: here[name]
                for name in ("Locality", "LookupResult", "Medium", "OffloadingEvent", "ReqContext",
                             "RequestOffloadingContext", "ScheduleEndContext")
            },
        },
        "vllm.v1.kv_offload.tiering.base": {
            name: here[name] for name in ("JobResult", "SecondaryTierManager", "TransferJob")
        },
    }  # fmt: skip
    fakes.put(contents)

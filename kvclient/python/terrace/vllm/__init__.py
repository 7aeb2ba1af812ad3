"""vLLM's KV connector: prefixes survive restarts of the engine and are shared between engines.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "TerraceConnector",
        "kv_connector_module_path": "terrace.vllm", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"endpoint": "host:7070"}}'

    scheduler  new request ──lookup──► None, None, n blocks ──blocks allocated──► Load ┐
               step ──blocks that this step fills──► Save ─────────────────────────────┤ Step, once per engine step
    worker     after the forward: start loads, start saves ◄───────────────────────────┘
               every step: which jobs ended ──► blocks that failed, requests loaded, saves done ──► scheduler

Everything that takes time is in `Cache`'s threads; nothing here waits, but for the saves of a preempted request.

Failures. A save may drop, a lookup may answer zero, a load may fail; the engine then computes. Loads are asynchronous
only: a request runs after its blocks were verified, so no step ever computes, or saves, on top of blocks that failed.
Blocks that a save reads are not given back before it has ended: a finished request's are held (`request_finished` says
so), a preempted one's are waited for before the step that may reuse them.

Why whole blocks: their inside is the attention kernel's affair (on a CPU packed for the instruction set), so the bytes
are opaque and the identity of the namespace says which kernel they belong to. Written for vLLM 0.32; 0.33 passes more
keywords, which are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from terrace.vllm.scheduler import Scheduler
from terrace.vllm.setup import setup
from terrace.vllm.stats import TerraceMetrics, TerraceStats
from terrace.vllm.step import Step
from terrace.vllm.worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

Half = TypeVar("Half", Scheduler, Worker)


class TerraceConnector(KVConnectorBase_V1):
    """One of these in the scheduler and one in each worker; see the module's text."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        connect = setup(vllm_config, kv_cache_config, role == KVConnectorRole.WORKER)
        block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._side: Scheduler | Worker = (
            Scheduler(connect, vllm_config, block_tokens)
            if role == KVConnectorRole.SCHEDULER
            else Worker(connect, kv_cache_config.num_blocks)
        )

    def _half(self, kind: type[Half]) -> Half:
        assert isinstance(self._side, kind), f"called in the {self.role.name.lower()}"
        return self._side

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped save is a later miss, nothing more."""
        return False

    # ---- in the scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._half(Scheduler).matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._half(Scheduler).allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._half(Scheduler).plan(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._half(Scheduler).update(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._half(Scheduler).finished(request), None

    def take_events(self) -> Iterable[Any]:
        return self._half(Scheduler).take_events()

    def reset_cache(self) -> bool | None:
        return self._half(Scheduler).reset()

    # ---- in each worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._half(Worker).register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, Step)
        self._half(Worker).before(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        self._half(Worker).start_loads(step)

    def wait_for_save(self) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        self._half(Worker).start_saves(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs after its load."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do: whole blocks are saved after the forward."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent, received = self._half(Worker).finished()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._half(Worker).failed()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._half(Worker).done()

    # ---- in both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        counts = self._side.counts()
        return TerraceStats(data=counts) if any(counts.values()) else None

    def shutdown(self) -> None:
        self._side.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return TerraceStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics | None:
        return TerraceMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

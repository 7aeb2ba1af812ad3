"""What vLLM's connector counts, for its log and for Prometheus. `terrace._terrace.COUNTERS` says what each counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from terrace._terrace import COUNTERS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TerraceStats(KVConnectorStats):
    """Counters since the last report."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> TerraceStats:
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(self.data.get(name, 0), 4) for name in COUNTERS}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class TerraceMetrics(KVConnectorPromMetrics):
    """The counters as Prometheus knows them: `vllm:terrace_loaded_blocks_total` and so on."""

    def __init__(self, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], values: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, values)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, about in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:terrace_{name}", documentation=about, labelnames=labelnames)
            self._counters[name] = {engine: counter.labels(*labels) for engine, labels in values.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(count)

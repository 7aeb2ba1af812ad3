"""What vLLM's connector counts, for vLLM's log and for Prometheus.

vLLM's own external-hit counters count when blocks are allocated, before anything was loaded; these count after the
last copy, and only what was verified. Kept per process and handed over as differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS = {
    "lookups": "Lookups answered",
    "lookup_blocks": "Blocks that lookups found and leased",
    "lookups_given_up": "Lookups given up after too many steps",
    "loads": "Loads ended",
    "loaded_blocks": "Blocks loaded and verified, counted after the last copy",
    "loaded_bytes": "Bytes loaded and verified",
    "load_seconds": "Seconds from the start to the end of each load, summed",
    "failed_blocks": "Blocks that a lookup promised and a load did not bring; computed instead",
    "saves": "Saves ended",
    "saved_blocks": "Blocks that the node holds after a save",
    "saved_bytes": "Bytes of those blocks",
    "save_seconds": "Seconds from the start to the end of each save, summed",
    "dropped_blocks": "Blocks that a save dropped: node away, slow or full",
}


class TerraceStats(KVConnectorStats):
    """Counters since the last report."""

    def add(self, **counts: float) -> None:
        for name, count in counts.items():
            self.data[name] = self.data.get(name, 0) + count

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> TerraceStats:
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(self.data.get(name, 0), 4) for name in COUNTERS}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def take(self) -> TerraceStats | None:
        """What was counted, once."""
        if self.is_empty():
            return None
        taken = TerraceStats(data=self.data)
        self.reset()
        return taken


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

"""Gauges of the engine and the store, read at each scrape, and the bounded labels of adapters."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.engine.observer import CacheName, EngineStats
from adaplex.engine.request import AdapterRef

MAX_ADAPTER_LABELS = 1000
OTHER = "other"


class AdapterLabels:
    """Label values of adapters: their names, up to a cap, then `other`."""

    def __init__(self, cap: int = MAX_ADAPTER_LABELS) -> None:
        self._cap = cap
        self._names: set[str] = set()
        self._by_digest: dict[str, str] = {}

    def of(self, adapter: AdapterRef) -> str:
        """The label of an adapter that a request uses."""
        if len(self._names) < self._cap:
            self._names.add(adapter.name)
        label = adapter.name if adapter.name in self._names else OTHER
        if label != OTHER:  # so at most a few digests a name
            self._by_digest[adapter.digest] = label
        return label

    def of_digest(self, digest: str) -> str:
        """The label last used with a digest."""
        return self._by_digest.get(digest, OTHER)

    def keep(self, digests: frozenset[str]) -> None:
        """Forgets all other digests."""
        self._by_digest = {d: n for d, n in list(self._by_digest.items()) if d in digests}


class EngineGauges(Collector):
    """Gauges read from the engine at each scrape."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        labels: AdapterLabels,
        *,
        model_name: str,
        max_lora: int,
    ) -> None:
        self._stats, self._adapters = stats, labels
        self._model_name, self._max_lora = model_name, max_lora

    def collect(self) -> Iterator[Metric]:
        """One family a gauge."""
        now = self._stats()
        used = now.kv_blocks_used / now.kv_blocks_total if now.kv_blocks_total else 0.0
        yield self._gauge("num_requests_running", "Requests in the batch.", now.running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", now.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used)
        yield self._lora_info(now)
        used_bytes: dict[CacheName, int] = {
            "arena": now.arena_bytes_used,
            "host": now.host_bytes_used,
            "merged": now.merged_bytes_used,
        }
        total_bytes: dict[CacheName, int] = {
            "arena": now.arena_bytes_total,
            "host": now.host_bytes_total,
            "merged": now.merged_bytes_total,
        }
        yield self._tiers("adapter_resident_bytes", "Bytes in use.", used_bytes)
        yield self._tiers("adapter_capacity_bytes", "Bytes in all.", total_bytes)
        yield self._gauge("adapter_pinned_bytes", "Bytes of pins.", now.pinned_bytes_used)
        yield self._states(now)

    def _gauge(self, name: str, doc: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, doc, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _lora_info(self, now: EngineStats) -> Metric:
        """Who runs and waits, as inference gateways read it; the value is the time."""
        family = GaugeMetricFamily(
            "lora_requests_info",
            "Adapters of running and waiting requests.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters", "model_name"],
        )
        waiting, running = (
            ",".join(sorted(set(names))) for names in (now.waiting_adapters, now.running_adapters)
        )
        family.add_metric([str(self._max_lora), waiting, running, self._model_name], time.time())
        return family

    def _tiers(self, name: str, doc: str, values: Mapping[CacheName, int]) -> Metric:
        family = GaugeMetricFamily(name, doc, labels=["tier", "model_name"])
        for tier, value in values.items():
            family.add_metric([tier, self._model_name], value)
        return family

    def _states(self, now: EngineStats) -> Metric:
        """How many contents of each adapter are in each tier."""
        family = GaugeMetricFamily(
            "adapter_state",
            "Contents of the adapter in the tier.",
            labels=["adapter", "tier", "model_name"],
        )
        self._adapters.keep(now.resident | now.host | now.merged)
        tiers = {"arena": now.resident, "host": now.host, "merged": now.merged}
        for tier, digests in tiers.items():
            for label, count in sorted(Tally(map(self._adapters.of_digest, digests)).items()):
                family.add_metric([label, tier, self._model_name], count)
        return family


class StoreGauges(Collector):
    """Gauges of the tiers below memory, asked of the store at each scrape."""

    def __init__(
        self, registry: AdapterRegistry, *, model_name: str, store_bytes: int, cache_bytes: int
    ) -> None:
        """The quota of the store, and the budget of its cache here if it is elsewhere."""
        self._registry, self._model_name = registry, model_name
        self._store_bytes, self._cache_bytes = store_bytes, cache_bytes

    def collect(self) -> Iterator[Metric]:
        """One family a gauge."""
        usage, cached = self._registry.names.usage(), self._registry.cached_bytes()
        stored = (usage.stored_bytes, self._store_bytes)
        tiers = {"disk": stored}
        if cached is not None:
            tiers = {"disk": (cached, self._cache_bytes), "source": stored}
        labels = ["tier", "model_name"]
        used = GaugeMetricFamily("adapter_stored_bytes", "Bytes of files.", labels=labels)
        total = GaugeMetricFamily("adapter_store_capacity_bytes", "Bytes in all.", labels=labels)
        names = GaugeMetricFamily("adapters_stored", "Names.", labels=["model_name"])
        for tier, (have, most) in tiers.items():
            used.add_metric([tier, self._model_name], have)
            total.add_metric([tier, self._model_name], most)
        names.add_metric([self._model_name], usage.names)
        yield from (used, total, names)

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering asks nothing of the store."""
        return iter(())

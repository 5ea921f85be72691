"""Gauges of the engine and the store, read at each scrape, and the bounded labels of adapters."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adaplex.adapters.api import AdapterRegistry
from adaplex.engine.observer import CacheName
from adaplex.engine.request import AdapterRef
from adaplex.engine.stats import EngineStats
from adaplex.server.metric_table import MAX_ADAPTER_LABELS, METRICS

OTHER = "other"
"""Label of every adapter beyond the cap."""


class AdapterLabels:
    """Values of the label `adapter`: the first `cap` adapter names, then OTHER."""

    def __init__(self, cap: int = MAX_ADAPTER_LABELS) -> None:
        self._cap = cap
        self._names: set[str] = set()
        self._by_digest: dict[str, str] = {}

    def label(self, adapter: AdapterRef) -> str:
        """Returns the label of an adapter that a request uses, and records it for its digest."""
        if len(self._names) < self._cap:
            self._names.add(adapter.name)
        label = adapter.name if adapter.name in self._names else OTHER
        if label != OTHER:  # bounds the digests to a few per name
            self._by_digest[adapter.digest] = label
        return label

    def label_of_digest(self, digest: str) -> str:
        """Returns the label last recorded for a digest."""
        return self._by_digest.get(digest, OTHER)

    def retain(self, digests: frozenset[str]) -> None:
        """Drops the labels of every other digest."""
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
        """Yields one family per gauge."""
        now = self._stats()
        used = now.kv_blocks_used / now.kv_blocks_total if now.kv_blocks_total else 0.0
        yield self._gauge("num_requests_running", now.running)
        yield self._gauge("num_requests_waiting", now.waiting)
        yield self._gauge("kv_cache_usage_perc", used)
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
        yield self._tiers("adapter_resident_bytes", used_bytes)
        yield self._tiers("adapter_capacity_bytes", total_bytes)
        yield self._gauge("adapter_pinned_bytes", now.pinned_bytes_used)
        yield self._states(now)

    def _gauge(self, name: str, value: float) -> Metric:
        family = _family(name)
        family.add_metric([self._model_name], value)
        return family

    def _lora_info(self, now: EngineStats) -> Metric:
        """Names of running and waiting adapters, in the form that inference gateways read."""
        family = _family("lora_requests_info")
        waiting, running = (
            ",".join(sorted(set(names))) for names in (now.waiting_adapters, now.running_adapters)
        )
        family.add_metric([str(self._max_lora), waiting, running, self._model_name], time.time())
        return family

    def _tiers(self, name: str, values: Mapping[CacheName, int]) -> Metric:
        family = _family(name)
        for tier, value in values.items():
            family.add_metric([tier, self._model_name], value)
        return family

    def _states(self, now: EngineStats) -> Metric:
        """Number of contents per adapter label and memory tier."""
        family = _family("adapter_state")
        self._adapters.retain(now.resident | now.host | now.merged)
        tiers = {"arena": now.resident, "host": now.host, "merged": now.merged}
        for tier, digests in tiers.items():
            labels = Tally(map(self._adapters.label_of_digest, digests))
            for label, count in sorted(labels.items()):
                family.add_metric([label, tier, self._model_name], count)
        return family


class StoreGauges(Collector):
    """Gauges of the store tiers, read from the registry at each scrape."""

    def __init__(
        self, registry: AdapterRegistry, *, model_name: str, store_bytes: int, cache_bytes: int
    ) -> None:
        """`store_bytes` is the store's quota, `cache_bytes` the budget of a shared store's cache
        on this machine.
        """
        self._registry, self._model_name = registry, model_name
        self._store_bytes, self._cache_bytes = store_bytes, cache_bytes

    def collect(self) -> Iterator[Metric]:
        """Yields one family per gauge."""
        usage, cached = self._registry.names.usage(), self._registry.cached_bytes()
        stored = (usage.stored_bytes, self._store_bytes)
        tiers = {"disk": stored}
        if cached is not None:
            tiers = {"disk": (cached, self._cache_bytes), "source": stored}
        used, total = _family("adapter_stored_bytes"), _family("adapter_store_capacity_bytes")
        for tier, (used_bytes, total_bytes) in tiers.items():
            used.add_metric([tier, self._model_name], used_bytes)
            total.add_metric([tier, self._model_name], total_bytes)
        names = _family("adapters_stored")
        names.add_metric([self._model_name], usage.names)
        yield from (used, total, names)

    def describe(self) -> Iterator[Metric]:
        """Yields nothing, so that registering the collector does not read the store."""
        return iter(())


def _family(name: str) -> GaugeMetricFamily:
    """Returns an empty gauge family of the table."""
    spec = METRICS[name]
    return GaugeMetricFamily(name, spec.help, labels=[*spec.labels, "model_name"])

"""Prometheus metrics, exposed under `adaplex_` and, if configured, under `vllm:` too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from adaplex.adapters.api import AdapterRegistry
from adaplex.adapters.errors import AdapterTooLarge
from adaplex.engine.errors import (
    AdapterLoadFailed,
    DeadlineExpired,
    QueueFull,
    ServerUnavailable,
)
from adaplex.engine.observer import CacheName, Outcome
from adaplex.engine.request import AdapterRef, Timing
from adaplex.engine.stats import EngineStats
from adaplex.server.gauges import AdapterLabels, EngineGauges, StoreGauges
from adaplex.server.metric_table import METRICS, OURS, RPC_METRICS
from adaplex.server.rpc_context import RpcContext

REJECTIONS: dict[type[Exception], str] = {
    QueueFull: "queue_full",
    ServerUnavailable: "unavailable",
    DeadlineExpired: "deadline",
    AdapterTooLarge: "adapter_too_large",
    AdapterLoadFailed: "adapter_load",
}
"""Values of the label `reason` by error class; any other error counts as `error`."""

FinishedReason = Literal["stop", "length", "abort", "error"]


def scraped_registry() -> CollectorRegistry:
    """Returns an empty registry whose scrapes find every metric by `name[]`, gauges included."""
    return CollectorRegistry(support_collectors_without_names=True)


class Renamed(Collector):
    """Exposes the metrics of `table` under a prefix, except those in `omit`."""

    def __init__(
        self, table: CollectorRegistry, prefix: str, omit: frozenset[str] = frozenset()
    ) -> None:
        self._table, self._prefix, self._omit = table, prefix, omit

    def collect(self) -> Iterator[Metric]:
        """Yields every family under its new name, without the `_created` samples."""
        for metric in self._table.collect():
            if metric.name in self._omit:
                continue
            renamed = Metric(self._prefix + metric.name, metric.documentation, metric.type)
            renamed.samples = [
                sample._replace(name=self._prefix + sample.name)
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ]
            yield renamed


class Metrics:
    """Counters and histograms. The engine reports through the Observer methods, the edge through
    the others.
    """

    def __init__(
        self, registry: CollectorRegistry, *, model_name: str, vllm_names: bool = False
    ) -> None:
        self._model_name = model_name
        self._table = CollectorRegistry()
        self._adapters = AdapterLabels()
        self._prompt_tokens = self._counter("prompt_tokens")
        # Looking up a series costs as much as counting: those of every step are looked up once.
        self._generation_tokens = self._counter("generation_tokens").labels(model_name)
        self._inter_token = self._histogram("inter_token_latency_seconds").labels(model_name)
        self._prefix_queries = self._counter("prefix_cache_queries")
        self._prefix_hits = self._counter("prefix_cache_hits")
        self._preemptions = self._counter("num_preemptions")
        self._finished = self._counter("request_success")
        self._rejections = self._counter("admission_rejections")
        self._adapter_requests = self._counter("adapter_requests")
        self._loads = self._counter("adapter_loads")
        self._evictions = self._counter("adapter_evictions")
        self._merged_queries = self._counter("merged_cache_queries")
        self._merged_hits = self._counter("merged_cache_hits")
        self._load_seconds = self._histogram("adapter_load_seconds")
        self._first_token = self._histogram("time_to_first_token_seconds")
        self._per_token = self._histogram("request_time_per_output_token_seconds")
        self._e2e = self._histogram("e2e_request_latency_seconds")
        self._queue = self._histogram("request_queue_time_seconds")
        self._prefill = self._histogram("request_prefill_time_seconds")
        self._decode = self._histogram("request_decode_time_seconds")
        self._prompt_size = self._histogram("request_prompt_tokens")
        self._generation_size = self._histogram("request_generation_tokens")
        self._step_tokens = self._histogram("iteration_tokens_total")
        self._start_at_zero()
        registry.register(Renamed(self._table, "adaplex_"))
        if vllm_names:
            registry.register(Renamed(self._table, "vllm:", OURS))

    def watch(self, stats: Callable[[], EngineStats], *, max_lora: int) -> None:
        """Adds the gauges of an engine that batches at most `max_lora` adapters."""
        self._table.register(
            EngineGauges(stats, self._adapters, model_name=self._model_name, max_lora=max_lora)
        )

    def watch_store(self, registry: AdapterRegistry, *, store_bytes: int, cache_bytes: int) -> None:
        """Adds the gauges of the store tiers; `store_bytes` and `cache_bytes` are their budgets."""
        self._table.register(
            StoreGauges(
                registry,
                model_name=self._model_name,
                store_bytes=store_bytes,
                cache_bytes=cache_bytes,
            )
        )

    # Reports of the engine.

    def stepped(self, *, rows: int) -> None:
        """See Observer."""
        self._step_tokens.labels(self._model_name).observe(rows)

    def preempted(self) -> None:
        """See Observer."""
        self._preemptions.labels(self._model_name).inc()

    def prefix_looked_up(self, *, tokens: int, hits: int) -> None:
        """See Observer."""
        self._prefix_queries.labels(self._model_name).inc(tokens)
        self._prefix_hits.labels(self._model_name).inc(hits)

    def adapter_loaded(self, *, cache: CacheName, outcome: Outcome, seconds: float) -> None:
        """See Observer."""
        self._loads.labels(cache, outcome, self._model_name).inc()
        self._load_seconds.labels(cache, self._model_name).observe(seconds)

    def adapter_evicted(self, *, cache: CacheName) -> None:
        """See Observer."""
        self._evictions.labels(cache, self._model_name).inc()

    def merged_looked_up(self, *, hit: bool) -> None:
        """See Observer."""
        self._merged_queries.labels(self._model_name).inc()
        self._merged_hits.labels(self._model_name).inc(hit)

    # Reports of the edge.

    def request_admitted(self, adapter: AdapterRef | None, prompt_tokens: int) -> None:
        """Counts a request that the engine admitted."""
        self._prompt_tokens.labels(self._model_name).inc(prompt_tokens)
        self._prompt_size.labels(self._model_name).observe(prompt_tokens)
        if adapter is not None:
            self._adapter_requests.labels(self._adapters.label(adapter), self._model_name).inc()

    def request_rejected(self, error: Exception) -> None:
        """Counts a request that the edge or the engine refused before any work."""
        reason = REJECTIONS.get(type(error), "error")
        self._rejections.labels(reason, self._model_name).inc()

    def tokens_generated(self, count: int, gaps: Iterable[float]) -> None:
        """Counts `count` tokens of steps; `gaps` are the seconds between consecutive steps."""
        self._generation_tokens.inc(count)
        for gap in gaps:
            self._inter_token.observe(gap)

    def request_ended(
        self, reason: FinishedReason, completion_tokens: int, timing: Timing | None
    ) -> None:
        """Counts a request that ended; `timing` is None unless its response is complete."""
        name = self._model_name
        self._finished.labels(reason, name).inc()
        self._generation_size.labels(name).observe(completion_tokens)
        if timing is None:
            return
        decode = timing.total - timing.first_token
        self._e2e.labels(name).observe(timing.total)
        self._first_token.labels(name).observe(timing.first_token)
        self._queue.labels(name).observe(timing.queued)
        self._prefill.labels(name).observe(max(0.0, timing.first_token - timing.queued))
        self._decode.labels(name).observe(decode)
        if completion_tokens > 1:
            self._per_token.labels(name).observe(decode / (completion_tokens - 1))

    def _start_at_zero(self) -> None:
        """Creates every series with a bounded label at 0: a rate misses the event that creates a
        series.
        """
        name = self._model_name
        for counter in (
            self._prompt_tokens,
            self._preemptions,
            self._prefix_queries,
            self._prefix_hits,
            self._merged_queries,
            self._merged_hits,
        ):
            counter.labels(name)
        for reason in get_args(FinishedReason):
            self._finished.labels(reason, name)
        for reason in (*REJECTIONS.values(), "error"):
            self._rejections.labels(reason, name)
        for tier in get_args(CacheName):
            self._evictions.labels(tier, name)
            for outcome in get_args(Outcome):
                self._loads.labels(tier, outcome, name)

    def _counter(self, name: str) -> Counter:
        """Returns a new counter of the table."""
        spec = METRICS[name]
        return Counter(name, spec.help, [*spec.labels, "model_name"], registry=self._table)

    def _histogram(self, name: str) -> Histogram:
        """Returns a new histogram of the table."""
        spec = METRICS[name]
        labels = [*spec.labels, "model_name"]
        return Histogram(name, spec.help, labels, registry=self._table, buckets=spec.buckets)


class RpcMetrics:
    """Counts and durations of RPCs. No maintained library instruments grpc.aio servers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        table = RPC_METRICS

        def counter(name: str) -> Counter:
            return Counter(name, table[name].help, table[name].labels, registry=registry)

        self._started = counter("grpc_server_started")
        self._handled = counter("grpc_server_handled")
        duration = table["grpc_server_handling_seconds"]
        self._seconds = Histogram(
            "grpc_server_handling_seconds", duration.help, duration.labels, registry=registry
        )

    def started(self, rpc: RpcContext) -> None:
        """Counts an RPC that began."""
        self._started.labels(rpc.kind, rpc.service, rpc.method).inc()

    def handled(self, rpc: RpcContext, code: str, seconds: float) -> None:
        """Counts an RPC that ended with the status code of this name."""
        self._handled.labels(rpc.kind, rpc.service, rpc.method, code).inc()
        self._seconds.labels(rpc.kind, rpc.service, rpc.method).observe(seconds)

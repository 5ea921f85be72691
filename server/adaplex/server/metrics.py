"""Prometheus metrics: one table, rendered under `adaplex_`, and under `vllm:` when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.engine.errors import (
    AdapterLoadFailed,
    DeadlineExpired,
    QueueFull,
    ServerUnavailable,
)
from adaplex.engine.observer import CacheName, EngineStats, Outcome
from adaplex.engine.request import AdapterRef, Timing
from adaplex.server.gauges import AdapterLabels, EngineGauges, StoreGauges

# fmt: off
FIRST_TOKEN = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40,
               80, 160, 640, 2560)
INTER_TOKEN = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
           7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
LOAD = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60)
# fmt: on

OURS = frozenset(
    {
        "admission_rejections",
        "adapter_requests",
        "adapter_loads",
        "adapter_load_seconds",
        "adapter_evictions",
        "adapter_resident_bytes",
        "adapter_capacity_bytes",
        "adapter_pinned_bytes",
        "adapter_stored_bytes",
        "adapter_store_capacity_bytes",
        "adapters_stored",
        "adapter_state",
        "merged_cache_queries",
        "merged_cache_hits",
    }
)
"""Families that vLLM does not have; every other one keeps its name under `vllm:`."""

REJECTIONS: dict[type[Exception], str] = {
    QueueFull: "queue_full",
    ServerUnavailable: "unavailable",
    DeadlineExpired: "deadline",
    AdapterTooLarge: "adapter_too_large",
    AdapterLoadFailed: "adapter_load",
}
"""Reasons why the engine never began; anything else is `error`."""

FinishedReason = Literal["stop", "length", "abort", "error"]


class Renamed(Collector):
    """The families of `table` under a prefix, without `omit`."""

    def __init__(
        self, table: CollectorRegistry, prefix: str, omit: frozenset[str] = frozenset()
    ) -> None:
        self._table, self._prefix, self._omit = table, prefix, omit

    def collect(self) -> Iterator[Metric]:
        """Every family, renamed; creation times are left out."""
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
    """The table. The engine reports through the Observer half, the edge through the rest."""

    def __init__(
        self, registry: CollectorRegistry, *, model_name: str, vllm_names: bool = False
    ) -> None:
        self._model_name = model_name
        self._table = CollectorRegistry()
        self._adapters = AdapterLabels()
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        # Looking a series up takes as long as counting: the two of every step are kept.
        generated = self._counter("generation_tokens", "Tokens generated.")
        self._generation_tokens = generated.labels(model_name)
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found cached.")
        self._preemptions = self._counter("num_preemptions", "Requests put back to waiting.")
        self._finished = self._counter("request_success", "Requests ended.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests refused.", "reason")
        self._adapter_requests = self._counter("adapter_requests", "Requests.", "adapter")
        self._loads = self._counter("adapter_loads", "Loads into a tier.", "tier", "outcome")
        self._evictions = self._counter("adapter_evictions", "Evictions from a tier.", "tier")
        self._merged_queries = self._counter("merged_cache_queries", "Merged weights wanted.")
        self._merged_hits = self._counter("merged_cache_hits", "Merged weights found made.")
        self._load_seconds = self._histogram("adapter_load_seconds", "A load.", LOAD, "tier")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN
        )
        between = self._histogram("inter_token_latency_seconds", "Between tokens.", INTER_TOKEN)
        self._inter_token = between.labels(model_name)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean between tokens.", INTER_TOKEN
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Whole request.", LATENCY)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting.", LATENCY)
        self._prefill = self._histogram("request_prefill_time_seconds", "Prefill.", LATENCY)
        self._decode = self._histogram("request_decode_time_seconds", "Decode.", LATENCY)
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt tokens.", TOKENS)
        self._answer_size = self._histogram(
            "request_generation_tokens", "Generated tokens.", TOKENS
        )
        self._step_rows = self._histogram(
            "iteration_tokens_total", "Tokens of a step.", STEP_TOKENS
        )
        self._start_at_zero()
        registry.register(Renamed(self._table, "adaplex_"))
        if vllm_names:
            registry.register(Renamed(self._table, "vllm:", OURS))

    def watch(self, stats: Callable[[], EngineStats], *, max_lora: int) -> None:
        """Adds the gauges of an engine that batches up to `max_lora` adapters at once."""
        self._table.register(
            EngineGauges(stats, self._adapters, model_name=self._model_name, max_lora=max_lora)
        )

    def watch_store(self, registry: AdapterRegistry, *, store_bytes: int, cache_bytes: int) -> None:
        """Adds the gauges of the tiers below memory, with their budgets."""
        self._table.register(
            StoreGauges(
                registry,
                model_name=self._model_name,
                store_bytes=store_bytes,
                cache_bytes=cache_bytes,
            )
        )

    # What the engine reports.

    def stepped(self, *, rows: int) -> None:
        """See Observer."""
        self._step_rows.labels(self._model_name).observe(rows)

    def preempted(self) -> None:
        """See Observer."""
        self._preemptions.labels(self._model_name).inc()

    def prefix_looked_up(self, *, tokens: int, hits: int) -> None:
        """See Observer."""
        self._prefix_queries.labels(self._model_name).inc(tokens)
        self._prefix_hits.labels(self._model_name).inc(hits)

    def adapter_loaded(self, *, tier: CacheName, outcome: Outcome, seconds: float) -> None:
        """See Observer."""
        self._loads.labels(tier, outcome, self._model_name).inc()
        self._load_seconds.labels(tier, self._model_name).observe(seconds)

    def adapter_evicted(self, *, tier: CacheName) -> None:
        """See Observer."""
        self._evictions.labels(tier, self._model_name).inc()

    def merged_looked_up(self, *, hit: bool) -> None:
        """See Observer."""
        self._merged_queries.labels(self._model_name).inc()
        self._merged_hits.labels(self._model_name).inc(hit)

    # What the edge reports.

    def request_admitted(self, adapter: AdapterRef | None, prompt_tokens: int) -> None:
        """The engine began to work on a request."""
        self._prompt_tokens.labels(self._model_name).inc(prompt_tokens)
        self._prompt_size.labels(self._model_name).observe(prompt_tokens)
        if adapter is not None:
            self._adapter_requests.labels(self._adapters.of(adapter), self._model_name).inc()

    def request_rejected(self, error: Exception) -> None:
        """The edge or the engine refused a request before any work."""
        reason = REJECTIONS.get(type(error), "error")
        self._rejections.labels(reason, self._model_name).inc()

    def tokens_generated(self, count: int, gaps: Iterable[float]) -> None:
        """Steps gave `count` tokens; `gaps` are the seconds before each, but an answer's first."""
        self._generation_tokens.inc(count)
        for gap in gaps:
            self._inter_token.observe(gap)

    def request_ended(
        self, reason: FinishedReason, completion_tokens: int, timing: Timing | None
    ) -> None:
        """A request left; `timing` only of one that was answered to its end."""
        name = self._model_name
        self._finished.labels(reason, name).inc()
        self._answer_size.labels(name).observe(completion_tokens)
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
        """Makes every bounded series exist: a rate misses the event that a series begins with."""
        name = self._model_name
        for counter in (
            *(self._prompt_tokens, self._preemptions),
            *(self._prefix_queries, self._prefix_hits, self._merged_queries, self._merged_hits),
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

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(name, doc, [*labels, "model_name"], registry=self._table)

    def _histogram(
        self, name: str, doc: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(name, doc, [*labels, "model_name"], registry=self._table, buckets=buckets)

from __future__ import annotations

from prometheus_client import CollectorRegistry

from adaplex.adapters.program.traits import NO_TRAITS
from adaplex.engine.errors import QueueFull, ServerUnavailable
from adaplex.engine.observer import Observer
from adaplex.engine.request import AdapterRef, Timing
from adaplex.engine.stats import EngineStats
from adaplex.server.metrics import Metrics


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, 1, f"sha256:{name}", 10, NO_TRAITS)


def made(stats: EngineStats | None = None) -> tuple[Metrics, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = Metrics(registry, model_name="m")
    metrics.watch(lambda: stats or EngineStats(), max_lora=4)
    return metrics, registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"adaplex_{name}", {"model_name": "m", **labels})


LABELS = {
    "lora_requests_info": ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    "request_success": ["finished_reason"],
    "admission_rejections": ["reason"],
    "adapter_requests": ["adapter"],
    "adapter_loads": ["outcome", "tier"],
    "adapter_load_seconds": ["tier"],
    "adapter_evictions": ["tier"],
    "adapter_resident_bytes": ["tier"],
    "adapter_capacity_bytes": ["tier"],
    "adapter_state": ["adapter", "tier"],
}
"""Labels beside model_name; every other family has model_name only."""
LATENCIES = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
BETWEEN = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
BUCKETS = {
    "time_to_first_token_seconds": "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 "
    "1 2.5 5 7.5 10 20 40 80 160 640 2560",
    "inter_token_latency_seconds": BETWEEN,
    "request_time_per_output_token_seconds": BETWEEN,
    "e2e_request_latency_seconds": LATENCIES,
    "request_queue_time_seconds": LATENCIES,
    "request_prefill_time_seconds": LATENCIES,
    "request_decode_time_seconds": LATENCIES,
}


def test_labels_and_buckets_are_those_that_dashboards_for_vllm_know() -> None:
    metrics, registry = made(EngineStats(resident=frozenset(["sha256:a"])))
    metrics.request_admitted(ref("a"), 1)
    metrics.tokens_generated(2, [0.1])
    metrics.request_ended("stop", 2, Timing(queued=0.5, first_token=1.5, total=5.5))
    metrics.adapter_loaded(cache="arena", outcome="ok", seconds=0.02)
    metrics.stepped(rows=1)
    buckets = {}
    for metric in registry.collect():
        name = metric.name.removeprefix("adaplex_")
        labels = {label for sample in metric.samples for label in sample.labels} - {"le"}
        assert sorted(labels - {"model_name"}) == LABELS.get(name, []), name
        assert "model_name" in labels, name
        if metric.type == "histogram":
            bounds = {s.labels["le"] for s in metric.samples if "le" in s.labels} - {"+Inf"}
            buckets[name] = sorted(map(float, bounds))
    assert LABELS.keys() <= {m.name.removeprefix("adaplex_") for m in registry.collect()}
    for name, bounds in BUCKETS.items():
        assert buckets[name] == [float(bound) for bound in bounds.split()], name


def test_adapter_labels_are_capped() -> None:
    stats = EngineStats(resident=frozenset(["sha256:a0", "sha256:a1500", "sha256:unseen"]))
    metrics, registry = made(stats)
    for _ in range(2):
        for i in range(1501):
            metrics.request_admitted(ref(f"a{i}"), 1)
    assert value(registry, "adapter_requests_total", adapter="a0") == 2
    assert value(registry, "adapter_requests_total", adapter="a999") == 2
    assert value(registry, "adapter_requests_total", adapter="a1000") is None
    assert value(registry, "adapter_requests_total", adapter="other") == 1002
    assert value(registry, "adapter_state", adapter="a0", tier="arena") == 1
    assert value(registry, "adapter_state", adapter="other", tier="arena") == 2


def test_gauges_are_read_at_the_scrape() -> None:
    stats = EngineStats(
        running=2,
        waiting=3,
        kv_blocks_total=10,
        kv_blocks_used=4,
        arena_bytes_total=100,
        arena_bytes_used=60,
        merged_bytes_total=50,
        running_adapters=("b", "a", "a"),
        waiting_adapters=("c",),
    )
    _, registry = made(stats)
    assert value(registry, "num_requests_running") == 2
    assert value(registry, "num_requests_waiting") == 3
    assert value(registry, "kv_cache_usage_perc") == 0.4
    assert value(registry, "adapter_resident_bytes", tier="arena") == 60
    assert value(registry, "adapter_capacity_bytes", tier="merged") == 50
    labels = {"max_lora": "4", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert value(registry, "lora_requests_info", **labels) > 1e9  # type: ignore[operator]


def test_the_engine_reports_into_the_table() -> None:
    metrics, registry = made()
    observer: Observer = metrics
    observer.stepped(rows=20)
    observer.preempted()
    observer.prefix_looked_up(tokens=32, hits=16)
    observer.adapter_loaded(cache="arena", outcome="ok", seconds=0.02)
    observer.adapter_loaded(cache="merged", outcome="error", seconds=1)
    observer.adapter_evicted(cache="arena")
    observer.merged_looked_up(hit=True)
    observer.merged_looked_up(hit=False)
    assert value(registry, "iteration_tokens_total_sum") == 20
    assert value(registry, "num_preemptions_total") == 1
    assert value(registry, "prefix_cache_queries_total") == 32
    assert value(registry, "prefix_cache_hits_total") == 16
    assert value(registry, "adapter_loads_total", tier="merged", outcome="error") == 1
    assert value(registry, "adapter_load_seconds_bucket", tier="arena", le="0.025") == 1
    assert value(registry, "adapter_evictions_total", tier="arena") == 1
    assert value(registry, "merged_cache_queries_total") == 2
    assert value(registry, "merged_cache_hits_total") == 1


def test_a_finished_request_is_timed_part_by_part() -> None:
    metrics, registry = made()
    timing = Timing(queued=0.5, adapter_wait=0.2, first_token=1.5, total=5.5)
    metrics.request_ended("length", 5, timing)
    metrics.request_ended("abort", 3, None)
    assert value(registry, "request_success_total", finished_reason="length") == 1
    assert value(registry, "request_success_total", finished_reason="abort") == 1
    assert value(registry, "request_queue_time_seconds_sum") == 0.5
    assert value(registry, "request_prefill_time_seconds_sum") == 1.0
    assert value(registry, "request_decode_time_seconds_sum") == 4.0
    assert value(registry, "request_time_per_output_token_seconds_sum") == 1.0
    assert value(registry, "e2e_request_latency_seconds_count") == 1
    assert value(registry, "request_generation_tokens_sum") == 8


def test_rejections_are_counted_by_reason() -> None:
    metrics, registry = made()
    metrics.request_rejected(QueueFull(1, 1.0))
    metrics.request_rejected(ServerUnavailable("draining"))
    metrics.request_rejected(ValueError())
    for reason in ("queue_full", "unavailable", "error"):
        assert value(registry, "admission_rejections_total", reason=reason) == 1


def test_bounded_series_exist_before_their_first_event() -> None:
    _, registry = made()
    assert value(registry, "adapter_loads_total", tier="arena", outcome="error") == 0
    assert value(registry, "adapter_evictions_total", tier="merged") == 0
    assert value(registry, "request_success_total", finished_reason="abort") == 0
    assert value(registry, "admission_rejections_total", reason="queue_full") == 0
    assert value(registry, "generation_tokens_total") == 0

"""The table of metrics: type, labels, buckets, help text, and whether vLLM has the same metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

MAX_ADAPTER_LABELS = 1000
"""Adapter names that become values of the label `adapter`."""


@dataclass(frozen=True)
class MetricSpec:
    """One metric family of the table."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    """Labels beside `model_name`."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without +Inf."""
    vllm: bool = True
    """True if vLLM has the same metric under `vllm:`."""


def _counter(help_: str, *labels: str, vllm: bool = True) -> MetricSpec:
    return MetricSpec("counter", help_, labels, vllm=vllm)


def _gauge(help_: str, *labels: str, vllm: bool = True) -> MetricSpec:
    return MetricSpec("gauge", help_, labels, vllm=vllm)


def _histogram(
    help_: str, buckets: tuple[float, ...], *labels: str, vllm: bool = True
) -> MetricSpec:
    return MetricSpec("histogram", help_, labels, buckets, vllm)


METRICS: dict[str, MetricSpec] = {
    # Requests.
    "num_requests_running": _gauge("Requests in the running batch."),
    "num_requests_waiting": _gauge("Requests in the waiting queue."),
    "request_success": _counter("Requests that ended, by reason.", "finished_reason"),
    "admission_rejections": _counter(
        "Requests refused before the engine worked on them, by reason.", "reason", vllm=False
    ),
    "num_preemptions": _counter("Running requests whose KV blocks were freed, to be recomputed."),
    "lora_requests_info": _gauge(
        "Adapter names of running and waiting requests, as labels; the value is the Unix time.",
        *("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
    ),
    "adapter_requests": _counter("Admitted requests, by adapter.", "adapter", vllm=False),
    # Tokens.
    "prompt_tokens": _counter("Prompt tokens of admitted requests."),
    "generation_tokens": _counter("Tokens generated."),
    "request_prompt_tokens": _histogram("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": _histogram("Tokens generated for a request.", TOKENS),
    "iteration_tokens_total": _histogram("Tokens computed in one step.", STEP_TOKENS),
    # Latency.
    "time_to_first_token_seconds": _histogram(
        "Seconds from the arrival of a request to its first token.", FIRST_TOKEN
    ),
    "inter_token_latency_seconds": _histogram(
        "Seconds between two consecutive steps that gave a request tokens.", INTER_TOKEN
    ),
    "request_time_per_output_token_seconds": _histogram(
        "Mean seconds per token of a request, after its first token.", INTER_TOKEN
    ),
    "e2e_request_latency_seconds": _histogram(
        "Seconds from the arrival of a request to its end.", LATENCY
    ),
    "request_queue_time_seconds": _histogram(
        "Seconds a request waited in the queue until it was admitted.", LATENCY
    ),
    "request_prefill_time_seconds": _histogram(
        "Seconds from the admission of a request to its first token.", LATENCY
    ),
    "request_decode_time_seconds": _histogram(
        "Seconds from the first token of a request to its end.", LATENCY
    ),
    # KV cache.
    "kv_cache_usage_perc": _gauge("Fraction of the KV blocks in use, 0 to 1."),
    "prefix_cache_queries": _counter("Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": _counter("Prompt tokens whose KV came from the prefix cache."),
    # Adapters in memory.
    "adapter_loads": _counter("Adapter loads into a memory tier.", "tier", "outcome", vllm=False),
    "adapter_load_seconds": _histogram(
        "Seconds that an adapter load into a memory tier took.", LOAD, "tier", vllm=False
    ),
    "adapter_evictions": _counter("Adapters evicted from a memory tier.", "tier", vllm=False),
    "adapter_resident_bytes": _gauge("Bytes in use in a memory tier.", "tier", vllm=False),
    "adapter_capacity_bytes": _gauge("Byte budget of a memory tier.", "tier", vllm=False),
    "adapter_pinned_bytes": _gauge("Bytes of pinned adapters in the arena.", vllm=False),
    "adapter_state": _gauge(
        "Number of an adapter's contents in a memory tier.", "adapter", "tier", vllm=False
    ),
    "merged_cache_queries": _counter("Lookups of merged weights.", vllm=False),
    "merged_cache_hits": _counter("Lookups that found the merged weights built.", vllm=False),
    # Stored adapters.
    "adapters_stored": _gauge("Adapter names in the store.", vllm=False),
    "adapter_stored_bytes": _gauge("Bytes of adapter files in a store tier.", "tier", vllm=False),
    "adapter_store_capacity_bytes": _gauge("Byte quota of a store tier.", "tier", vllm=False),
}
"""Every metric by its name, without prefix and without the `_total` of counters."""

RPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")
RPC_METRICS: dict[str, MetricSpec] = {
    "grpc_server_started": _counter("RPCs started.", *RPC_LABELS, vllm=False),
    "grpc_server_handled": _counter("RPCs ended.", *RPC_LABELS, "grpc_code", vllm=False),
    "grpc_server_handling_seconds": _histogram("Seconds an RPC took.", (), *RPC_LABELS, vllm=False),
}
"""Metrics of RPCs under the names of grpc-ecosystem, without prefix and without `model_name`."""

OURS = frozenset(name for name, spec in METRICS.items() if not spec.vllm)
"""Metrics that vLLM does not have, which are not exposed under `vllm:`."""

LABELS: dict[str, str] = {
    "model_name": "Name of the base model; every metric but those of RPCs has it.",
    "adapter": f"Name of the adapter; `other` after the first {MAX_ADAPTER_LABELS:,} names.",
    "tier": "Memory tier `arena`, `host` or `merged`; store tier `disk` (files on this machine) or "
    "`source` (the shared store).",
    "outcome": "`ok` or `error`.",
    "finished_reason": "`stop`, `length`, `abort` (cancelled or past its deadline) or `error`.",
    "reason": "`queue_full`, `unavailable` (the server drains), `deadline`, `adapter_too_large`, "
    "`adapter_load` or `error` (any other).",
    "max_lora": "Adapters that one batch may mix: the value of `max_running`.",
    "waiting_lora_adapters": "Adapter names of waiting requests, separated by commas.",
    "running_lora_adapters": "Adapter names of running requests, separated by commas.",
    "grpc_type": "`unary`, `server_stream`, `client_stream` or `bidi_stream`.",
    "grpc_service": "Full name of the service.",
    "grpc_method": "Name of the RPC.",
    "grpc_code": "Name of the gRPC status code.",
}
"""Meaning and values of every label."""

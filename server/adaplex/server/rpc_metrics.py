"""The usual gRPC server metrics; no kept library counts aio servers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from adaplex.server.rpc_context import RpcContext


class RpcMetrics:
    """Started, handled and how long, by kind, service and method."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        self._started = Counter("grpc_server_started", "RPCs started.", labels, registry=registry)
        self._handled = Counter(
            "grpc_server_handled", "RPCs ended.", [*labels, "grpc_code"], registry=registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "Duration of RPCs.", labels, registry=registry
        )

    def started(self, call: RpcContext) -> None:
        """An RPC began."""
        self._started.labels(call.kind, call.service, call.method).inc()

    def handled(self, call: RpcContext, code: str, seconds: float) -> None:
        """An RPC ended with a status code, given by its name."""
        self._handled.labels(call.kind, call.service, call.method, code).inc()
        self._seconds.labels(call.kind, call.service, call.method).observe(seconds)

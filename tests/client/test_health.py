from __future__ import annotations

from typing import Any

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from adaplex.client import DeadlineExceeded, Health, NotFound, PermissionDenied, _health
from adaplex.client.errors import Unavailable
from client.fake_server import FakeServer
from time_limits import WAIT_SECONDS

NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVING = HealthCheckResponse.SERVING
SERVICE = "adaplex.v1.GenerationService"


@pytest.mark.parametrize("service", ["", SERVICE, "x" * 127])
def test_requests_are_those_of_the_protocol(service: str) -> None:
    assert _health.encode(service) == HealthCheckRequest(service=service).SerializeToString()


def test_a_name_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="127"):
        _health.encode("x" * 128)


@pytest.mark.parametrize(
    ("status", "health"),
    [
        (SERVING, Health.SERVING),
        (NOT_SERVING, Health.NOT_SERVING),
        (HealthCheckResponse.UNKNOWN, Health.UNKNOWN),
        (HealthCheckResponse.SERVICE_UNKNOWN, Health.UNKNOWN),
    ],
)
def test_responses_are_those_of_the_protocol(status: Any, health: Health) -> None:
    assert _health.decode(HealthCheckResponse(status=status).SerializeToString()) is health


def test_health_of_the_server_and_of_a_service(call: Any, server: FakeServer) -> None:
    assert call("health") is Health.SERVING
    server.health.set(SERVICE, NOT_SERVING)
    assert call("health", SERVICE) is Health.NOT_SERVING
    with pytest.raises(NotFound):
        call("health", "nobody")


def test_wait_ready_waits_until_the_server_serves(call: Any, server: FakeServer) -> None:
    server.health.set("", NOT_SERVING)
    server.health.serving_after = 3
    call("wait_ready", timeout=WAIT_SECONDS)
    assert server.health.checks == 3


def test_wait_ready_gives_up(call: Any, server: FakeServer) -> None:
    server.health.set("", NOT_SERVING)
    assert call("health") is Health.NOT_SERVING  # connects before the timeout starts
    with pytest.raises(DeadlineExceeded, match=r"not ready within 1 s \(not_serving\)"):
        call("wait_ready", timeout=1.0)


def test_wait_ready_gives_up_on_an_unreachable_server(connect: Any) -> None:
    with pytest.raises(DeadlineExceeded, match=r"127\.0\.0\.1:1 was not ready"):
        connect("127.0.0.1:1")("wait_ready", timeout=0.3)


def test_readiness_waits_only_if_the_result_can_change() -> None:
    readiness = _health.Readiness("host:1", 60.0)
    assert not readiness.is_ready(Unavailable("draining"))
    assert not readiness.is_ready(Health.NOT_SERVING)
    assert readiness.is_ready(Health.SERVING)
    with pytest.raises(PermissionDenied):
        readiness.is_ready(PermissionDenied("no"))

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo

import adaplex.client
from adaplex.client import errors
from client.fake_server import FakeServer
from time_limits import WAIT_SECONDS

FAILURES = sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK}, key=lambda code: code.name)


def violation(field: str, description: str) -> BadRequest.FieldViolation:
    return BadRequest.FieldViolation(field=field, description=description)


def test_every_status_has_an_error() -> None:
    assert set(errors.ERRORS) == set(FAILURES)


def test_every_error_is_public_and_knows_its_status() -> None:
    kinds = set(errors.AdaplexClientError.__subclasses__())
    assert kinds == set(errors.ERRORS.values())
    for kind in kinds:
        assert getattr(adaplex.client, kind.__name__) is kind
        assert errors.ERRORS[kind.default_code] is kind
        assert f"─ {kind.__name__} " in (errors.__doc__ or "")


@pytest.mark.parametrize("code", FAILURES, ids=lambda code: code.name)
def test_a_status_becomes_its_error(call: Any, server: FakeServer, code: grpc.StatusCode) -> None:
    server.fail(code, "it did not work", ErrorInfo(reason="BECAUSE", metadata={"name": "tone"}))
    with pytest.raises(errors.ERRORS[code]) as raised:
        call("generate", "hello", request_id="r-1")
    error = raised.value
    assert type(error) is errors.ERRORS[code]
    assert (error.code, error.message, error.reason) == (code, "it did not work", "BECAUSE")
    assert error.metadata == {"name": "tone"}
    assert error.request_id == "r-1"
    assert error.retry_after is None
    assert isinstance(error.__cause__, grpc.RpcError)


def test_a_stream_fails_with_the_same_error(call: Any, server: FakeServer) -> None:
    server.fail(grpc.StatusCode.NOT_FOUND, "no adapter", ErrorInfo(reason="ADAPTER_NOT_FOUND"))
    with pytest.raises(errors.NotFound) as raised:
        call.stream("hello", adapter="nobody")
    assert raised.value.reason == "ADAPTER_NOT_FOUND"


def test_field_violations_are_listed(call: Any, server: FakeServer) -> None:
    bad = BadRequest(
        field_violations=[violation("spec.priority", "too large"), violation("top_p", "is\nzero")]
    )
    server.fail(grpc.StatusCode.INVALID_ARGUMENT, "bad request", RequestInfo(), bad)
    with pytest.raises(errors.InvalidArgument) as raised:
        call("generate", "hello")
    assert raised.value.violations == (
        errors.FieldViolation("spec.priority", "too large"),
        errors.FieldViolation("top_p", "is\nzero"),
    )
    assert str(raised.value) == "spec.priority: too large; top_p: is zero"


def test_retry_info_is_in_seconds(call: Any, server: FakeServer) -> None:
    delay = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", delay)
    with pytest.raises(errors.ResourceExhausted) as raised:
        call("generate", "hello")
    assert raised.value.retry_after == 1.5
    assert len(server.requests) == 1  # Nothing is retried.


def test_a_status_without_details_keeps_its_message(call: Any, server: FakeServer) -> None:
    server.fail(grpc.StatusCode.INTERNAL, "engine failed")
    with pytest.raises(errors.Internal, match="engine failed") as raised:
        call("server_info")
    assert raised.value.reason == ""


def test_damaged_details_do_not_hide_the_error() -> None:
    class Failed(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.NOT_FOUND

        def details(self) -> str:
            return "gone"

        def trailing_metadata(self) -> Any:
            return ((errors.DETAILS_KEY, b"\xff\xff"),)

    error = errors.from_rpc(Failed(), "r-1")
    assert type(error) is errors.NotFound
    assert str(error) == "gone"


def test_an_unreachable_server_is_unavailable(connect: Any) -> None:
    with pytest.raises(errors.Unavailable):
        connect("127.0.0.1:1")("server_info", timeout=WAIT_SECONDS)

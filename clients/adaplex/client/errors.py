"""Errors of a call, one class for each gRPC status.

AdaplexClientError
├── InvalidArgument       a field or a local file is not acceptable; `violations` names each
├── NotFound              no such adapter, version or digest
├── AlreadyExists         the adapter name exists already
├── ResourceExhausted     a full queue, quota or budget; `retry_after` may say when to try again
├── FailedPrecondition    the server's present state does not allow the call
├── Unavailable           the server cannot be reached, is loading or is draining
├── DeadlineExceeded      the call's timeout passed
├── Cancelled             the call was closed before its end
├── PermissionDenied      the token does not allow the call
├── Unauthenticated       no valid token
├── Unimplemented         the server does not know the method
└── Internal              a fault in the server or a response that breaks the protocol
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """A field at fault: its path in the request, or a file's name, and the reason."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class AdaplexClientError(Exception):
    """A call that failed.

    `code` is the gRPC status, `message` the server's text. `reason` and `metadata` are the server's
    machine-readable `ErrorInfo`, empty if it sent none. `violations` lists the fields at fault.
    `retry_after` is in seconds, None if the server named no time. `str()` is one line that names
    every field at fault.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.request_id = request_id

    def __str__(self) -> str:
        text = "; ".join(map(str, self.violations)) or self.message or self.code.name
        return " ".join(text.split())


class InvalidArgument(AdaplexClientError):
    """A field of the request or a file to upload is not acceptable; see `violations`."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def because(cls, field: str, description: str) -> Self:
        """Builds the error of a single field that the client itself refuses."""
        violation = FieldViolation(field, description)
        return cls(str(violation), violations=[violation])


class NotFound(AdaplexClientError):
    """The server has no adapter of this name, version or digest."""

    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(AdaplexClientError):
    """The adapter name exists with other content, or is that of the base model."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class ResourceExhausted(AdaplexClientError):
    """The queue is full, or a quota or budget is used up; see `retry_after`."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(AdaplexClientError):
    """The server's present state does not allow the call."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class Unavailable(AdaplexClientError):
    """The server cannot be reached, is loading, or is draining."""

    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(AdaplexClientError):
    """The timeout passed before the call had ended."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(AdaplexClientError):
    """The call was closed before its end."""

    default_code = grpc.StatusCode.CANCELLED


class PermissionDenied(AdaplexClientError):
    """The caller's token does not allow the call."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(AdaplexClientError):
    """The caller sent no valid token."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class Unimplemented(AdaplexClientError):
    """The server does not know the method; it may be older than the client."""

    default_code = grpc.StatusCode.UNIMPLEMENTED


class Internal(AdaplexClientError):
    """A fault in the server, or a response that breaks the protocol."""

    default_code = grpc.StatusCode.INTERNAL


ERRORS: Mapping[grpc.StatusCode, type[AdaplexClientError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: FailedPrecondition,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DATA_LOSS: Internal,
}
"""The error of every status but OK."""

TLS_HINTS = {
    "WRONG_VERSION_NUMBER": "the server does not speak TLS: connect without tls",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not of a trusted root: give its root "
    "as tls (--tls-roots)",
    "Socket closed": "if the server speaks TLS, set tls (--tls or --tls-roots), and client_cert if "
    "it asks for one",
}
"""Part of grpc's text for a connection that could not be made -> what to do."""


@contextmanager
def translate_errors(request_id: str) -> Iterator[None]:
    """Raises grpc's errors, blocking or asyncio, as the errors of this module."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error, request_id) from error


def from_rpc(error: grpc.RpcError, request_id: str) -> AdaplexClientError:
    """Converts grpc's error and its `google.rpc` details."""
    rich = _rich_status(error)
    info = error_details_pb2.ErrorInfo()
    retry: float | None = None
    violations: list[FieldViolation] = []
    for detail in rich.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            info_retry = error_details_pb2.RetryInfo()
            detail.Unpack(info_retry)
            retry = info_retry.retry_delay.ToTimedelta().total_seconds()
    message = error.details() or rich.message
    if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in message:
        message = "; ".join([message, *(TLS_HINTS[part] for part in TLS_HINTS if part in message)])
    return ERRORS[error.code()](
        message,
        code=error.code(),
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=violations,
        retry_after=retry,
        request_id=request_id,
    )


def _rich_status(error: grpc.RpcError) -> status_pb2.Status:
    """Returns the `google.rpc.Status` of a call; an empty one if it is absent or damaged."""
    trailing: Iterable[Any] = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()

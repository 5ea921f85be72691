"""The one table from errors to gRPC statuses, with google.rpc details."""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from adaplex.adapters import errors as adapters
from adaplex.engine import errors as engine
from adaplex.model import errors as model
from adaplex.server import errors as edge

DOMAIN = "adaplex"
# Details travel in trailing metadata, of which gRPC peers take 8 KiB unless told otherwise.
MAX_MESSAGE_BYTES = 500
MAX_VIOLATION_BYTES = 3500
"""Of all field violations together."""


@dataclass(frozen=True)
class Mapping:
    """What a client is told of a class of errors: the code, and a reason for programs."""

    code: grpc.StatusCode
    reason: str


TABLE: dict[type[BaseException], Mapping] = {
    adapters.AdapterInvalid: Mapping(grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_INVALID"),
    adapters.AdapterNotFound: Mapping(grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
    adapters.AdapterExists: Mapping(grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS"),
    adapters.BaseMismatch: Mapping(grpc.StatusCode.FAILED_PRECONDITION, "BASE_MISMATCH"),
    adapters.StoreFull: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    adapters.AdapterTooLarge: Mapping(grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_TOO_LARGE"),
    adapters.SourceUnavailable: Mapping(grpc.StatusCode.UNAVAILABLE, "SOURCE_UNAVAILABLE"),
    adapters.StoreCorrupt: Mapping(grpc.StatusCode.DATA_LOSS, "STORE_CORRUPT"),
    engine.RequestInvalid: Mapping(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID"),
    engine.QueueFull: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    engine.PinsFull: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "PINS_FULL"),
    engine.NoRoomBesidePins: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_ROOM_BESIDE_PINS"),
    engine.ServerUnavailable: Mapping(grpc.StatusCode.UNAVAILABLE, "SERVER_UNAVAILABLE"),
    engine.DeadlineExpired: Mapping(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    engine.LogitsOverflowed: Mapping(grpc.StatusCode.FAILED_PRECONDITION, "LOGITS_OVERFLOWED"),
    engine.AdapterLoadFailed: Mapping(grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_LOAD_FAILED"),
    engine.EngineFailed: Mapping(grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    edge.UploadsBusy: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "UPLOADS_BUSY"),
    edge.UploadIdle: Mapping(grpc.StatusCode.DEADLINE_EXCEEDED, "UPLOAD_IDLE"),
    # A base that cannot be served ends the start; no client should ever see one.
    model.ModelError: Mapping(grpc.StatusCode.INTERNAL, "MODEL_ERROR"),
    # Their subclasses are above; a new one must not go unnamed.
    adapters.AdapterError: Mapping(grpc.StatusCode.INTERNAL, "ADAPTER_ERROR"),
    engine.RequestError: Mapping(grpc.StatusCode.INTERNAL, "REQUEST_ERROR"),
    adapters.AdaplexError: Mapping(grpc.StatusCode.INTERNAL, "ERROR"),
}
UNEXPECTED = Mapping(grpc.StatusCode.INTERNAL, "INTERNAL")


def mapping_of(error: BaseException) -> Mapping:
    """The table's entry for an error's nearest class; UNEXPECTED for what is not ours."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), UNEXPECTED)


def status_of(error: BaseException, request_id: str) -> Status:
    """The rich status of an error. Internal ones give away nothing but the request id."""
    mapping = mapping_of(error)
    internal = mapping.code is grpc.StatusCode.INTERNAL
    message = f"internal error; request id {request_id}" if internal else str(error)
    status = Status(code=_number(mapping.code), message=_cut(message))
    _attach(status, ErrorInfo(reason=mapping.reason, domain=DOMAIN))
    _attach(status, RequestInfo(request_id=request_id))
    violations = _bounded(_violations(error)) if mapping.code in _NAMES_FIELDS else []
    if violations:
        _attach(status, BadRequest(field_violations=violations))
    if isinstance(error, _RETRIED):
        _attach(status, RetryInfo(retry_delay=_duration(error.retry_after)))
    return status


_RETRIED = engine.QueueFull | edge.UploadsBusy | adapters.StoreFull | adapters.SourceUnavailable
_NAMES_FIELDS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
)


def _violations(error: BaseException) -> list[BadRequest.FieldViolation]:
    """Every field at fault and why."""
    if isinstance(error, adapters.AdapterInvalid):
        pairs = [(refusal.where, refusal.reason) for refusal in error.refusals]
    elif isinstance(error, adapters.AdapterError):
        pairs = [(error.field, str(error))]
    elif isinstance(error, engine.RequestInvalid):
        pairs = [(error.field, error.reason)]
    else:
        pairs = []
    return [
        BadRequest.FieldViolation(field=_cut(field), description=_cut(why)) for field, why in pairs
    ]


def _cut(text: str) -> str:
    """At most MAX_MESSAGE_BYTES of it, in whole characters."""
    return text.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def _bounded(violations: list[BadRequest.FieldViolation]) -> list[BadRequest.FieldViolation]:
    """As many as fit, the first in any case; then how many are left out."""
    kept: list[BadRequest.FieldViolation] = []
    room = MAX_VIOLATION_BYTES
    for violation in violations:
        room -= violation.ByteSize()
        if room < 0 and kept:
            rest = f"{len(violations) - len(kept)} more"
            return [*kept, BadRequest.FieldViolation(field="...", description=rest)]
        kept.append(violation)
    return kept


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _duration(seconds: float) -> Duration:
    whole = math.floor(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _attach(status: Status, detail: ErrorInfo | RequestInfo | BadRequest | RetryInfo) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)

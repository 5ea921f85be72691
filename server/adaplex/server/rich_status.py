"""The google.rpc status of an error, with its details."""

from __future__ import annotations

import math

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from adaplex.adapters import errors as adapters
from adaplex.engine import errors as engine
from adaplex.server.status import RETRIED, mapping_of

DOMAIN = "adaplex"
# Details travel in trailing metadata, of which gRPC peers accept 8 KiB by default.
MAX_MESSAGE_BYTES = 500
MAX_VIOLATION_BYTES = 3500
"""Bytes of all field violations of one status."""
NAMES_FIELDS = (StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND, StatusCode.ALREADY_EXISTS)
"""Codes whose statuses carry field violations."""


def status_of(error: BaseException, request_id: str) -> Status:
    """Returns the status of an error. An internal error exposes nothing but the request id."""
    mapping = mapping_of(error)
    internal = mapping.code is StatusCode.INTERNAL
    message = f"internal error; request id {request_id}" if internal else str(error)
    status = Status(code=_number(mapping.code), message=_cut(message))
    _attach(status, ErrorInfo(reason=mapping.reason, domain=DOMAIN))
    _attach(status, RequestInfo(request_id=request_id))
    violations = _bounded(_violations(error)) if mapping.code in NAMES_FIELDS else []
    if violations:
        _attach(status, BadRequest(field_violations=violations))
    if isinstance(error, RETRIED):
        _attach(status, RetryInfo(retry_delay=_duration(error.retry_after)))
    return status


def _violations(error: BaseException) -> list[BadRequest.FieldViolation]:
    """Returns every field at fault, with the reason."""
    if isinstance(error, adapters.AdapterInvalid):
        pairs = [(refusal.where, refusal.reason) for refusal in error.refusals]
    elif isinstance(error, adapters.AdapterError):
        pairs = [(error.field, str(error))]
    elif isinstance(error, engine.RequestInvalid):
        pairs = [(error.field, error.reason)]
    else:
        pairs = []
    return [
        BadRequest.FieldViolation(field=_cut(field), description=_cut(reason))
        for field, reason in pairs
    ]


def _cut(text: str) -> str:
    """Returns at most MAX_MESSAGE_BYTES of the text, in whole characters."""
    return text.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def _bounded(violations: list[BadRequest.FieldViolation]) -> list[BadRequest.FieldViolation]:
    """Returns as many violations as fit, at least one, then the number left out."""
    kept: list[BadRequest.FieldViolation] = []
    room = MAX_VIOLATION_BYTES
    for violation in violations:
        room -= violation.ByteSize()
        if room < 0 and kept:
            rest = f"{len(violations) - len(kept)} more"
            return [*kept, BadRequest.FieldViolation(field="...", description=rest)]
        kept.append(violation)
    return kept


def _number(code: StatusCode) -> int:
    number: int = code.value[0]
    return number


def _duration(seconds: float) -> Duration:
    whole = math.floor(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _attach(status: Status, detail: ErrorInfo | RequestInfo | BadRequest | RetryInfo) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)

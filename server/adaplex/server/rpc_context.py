"""RpcContext: facts of the RPC being handled, shared by interceptor, services and access log."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from adaplex.engine.errors import RequestInvalid
from adaplex.server.access.authenticator import Credential
from adaplex.server.access.principal import Principal
from adaplex.server.errors import Unauthenticated

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

REQUEST_ID = "x-request-id"
ACTOR = "x-adaplex-actor"
AUTHORIZATION = "authorization"
MAX_ACTOR_CHARS = 128
_VALID_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")


@dataclass(eq=False)
class RpcContext:
    """One RPC. `log` collects the fields of its access log line."""

    service: str
    method: str
    kind: str
    """`unary`, `client_stream`, `server_stream` or `bidi_stream`: the metric label `grpc_type`."""
    request_id: str
    started: float
    """`time.monotonic()` seconds, as is `deadline`."""
    deadline: float | None
    actor: str = ""
    """Recorded in adapter history: the principal's name, or what an unknown caller says it is."""
    principal: Principal | None = None
    """The caller; None if the server does not know its callers, or lets everybody call this."""
    log: dict[str, object] = field(default_factory=dict)

    @property
    def expired(self) -> bool:
        """True if the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


_current: ContextVar[RpcContext] = ContextVar("rpc")


def current_rpc() -> RpcContext:
    """Returns the RPC that the running handler serves."""
    return _current.get()


def enter_rpc(rpc: RpcContext) -> None:
    """Makes `rpc` the current RPC of this task."""
    _current.set(rpc)


def request_id_of(context: Context) -> str:
    """Returns the client's request id, or a new one. Raises RequestInvalid for an unsafe one."""
    sent = _metadata(context, REQUEST_ID)
    if sent is None:
        return uuid.uuid4().hex
    if not isinstance(sent, str) or not _VALID_ID.fullmatch(sent):
        raise RequestInvalid(REQUEST_ID, f"must match ^{_VALID_ID.pattern}$")
    return sent


def actor_of(context: Context) -> str:
    """Returns the caller's self-reported identity, empty if not sent. Raises RequestInvalid."""
    sent = _metadata(context, ACTOR)
    if sent is None:
        return ""
    if not isinstance(sent, str) or not sent.isprintable() or len(sent) > MAX_ACTOR_CHARS:
        raise RequestInvalid(ACTOR, f"must be at most {MAX_ACTOR_CHARS} printable characters")
    return sent


def _metadata(context: Context, key: str) -> str | bytes | None:
    """Returns the first value of a metadata key, None if the client did not send it."""
    return next((v for k, v in context.invocation_metadata() or () if k == key), None)


def credential_of(context: Context) -> Credential:
    """Returns the credential of a call. Raises Unauthenticated for a header that is not text."""
    sent = _metadata(context, AUTHORIZATION) or ""
    if not isinstance(sent, str):
        raise Unauthenticated("authorization: must be `Bearer TOKEN`")
    name = next(iter(context.auth_context().get("x509_common_name", ())), b"")
    return Credential(sent, name.decode(errors="replace"))


def deadline_of(context: Context, now: float) -> float | None:
    """Returns the deadline in `time.monotonic()` seconds, None if the client set none."""
    remaining: float | None = context.time_remaining()
    year = 365 * 24 * 3600.0  # gRPC reports a missing deadline as centuries
    return None if remaining is None or remaining > year else now + remaining


class Inflight:
    """Counts the RPCs in progress, each a `with` block."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> Inflight:
        self._count += 1
        self._idle.clear()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._count -= 1
        if not self._count:
            self._idle.set()

    async def idle(self) -> None:
        """Waits until no RPC is in progress."""
        await self._idle.wait()

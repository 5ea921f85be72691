"""RpcContext: what is known of the RPC being handled, from the interceptor to the log line."""

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

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

REQUEST_ID = "x-request-id"
ACTOR = "x-adaplex-actor"
MAX_ACTOR = 128
"""Characters."""
_VALID_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")


@dataclass(eq=False)
class RpcContext:
    """One RPC. `log` gathers what its access line will say."""

    service: str
    method: str
    kind: str
    """`unary`, `client_stream`, `server_stream` or `bidi_stream`, as metrics name it."""
    request_id: str
    started: float
    """`time.monotonic()` seconds, like `deadline`."""
    deadline: float | None
    actor: str = ""
    """Who asks, by its own account; for the history of adapters."""
    log: dict[str, object] = field(default_factory=dict)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


_current: ContextVar[RpcContext] = ContextVar("call")


def current_rpc() -> RpcContext:
    """The RPC that the running handler serves."""
    return _current.get()


def enter_rpc(call: RpcContext) -> None:
    """Makes `call` the current one of this task."""
    _current.set(call)


def request_id_of(context: Context) -> str:
    """The client's request id, or a new one. Raises RequestInvalid for one unfit for logs."""
    sent = _metadata(context, REQUEST_ID)
    if sent is None:
        return uuid.uuid4().hex
    if not isinstance(sent, str) or not _VALID_ID.fullmatch(sent):
        raise RequestInvalid(REQUEST_ID, f"must match ^{_VALID_ID.pattern}$")
    return sent


def actor_of(context: Context) -> str:
    """Who asks; empty when nobody is named. Raises RequestInvalid for a name unfit for logs."""
    sent = _metadata(context, ACTOR)
    if sent is None:
        return ""
    if not isinstance(sent, str) or not sent.isprintable() or len(sent) > MAX_ACTOR:
        raise RequestInvalid(ACTOR, f"must be at most {MAX_ACTOR} printable characters")
    return sent


def _metadata(context: Context, key: str) -> str | bytes | None:
    """The first value that the client sent under a key."""
    return next((v for k, v in context.invocation_metadata() or () if k == key), None)


def deadline_of(context: Context, now: float) -> float | None:
    """When the client stops waiting, if it ever does."""
    remaining: float | None = context.time_remaining()
    year = 365 * 24 * 3600.0
    return None if remaining is None or remaining > year else now + remaining


class Inflight:
    """Counts the RPCs in progress, and tells when there are none."""

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
        """Returns once nothing is in progress."""
        await self._idle.wait()

"""Connection: where and how to call, the same for both clients."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from adaplex.client._wire import GenerationCall
from adaplex.client.errors import InvalidArgument

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 600.0

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A generation is never run twice behind the caller's back, not even transparently.
    ("grpc.enable_retries", 0),
    # A report of a large adapter, or log probabilities of a long answer, exceed grpc's 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
    # A server that is still loading is found soon after it is up, not after two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


MAX_ACTOR = 128
"""Characters that the server takes."""


@dataclass(frozen=True)
class Call:
    """What goes with one call beside its message. `timeout` is in seconds."""

    request_id: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Connection:
    """A server's address and what every call to it carries."""

    target: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.ChannelCredentials | None
    """None is a connection without TLS."""

    @classmethod
    def configured(
        cls,
        target: str | None,
        *,
        timeout: float | None,
        token: str | None,
        metadata: Mapping[str, str] | None,
        actor: str | None = None,
        tls: bool | bytes | str | os.PathLike[str],
    ) -> Connection:
        """Resolves the options of a client (see Client)."""
        sent = {key.lower(): value for key, value in (metadata or {}).items()}
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        if actor is not None:
            if not 1 <= len(actor) <= MAX_ACTOR:
                raise InvalidArgument.because("actor", f"must be 1 to {MAX_ACTOR} characters")
            sent["x-adaplex-actor"] = actor
        for key, value in sent.items():
            _check_metadata(key, value)
        return cls(
            target=target or os.environ.get("ADAPLEX_TARGET") or DEFAULT_TARGET,
            timeout=timeout,
            metadata=tuple(sent.items()),
            credentials=_credentials(tls),
        )

    def blocking_channel(self) -> grpc.Channel:
        """A channel of grpc's blocking stack; it connects when it is first used."""
        if self.credentials is None:
            return grpc.insecure_channel(self.target, CHANNEL_OPTIONS)
        return grpc.secure_channel(self.target, self.credentials, CHANNEL_OPTIONS)

    def call(
        self,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        adapter: str | None = None,
    ) -> Call:
        """One call. A proxy or router can choose the server by `adapter`, which is ASCII."""
        request_id = request_id or str(uuid.uuid4())
        own = [("x-request-id", request_id)]
        if adapter:
            own += [("x-adapter-id", adapter), ("multiplexed_model_id", adapter)]
        _check_metadata("x-request-id", request_id)
        return Call(
            request_id=request_id,
            timeout=self.timeout if timeout is None else timeout,
            metadata=self.metadata + tuple(own),
        )

    def generation(self, planned: GenerationCall) -> Call:
        """The call that carries a generation. InvalidArgument names a selector out of ASCII."""
        spec = planned.spec
        _check_metadata("spec.adapter", spec.adapter)
        for part in spec.adapters:
            _check_metadata("spec.adapters", part.adapter)
        return self.call(
            timeout=planned.timeout,
            request_id=planned.request_id,
            adapter=spec.adapter or "+".join(sorted(part.adapter for part in spec.adapters)),
        )


def _check_metadata(field: str, value: str) -> None:
    """Refuses here, by name, what grpc would refuse for the whole call without one."""
    if not (value.isascii() and value.isprintable()):
        raise InvalidArgument.because(field, "must be printable ASCII")


def _credentials(tls: bool | bytes | str | os.PathLike[str]) -> grpc.ChannelCredentials | None:
    if tls is False:
        return None
    if tls is True:
        return grpc.ssl_channel_credentials()
    roots = tls if isinstance(tls, bytes) else Path(tls).read_bytes()
    return grpc.ssl_channel_credentials(root_certificates=roots)

"""Connection: a server's address, credentials and metadata, shared by both clients."""

from __future__ import annotations

import ipaddress
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import grpc

from adaplex.client._defaults import DEFAULT_TARGET
from adaplex.client._wire import GenerationCall
from adaplex.client.errors import InvalidArgument

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # grpc must not retry a generation, not even transparently: it would run twice.
    ("grpc.enable_retries", 0),
    # Reports of large adapters and log probabilities of long answers exceed grpc's 4 MiB.
    ("grpc.max_receive_message_length", 64 << 20),
    # Reconnects within seconds to a server that was still loading; grpc's default is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
DIRECT: tuple[tuple[str, int], ...] = (("grpc.enable_http_proxy", 0),)
"""Option of a channel to loopback, which no proxy that the environment names can reach."""
MAX_ACTOR = 128
"""Characters; the server's limit."""


@dataclass(frozen=True)
class CallOptions:
    """Request id, timeout in seconds (None: none) and metadata of one call."""

    request_id: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Connection:
    """A server's address, and the timeout in seconds and metadata of every call to it."""

    target: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.ChannelCredentials | None
    """TLS credentials; None connects without TLS."""

    @classmethod
    def from_options(
        cls,
        target: str | None,
        *,
        timeout: float | None,
        token: str | None,
        metadata: Mapping[str, str] | None,
        actor: str | None = None,
        tls: bool | bytes | str | os.PathLike[str],
        client_cert: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
    ) -> Connection:
        """Resolves the options of a client (see Client).

        Raises InvalidArgument for an actor of another length than 1 to 128 characters, for metadata
        that is not printable ASCII, and for PEM files that are missing or cannot be read.
        """
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
            credentials=_credentials(tls, client_cert, client_key),
        )

    @property
    def channel_options(self) -> tuple[tuple[str, int], ...]:
        """Options of a channel to the target."""
        return CHANNEL_OPTIONS + (DIRECT if is_loopback(self.target) else ())

    def blocking_channel(self) -> grpc.Channel:
        """Returns a new channel of grpc's blocking API; it connects on first use."""
        if self.credentials is None:
            return grpc.insecure_channel(self.target, self.channel_options)
        return grpc.secure_channel(self.target, self.credentials, self.channel_options)

    def call_options(
        self,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        adapter: str | None = None,
    ) -> CallOptions:
        """Returns the options of one call; None selects a random request id, or this timeout.

        `adapter`, printable ASCII, is sent as metadata by which a proxy can choose the server.
        """
        request_id = request_id or str(uuid.uuid4())
        own = [("x-request-id", request_id)]
        if adapter:
            own += [("x-adapter-id", adapter), ("multiplexed_model_id", adapter)]
        _check_metadata("x-request-id", request_id)
        return CallOptions(
            request_id=request_id,
            timeout=self.timeout if timeout is None else timeout,
            metadata=self.metadata + tuple(own),
        )

    def generation_options(self, plan: GenerationCall) -> CallOptions:
        """Returns the options of a generation's call. Raises InvalidArgument for a selector that is
        not printable ASCII.
        """
        spec = plan.spec
        _check_metadata("spec.adapter", spec.adapter)
        for part in spec.adapters:
            _check_metadata("spec.adapters", part.adapter)
        return self.call_options(
            timeout=plan.timeout,
            request_id=plan.request_id,
            adapter=spec.adapter or "+".join(sorted(part.adapter for part in spec.adapters)),
        )


def is_loopback(target: str) -> bool:
    """Returns True if every address of a grpc target is on this machine: `localhost`, 127.0.0.0/8,
    ::1, an unspecified address or a Unix socket, with or without a scheme such as `dns:///`.
    """
    scheme, colon, rest = target.partition(":")
    if colon and scheme.lower() in ("unix", "unix-abstract", "vsock"):
        return True
    if colon and scheme.lower() in ("dns", "ipv4", "ipv6"):
        target = unquote(rest.removeprefix("//").rpartition("/")[2])
    return all(_is_loopback_host(_host(address)) for address in target.split(","))


def _host(address: str) -> str:
    """Returns the host of `host`, `host:port`, `[host]:port` or an IPv6 address without a port."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def _is_loopback_host(host: str) -> bool:
    name = host.rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _check_metadata(field: str, value: str) -> None:
    """Raises InvalidArgument naming the field; grpc's own error would not name it."""
    if not (value.isascii() and value.isprintable()):
        raise InvalidArgument.because(field, "must be printable ASCII")


def _credentials(
    tls: bool | bytes | str | os.PathLike[str],
    client_cert: str | os.PathLike[str] | None,
    client_key: str | os.PathLike[str] | None,
) -> grpc.ChannelCredentials | None:
    """Returns None without TLS. Raises InvalidArgument."""
    pair = {"client_cert": client_cert, "client_key": client_key}
    missing = [name for name, path in pair.items() if path is None]
    if len(missing) == 1:
        raise InvalidArgument.because(missing[0], "client_cert and client_key go together")
    if tls is False:
        if not missing:
            raise InvalidArgument.because("tls", "client_cert needs TLS; set tls too")
        return None
    roots = None if tls is True else tls if isinstance(tls, bytes) else _read("tls", tls)
    chain, key = (None if path is None else _read(name, path) for name, path in pair.items())
    return grpc.ssl_channel_credentials(roots, key, chain)


def _read(field: str, path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file. Raises InvalidArgument."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument.because(field, f"cannot read {path}: {error.strerror}") from error

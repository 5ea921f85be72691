"""Client: the blocking client."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Self, Unpack

import grpc

from adaplex.client import _health, _wire
from adaplex.client._connection import CallOptions, Connection
from adaplex.client._defaults import DEFAULT_TIMEOUT
from adaplex.client._stream import StreamState
from adaplex.client._transport import Transport
from adaplex.client.adapters import Adapters
from adaplex.client.errors import AdaplexClientError, translate_errors
from adaplex.client.generation_types import GenerateOptions, Generation, GenerationEvent, Prompt
from adaplex.client.types import Health, ServerInfo
from adaplex.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)


class Client:
    """The blocking client of one server. Thread-safe; close it, or use it in `with`.

    `target`: host:port; by default `ADAPLEX_TARGET`, else 127.0.0.1:50051.
    `timeout`: seconds of a call that sets none of its own; None waits without a bound.
    `token`: sent as a bearer token.
    `metadata`: sent with every call, printable ASCII.
    `actor`: the caller's self-reported identity, recorded in adapter history; 1 to 128 characters.
    `tls`: True trusts the system's roots; PEM roots can be given as bytes or as a file's path.
    `client_cert`, `client_key`: PEM files by which a server with `tls_client_ca` knows the client.

    Every call raises AdaplexClientError if it fails (see `errors`), and InvalidArgument before
    sending for a value that its field cannot hold. Nothing is retried.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        token: str | None = None,
        metadata: Mapping[str, str] | None = None,
        actor: str | None = None,
        tls: bool | bytes | str | os.PathLike[str] = False,
        client_cert: str | os.PathLike[str] | None = None,
        client_key: str | os.PathLike[str] | None = None,
    ) -> None:
        self._transport = Transport(
            Connection.from_options(
                target,
                timeout=timeout,
                token=token,
                metadata=metadata,
                actor=actor,
                tls=tls,
                client_cert=client_cert,
                client_key=client_key,
            )
        )
        channel = self._transport.channel
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._server = server_pb2_grpc.ServerServiceStub(channel)
        self._health = channel.unary_unary(
            _health.METHOD,
            request_serializer=_health.encode,
            response_deserializer=_health.decode,
        )
        self.adapters = Adapters(self._transport)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Generates the whole answer to a prompt. GenerateOptions lists the keywords."""
        plan = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateRequest(spec=plan.spec)
        call = self._transport.connection.generation_options(plan)
        return _wire.generation(self._transport.call(self._generation.Generate, request, call))

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Starts a generation and returns the stream of its events. Keywords as for `generate`.

        The stream raises the errors of the call.
        """
        plan = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateStreamRequest(spec=plan.spec)
        call = self._transport.connection.generation_options(plan)
        return GenerationStream(
            self._transport.call(self._generation.GenerateStream, request, call), call
        )

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns the server's base model, capacity, load and limits."""
        request = server_pb2.GetServerInfoRequest()
        call = self._transport.connection.call_options(timeout=timeout)
        return _wire.server_info(self._transport.call(self._server.GetServerInfo, request, call))

    def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Returns the health of the server, or of one service by its full name.

        Raises NotFound for a service that the server does not know.
        """
        call = self._transport.connection.call_options(timeout=timeout)
        health: Health = self._transport.call(self._health, service, call)
        return health

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until the server is SERVING. Raises DeadlineExceeded after `timeout` seconds."""
        readiness = _health.Readiness(self._transport.connection.target, timeout)
        while not readiness.is_ready(self._check_health(readiness.remaining)):
            time.sleep(_health.POLL_SECONDS)

    def close(self) -> None:
        """Cancels all calls and closes the connection. Idempotent."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_health(self, timeout: float) -> Health | AdaplexClientError:
        call = self._transport.connection.call_options(timeout=timeout)
        try:
            health: Health = self._transport.call(self._health, "", call, wait_for_ready=True)
        except AdaplexClientError as error:
            return error
        return health


class GenerationStream(StreamState):
    """An iterator over the events of a generation: Started, Deltas, Finished.

    `close`, or the end of `with`, cancels the call if it has not ended. Raises AdaplexClientError
    if the call fails, Cancelled after `close`.
    """

    def __init__(
        self, events: grpc.CallIterator[generation_pb2.GenerateStreamResponse], call: CallOptions
    ) -> None:
        super().__init__(call.request_id)
        self._events = events

    def __iter__(self) -> Iterator[GenerationEvent]:
        return self

    def __next__(self) -> GenerationEvent:
        self._check_open()
        with translate_errors(self.request_id):
            for message in self._events:
                if event := self._received(message):
                    return event
        self._ended()
        raise StopIteration

    def close(self) -> None:
        """Cancels the call if it has not ended. Idempotent, and safe from any thread."""
        self._closed = True
        self._events.cancel()  # type: ignore[no-untyped-call]  # untyped in grpc-stubs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

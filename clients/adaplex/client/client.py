"""Client: the blocking client."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self, Unpack

import grpc

from adaplex.client import _health, _wire
from adaplex.client._connection import DEFAULT_TIMEOUT, Call, Connection
from adaplex.client._stream import StreamState
from adaplex.client._transport import Transport
from adaplex.client.adapters import Adapters
from adaplex.client.errors import AdaplexClientError, translated
from adaplex.client.generation_types import GenerateOptions, Generation, GenerationEvent, Prompt
from adaplex.client.types import Health, ServerInfo
from adaplex.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)


class Client:
    """Calls one server. Safe to use from several threads; close it, or use it in `with`.

    `target` is host:port, by default `ADAPLEX_TARGET` or 127.0.0.1:50051. `timeout` is in
    seconds, for every call that names none; None waits without bound. `token` is sent as a
    bearer token, `metadata` with every call, `actor` as who asks, for the history of adapters.
    `tls` is True for the system's roots, or PEM roots as bytes or as a file's path. Nothing is
    retried.
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
    ) -> None:
        self._transport = Transport(
            Connection.configured(
                target, timeout=timeout, token=token, metadata=metadata, actor=actor, tls=tls
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
        """Answers a prompt, whole. Keywords: see GenerateOptions and SamplingParams."""
        planned = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateRequest(spec=planned.spec)
        call = self._transport.connection.generation(planned)
        return _wire.generation(self._transport.call(self._generation.Generate, request, call))

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Answers a prompt event by event; the call starts at once. Keywords as `generate`."""
        planned = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateStreamRequest(spec=planned.spec)
        call = self._transport.connection.generation(planned)
        return GenerationStream(
            self._transport.call(self._generation.GenerateStream, request, call), call
        )

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is and how full it is."""
        request = server_pb2.GetServerInfoRequest()
        call = self._transport.connection.call(timeout=timeout)
        return _wire.server_info(self._transport.call(self._server.GetServerInfo, request, call))

    def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Whether the server, or one service by its full name, takes calls."""
        call = self._transport.connection.call(timeout=timeout)
        health: Health = self._transport.call(self._health, service, call)
        return health

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Returns once the server is healthy; DeadlineExceeded after `timeout` seconds."""
        readiness = _health.Readiness(self._transport.connection.target, timeout)
        while not readiness.ready(self._look(readiness.remaining)):
            time.sleep(_health.INTERVAL)

    def close(self) -> None:
        """Ends all calls and the connection. Idempotent."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _look(self, timeout: float) -> Health | AdaplexClientError:
        call = self._transport.connection.call(timeout=timeout)
        try:
            health: Health = self._transport.call(self._health, "", call, wait_for_ready=True)
        except AdaplexClientError as error:
            return error
        return health


class GenerationStream(StreamState):
    """Iterates over the events of one answer. Leaving `with`, or `close`, cancels what runs."""

    def __init__(
        self, events: grpc.CallIterator[generation_pb2.GenerateStreamResponse], call: Call
    ) -> None:
        super().__init__(call.request_id)
        self._events = events

    def __iter__(self) -> Iterator[GenerationEvent]:
        return self

    def __next__(self) -> GenerationEvent:
        self._check_open()
        with translated(self.request_id):
            for message in self._events:
                if event := self._received(message):
                    return event
        self._ended()
        raise StopIteration

    def close(self) -> None:
        """Cancels the call unless it has ended. Idempotent; may be called from any thread."""
        self._closed = True
        self._events.cancel()  # type: ignore[no-untyped-call]  # untyped in grpc-stubs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

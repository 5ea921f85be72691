"""AsyncClient: the asyncio client. The same surface as Client, and the same values."""
# ruff: noqa: ASYNC109 - a timeout here is the call's deadline, which the server must learn of

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from adaplex.client import _health, _wire
from adaplex.client._connection import DEFAULT_TIMEOUT, Call, Connection
from adaplex.client._stream import StreamState
from adaplex.client._transport import AsyncTransport
from adaplex.client.aio_adapters import AsyncAdapters
from adaplex.client.errors import AdaplexClientError, translated
from adaplex.client.generation_types import GenerateOptions, Generation, GenerationEvent, Prompt
from adaplex.client.types import Health, ServerInfo
from adaplex.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # absent from grpc-stubs


class AsyncClient:
    """Client for asyncio: the same options; make it inside a running loop, and close it.

    Cancelling a task that awaits a call cancels the call on the server too.
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
        self._transport = AsyncTransport(
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
        self.adapters = AsyncAdapters(self._transport)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Answers a prompt, whole. Keywords: see GenerateOptions and SamplingParams."""
        planned = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateRequest(spec=planned.spec)
        call = self._transport.connection.generation(planned)
        return _wire.generation(
            await self._transport.call(self._generation.Generate, request, call)
        )

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerationStream:
        """Answers a prompt event by event; the call starts at once. Keywords as `generate`."""
        planned = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateStreamRequest(spec=planned.spec)
        call = self._transport.connection.generation(planned)
        return AsyncGenerationStream(
            self._transport.start(self._generation.GenerateStream, request, call), call
        )

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is and how full it is."""
        request = server_pb2.GetServerInfoRequest()
        call = self._transport.connection.call(timeout=timeout)
        return _wire.server_info(
            await self._transport.call(self._server.GetServerInfo, request, call)
        )

    async def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Whether the server, or one service by its full name, takes calls."""
        call = self._transport.connection.call(timeout=timeout)
        health: Health = await self._transport.call(self._health, service, call)
        return health

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Returns once the server is healthy; DeadlineExceeded after `timeout` seconds."""
        readiness = _health.Readiness(self._transport.connection.target, timeout)
        # Asks again and again: the other end is a server, which sets no event here.
        while not readiness.ready(await self._look(readiness.remaining)):  # noqa: ASYNC110
            await asyncio.sleep(_health.INTERVAL)

    async def close(self) -> None:
        """Ends all calls and the connection. Idempotent."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _look(self, timeout: float) -> Health | AdaplexClientError:
        call = self._transport.connection.call(timeout=timeout)
        try:
            health: Health = await self._transport.call(self._health, "", call, wait_for_ready=True)
        except AdaplexClientError as error:
            return error
        return health


class AsyncGenerationStream(StreamState):
    """Iterates over the events of one answer. Leaving `async with`, or `close`, cancels it."""

    def __init__(self, events: Any, call: Call) -> None:
        super().__init__(call.request_id)
        self._events = events

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        return self

    async def __anext__(self) -> GenerationEvent:
        self._check_open()
        with translated(self.request_id):
            while (message := await self._read()) is not _EOF:
                if event := self._received(message):
                    return event
        self._ended()
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancels the call unless it has ended. Idempotent."""
        self._closed = True
        self._events.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _read(self) -> Any:
        try:
            return await self._events.read()
        except asyncio.CancelledError:
            # grpc raises it for a call that `close` ended as well as for this task's own end.
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                self._check_open()
            raise

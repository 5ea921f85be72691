"""AsyncClient: the asyncio client, with the methods and values of Client."""
# ruff: noqa: ASYNC109 - a timeout here is the call's deadline, which grpc sends to the server

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from adaplex.client import _health, _wire
from adaplex.client._connection import CallOptions, Connection
from adaplex.client._defaults import DEFAULT_TIMEOUT
from adaplex.client._stream import StreamState
from adaplex.client._transport import AsyncTransport
from adaplex.client.aio_adapters import AsyncAdapters
from adaplex.client.errors import AdaplexClientError, translate_errors
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
    """The client for asyncio, with the options and errors of Client.

    Create it inside a running event loop, and close it or use it in `async with`. Cancelling a task
    that awaits a call cancels the call on the server too.
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
        self._transport = AsyncTransport(
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
        self.adapters = AsyncAdapters(self._transport)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Generates the whole answer to a prompt. GenerateOptions lists the keywords."""
        plan = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateRequest(spec=plan.spec)
        call = self._transport.connection.generation_options(plan)
        return _wire.generation(
            await self._transport.call(self._generation.Generate, request, call)
        )

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerationStream:
        """Starts a generation and returns the stream of its events. Keywords as for `generate`.

        The stream raises the errors of the call.
        """
        plan = _wire.generation_call(prompt, **options)
        request = generation_pb2.GenerateStreamRequest(spec=plan.spec)
        call = self._transport.connection.generation_options(plan)
        return AsyncGenerationStream(
            self._transport.start(self._generation.GenerateStream, request, call), call
        )

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns the server's base model, capacity, load and limits."""
        request = server_pb2.GetServerInfoRequest()
        call = self._transport.connection.call_options(timeout=timeout)
        return _wire.server_info(
            await self._transport.call(self._server.GetServerInfo, request, call)
        )

    async def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Returns the health of the server, or of one service by its full name.

        Raises NotFound for a service that the server does not know.
        """
        call = self._transport.connection.call_options(timeout=timeout)
        health: Health = await self._transport.call(self._health, service, call)
        return health

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until the server is SERVING. Raises DeadlineExceeded after `timeout` seconds."""
        readiness = _health.Readiness(self._transport.connection.target, timeout)
        # Polls: a server sets no asyncio.Event.
        while not readiness.is_ready(await self._check_health(readiness.remaining)):  # noqa: ASYNC110
            await asyncio.sleep(_health.POLL_SECONDS)

    async def close(self) -> None:
        """Cancels all calls and closes the connection. Idempotent."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _check_health(self, timeout: float) -> Health | AdaplexClientError:
        call = self._transport.connection.call_options(timeout=timeout)
        try:
            health: Health = await self._transport.call(self._health, "", call, wait_for_ready=True)
        except AdaplexClientError as error:
            return error
        return health


class AsyncGenerationStream(StreamState):
    """An asynchronous iterator over the events of a generation: Started, Deltas, Finished.

    `close`, or the end of `async with`, cancels the call if it has not ended. Raises
    AdaplexClientError if the call fails, Cancelled after `close`.
    """

    def __init__(self, events: Any, call: CallOptions) -> None:
        super().__init__(call.request_id)
        self._events = events

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        return self

    async def __anext__(self) -> GenerationEvent:
        self._check_open()
        with translate_errors(self.request_id):
            while (message := await self._read()) is not _EOF:
                if event := self._received(message):
                    return event
        self._ended()
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancels the call if it has not ended. Idempotent."""
        self._closed = True
        self._events.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read(self) -> Any:
        try:
            return await self._events.read()
        except asyncio.CancelledError:
            # grpc raises it for a call cancelled by `close` and for a cancelled task alike.
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                self._check_open()
            raise

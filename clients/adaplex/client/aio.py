"""AsyncClient: the asyncio client. The same surface as Client, and the same values."""
# ruff: noqa: ASYNC109 - a timeout here is the call's deadline, which the server must learn of

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from adaplex.client import _adapter_calls, _health, _wire
from adaplex.client._adapter_calls import AdapterCall, Targets
from adaplex.client._connection import CHANNEL_OPTIONS, DEFAULT_TIMEOUT, Call, Connection
from adaplex.client._stream import StreamState
from adaplex.client.adapter_types import (
    Adapter,
    AdapterDetails,
    AdapterEvent,
    MergeOptions,
    UploadResult,
    Validation,
)
from adaplex.client.errors import AdaplexClientError, translated
from adaplex.client.types import (
    GenerateOptions,
    Generation,
    GenerationEvent,
    Health,
    Prompt,
    ServerInfo,
)
from adaplex.client.upload import AdapterFiles, Messages, Progress
from adaplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

T = TypeVar("T")
R = TypeVar("R")

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
        self._transport = _Transport(
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


class AsyncAdapters:
    """The life of adapters on the server; `client.adapters`. As Adapters, for asyncio."""

    def __init__(self, transport: _Transport) -> None:
        self._transport = transport
        self._stub = adapters_pb2_grpc.AdapterServiceStub(transport.channel)

    @cached_property
    def _uploads(self) -> adapters_pb2_grpc.AdapterServiceStub:
        """A stub on grpc's blocking stack, whose threads read the files and write the chunks.

        When a server refuses in the middle of an upload, grpc.aio reports the write that failed
        instead of the server's answer.
        """
        return adapters_pb2_grpc.AdapterServiceStub(self._transport.blocking_channel)

    async def upload(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> UploadResult:
        """Sends a PEFT adapter directory. A taken name needs `replace` to get a new version."""
        files = await asyncio.to_thread(AdapterFiles.read, directory)
        messages = files.messages(
            adapters_pb2.UploadAdapterRequest, name, replace=replace, progress=progress
        )
        response = await self._send(self._uploads.UploadAdapter, messages, timeout)
        return _adapter_calls.upload_result(response)

    async def validate(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = "adapter",
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Validation:
        """Sends a directory for a dry run: the report of an upload, and nothing stored."""
        files = await asyncio.to_thread(AdapterFiles.read, directory)
        messages = files.messages(adapters_pb2.ValidateAdapterRequest, name, progress=progress)
        return _adapter_calls.validation(
            await self._send(self._uploads.ValidateAdapter, messages, timeout)
        )

    async def load(
        self, name: str, uri: str, *, replace: bool = False, timeout: float | None = None
    ) -> UploadResult:
        """Has the server import a directory or GGUF file: a path under its allowed roots,
        `hf://org/repo[/folder][@revision]` or `s3://bucket/prefix`.
        """
        return await self._ask(_adapter_calls.load(name, uri, replace), timeout)

    async def merge(
        self,
        name: str,
        sources: Mapping[str, float] | Sequence[tuple[str, float]],
        *,
        replace: bool = False,
        timeout: float | None = None,
        **options: Unpack[MergeOptions],
    ) -> UploadResult:
        """Makes an adapter out of stored ones, by selector and weight. Keywords: MergeOptions."""
        return await self._ask(_adapter_calls.merge(name, sources, replace, **options), timeout)

    async def get(self, name: str, *, timeout: float | None = None) -> AdapterDetails:
        """One adapter, by any selector, its report, and the versions of its name."""
        return await self._ask(_adapter_calls.get(name), timeout)

    async def list(
        self,
        *,
        name_prefix: str = "",
        labels: Mapping[str, str] | None = None,
        family: str = "",
        order_by: str = "",
        page_size: int = 100,
        timeout: float | None = None,
    ) -> AsyncIterator[Adapter]:
        """The newest version of every adapter that fits; asks for a page when it is needed.

        `order_by` is name, create_time, update_time or stored_bytes, then ` desc` or nothing.
        """
        token = ""
        while True:
            call = _adapter_calls.page(
                page_size=page_size,
                page_token=token,
                name_prefix=name_prefix,
                labels=labels,
                family=family,
                order_by=order_by,
            )
            page, token = await self._ask(call, timeout)
            for adapter in page:
                yield adapter
            if not token:
                return

    async def history(self, name: str, *, timeout: float | None = None) -> tuple[AdapterEvent, ...]:
        """What happened to a name, newest first; also of a deleted one."""
        return await self._ask(_adapter_calls.history(name), timeout)

    async def update(
        self,
        name: str,
        *,
        description: str | None = None,
        set_labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        pinned: bool | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Changes what is given; `pinned` keeps the adapter in device memory."""
        call = _adapter_calls.update(
            name,
            description=description,
            set_labels=set_labels,
            remove_labels=remove_labels,
            pinned=pinned,
        )
        return await self._ask(call, timeout)

    async def set_alias(
        self, name: str, alias: str, targets: Targets, *, timeout: float | None = None
    ) -> Adapter:
        """Points an alias to a version, or to several by share: `{3: 95, 4: 5}`.

        The bare name follows the alias `default`.
        """
        return await self._ask(_adapter_calls.set_alias(name, alias, targets), timeout)

    async def delete_alias(self, name: str, alias: str, *, timeout: float | None = None) -> Adapter:
        """Forgets an alias."""
        return await self._ask(_adapter_calls.delete_alias(name, alias), timeout)

    async def rollback(
        self, name: str, alias: str = "default", *, timeout: float | None = None
    ) -> Adapter:
        """Points an alias to what it pointed to before its last change."""
        return await self._ask(_adapter_calls.rollback(name, alias), timeout)

    async def unload(self, name: str, *, timeout: float | None = None) -> bool:
        """Drops an adapter from memory; it stays stored. Whether it was in memory."""
        return await self._ask(_adapter_calls.unload(name), timeout)

    async def delete(self, name: str, *, timeout: float | None = None) -> int:
        """Forgets a name and all its versions, or `name@version`. How many versions went."""
        return await self._ask(_adapter_calls.delete(name), timeout)

    async def _ask(self, call: AdapterCall[T], timeout: float | None) -> T:
        method = getattr(self._stub, call.method)
        return call.read(await self._call(method, call.request, timeout))

    async def _call(
        self, method: Callable[..., Awaitable[R]], request: object, timeout: float | None
    ) -> R:
        call = self._transport.connection.call(timeout=timeout)
        return await self._transport.call(method, request, call)

    async def _send(
        self,
        method: grpc.StreamUnaryMultiCallable[T, R],
        messages: Messages[T],
        timeout: float | None,
    ) -> R:
        info = self._transport.connection.call(timeout=timeout)
        ended, loop = asyncio.Event(), asyncio.get_running_loop()

        def end(_: object) -> None:
            loop.call_soon_threadsafe(ended.set)

        with messages.failing_first(), translated(info.request_id):
            call = self._transport.start(method.future, messages, info)
            call.add_done_callback(end)
            try:
                await ended.wait()
            except asyncio.CancelledError:
                call.cancel()  # type: ignore[no-untyped-call]  # untyped in grpc-stubs
                await ended.wait()
                raise
            return call.result()


class _Transport:
    """The channel, and how a call is made on it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        target, credentials = connection.target, connection.credentials
        self.channel = (
            grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, CHANNEL_OPTIONS)
        )
        self._closed = False

    @cached_property
    def blocking_channel(self) -> grpc.Channel:
        return self.connection.blocking_channel()

    def start(self, method: Callable[..., R], request: object, call: Call, **how: Any) -> R:
        """Begins a call; what it returns is awaited, or read, by the caller."""
        if self._closed:
            raise RuntimeError("the client is closed")
        return method(request, timeout=call.timeout, metadata=call.metadata, **how)

    async def call(
        self, method: Callable[..., Awaitable[R]], request: object, call: Call, **how: Any
    ) -> R:
        with translated(call.request_id):
            return await self.start(method, request, call, **how)

    async def close(self) -> None:
        self._closed = True
        if "blocking_channel" in vars(self):
            self.blocking_channel.close()
        await self.channel.close(None)

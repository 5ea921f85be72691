"""Client: the blocking client."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from adaplex.client import _adapter_calls, _health, _wire
from adaplex.client._adapter_calls import AdapterCall, Targets
from adaplex.client._connection import DEFAULT_TIMEOUT, Call, Connection
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


class Adapters:
    """The life of adapters on the server; `client.adapters`.

    `timeout` is in seconds, None takes the client's.
    """

    def __init__(self, transport: _Transport) -> None:
        self._transport = transport
        self._stub = adapters_pb2_grpc.AdapterServiceStub(transport.channel)

    def upload(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> UploadResult:
        """Sends a PEFT adapter directory. A taken name needs `replace` to get a new version."""
        messages = AdapterFiles.read(directory).messages(
            adapters_pb2.UploadAdapterRequest, name, replace=replace, progress=progress
        )
        return _adapter_calls.upload_result(self._send(self._stub.UploadAdapter, messages, timeout))

    def validate(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = "adapter",
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Validation:
        """Sends a directory for a dry run: the report of an upload, and nothing stored."""
        messages = AdapterFiles.read(directory).messages(
            adapters_pb2.ValidateAdapterRequest, name, progress=progress
        )
        return _adapter_calls.validation(self._send(self._stub.ValidateAdapter, messages, timeout))

    def load(
        self, name: str, uri: str, *, replace: bool = False, timeout: float | None = None
    ) -> UploadResult:
        """Has the server import a directory or GGUF file: a path under its allowed roots,
        `hf://org/repo[/folder][@revision]` or `s3://bucket/prefix`.
        """
        return self._ask(_adapter_calls.load(name, uri, replace), timeout)

    def merge(
        self,
        name: str,
        sources: Mapping[str, float] | Sequence[tuple[str, float]],
        *,
        replace: bool = False,
        timeout: float | None = None,
        **options: Unpack[MergeOptions],
    ) -> UploadResult:
        """Makes an adapter out of stored ones, by selector and weight. Keywords: MergeOptions."""
        return self._ask(_adapter_calls.merge(name, sources, replace, **options), timeout)

    def get(self, name: str, *, timeout: float | None = None) -> AdapterDetails:
        """One adapter, by any selector, its report, and the versions of its name."""
        return self._ask(_adapter_calls.get(name), timeout)

    def list(
        self,
        *,
        name_prefix: str = "",
        labels: Mapping[str, str] | None = None,
        family: str = "",
        order_by: str = "",
        page_size: int = 100,
        timeout: float | None = None,
    ) -> Iterator[Adapter]:
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
            page, token = self._ask(call, timeout)
            yield from page
            if not token:
                return

    def history(self, name: str, *, timeout: float | None = None) -> tuple[AdapterEvent, ...]:
        """What happened to a name, newest first; also of a deleted one."""
        return self._ask(_adapter_calls.history(name), timeout)

    def update(
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
        return self._ask(call, timeout)

    def set_alias(
        self, name: str, alias: str, targets: Targets, *, timeout: float | None = None
    ) -> Adapter:
        """Points an alias to a version, or to several by share: `{3: 95, 4: 5}`.

        The bare name follows the alias `default`.
        """
        return self._ask(_adapter_calls.set_alias(name, alias, targets), timeout)

    def delete_alias(self, name: str, alias: str, *, timeout: float | None = None) -> Adapter:
        """Forgets an alias."""
        return self._ask(_adapter_calls.delete_alias(name, alias), timeout)

    def rollback(
        self, name: str, alias: str = "default", *, timeout: float | None = None
    ) -> Adapter:
        """Points an alias to what it pointed to before its last change."""
        return self._ask(_adapter_calls.rollback(name, alias), timeout)

    def unload(self, name: str, *, timeout: float | None = None) -> bool:
        """Drops an adapter from memory; it stays stored. Whether it was in memory."""
        return self._ask(_adapter_calls.unload(name), timeout)

    def delete(self, name: str, *, timeout: float | None = None) -> int:
        """Forgets a name and all its versions, or `name@version`. How many versions went."""
        return self._ask(_adapter_calls.delete(name), timeout)

    def _ask(self, call: AdapterCall[T], timeout: float | None) -> T:
        method = getattr(self._stub, call.method)
        return call.read(self._call(method, call.request, timeout))

    def _call(self, method: Callable[..., R], request: object, timeout: float | None) -> R:
        call = self._transport.connection.call(timeout=timeout)
        return self._transport.call(method, request, call)

    def _send(self, method: Callable[..., R], messages: Messages[T], timeout: float | None) -> R:
        with messages.failing_first():
            return self._call(method, messages, timeout)


class _Transport:
    """The channel, and how a call is made on it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel = connection.blocking_channel()
        self._closed = False

    def call(self, method: Callable[..., R], request: object, call: Call, **how: Any) -> R:
        if self._closed:
            raise RuntimeError("the client is closed")
        with translated(call.request_id):
            return method(request, timeout=call.timeout, metadata=call.metadata, **how)

    def close(self) -> None:
        self._closed = True
        self.channel.close()

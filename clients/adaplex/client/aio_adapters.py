"""AsyncAdapters: the calls of AdapterService, for asyncio. The same surface as Adapters."""
# ruff: noqa: ASYNC109 - a timeout here is the call's deadline, which the server must learn of

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar, Unpack

import grpc

from adaplex.client import _adapter_calls
from adaplex.client._adapter_calls import AdapterCall, Targets
from adaplex.client._transport import AsyncTransport
from adaplex.client.adapter_types import (
    Adapter,
    AdapterDetails,
    AdapterEvent,
    MergeOptions,
    UploadResult,
    Validation,
    Weighted,
)
from adaplex.client.errors import translated
from adaplex.client.upload import AdapterFiles, Messages, Progress
from adaplex.v1 import adapters_pb2, adapters_pb2_grpc

T = TypeVar("T")
R = TypeVar("R")


class AsyncAdapters:
    """The life of adapters on the server; `client.adapters`. As Adapters, for asyncio."""

    def __init__(self, transport: AsyncTransport) -> None:
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
        sources: Weighted,
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

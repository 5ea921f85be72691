"""AsyncAdapters: AdapterService, for asyncio, with the methods of Adapters."""
# ruff: noqa: ASYNC109 - a timeout here is the call's deadline, which grpc sends to the server

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
from adaplex.client.errors import translate_errors
from adaplex.client.upload import AdapterFiles, ProgressCallback, UploadMessages
from adaplex.v1 import adapters_pb2, adapters_pb2_grpc

T = TypeVar("T")
R = TypeVar("R")


class AsyncAdapters:
    """The adapters of the server, as `client.adapters`; see Adapters."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._stub = adapters_pb2_grpc.AdapterServiceStub(transport.channel)

    @cached_property
    def _uploads(self) -> adapters_pb2_grpc.AdapterServiceStub:
        """A stub on grpc's blocking API, whose threads read the files and send the chunks.

        If a server refuses an upload before its end, grpc.aio reports the write that failed
        instead of the server's status.
        """
        return adapters_pb2_grpc.AdapterServiceStub(self._transport.blocking_channel)

    async def upload(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        replace: bool = False,
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> UploadResult:
        """Uploads an adapter directory: adapter_config.json, adapter_model.safetensors and, where
        there is one, model.sig.

        With `replace` an existing name gets a new version, and running requests finish on the old
        one. `progress` is called with bytes sent and bytes in total. Raises AlreadyExists without
        `replace` if the name exists with other content, InvalidArgument if a file is missing or the
        server cannot serve the adapter.
        """
        files = await asyncio.to_thread(AdapterFiles.read, directory)
        messages = files.messages(
            adapters_pb2.UploadAdapterRequest, name, replace=replace, progress=progress
        )
        response = await self._send(self._uploads.UploadAdapter, messages, timeout)
        return _adapter_calls.upload_result(response, files.warnings)

    async def validate(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str = "adapter",
        progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> Validation:
        """Uploads an adapter directory for a dry run: returns the report of an upload and stores
        nothing.
        """
        files = await asyncio.to_thread(AdapterFiles.read, directory)
        messages = files.messages(adapters_pb2.ValidateAdapterRequest, name, progress=progress)
        response = await self._send(self._uploads.ValidateAdapter, messages, timeout)
        return _adapter_calls.validation(response, files.warnings)

    async def load(
        self, name: str, uri: str, *, replace: bool = False, timeout: float | None = None
    ) -> UploadResult:
        """Imports a directory or GGUF file that the server can read: a path under its allowed
        roots, `hf://org/repo[/folder][@revision]` or `s3://bucket/prefix`.

        `replace` and errors as for `upload`.
        """
        return await self._invoke(_adapter_calls.load(name, uri, replace), timeout)

    async def merge(
        self,
        name: str,
        sources: Weighted,
        *,
        replace: bool = False,
        timeout: float | None = None,
        **options: Unpack[MergeOptions],
    ) -> UploadResult:
        """Merges 1 to 8 stored adapters, by selector and weight, into a new one.

        MergeOptions lists the keywords. `replace` and errors as for `upload`.
        """
        return await self._invoke(_adapter_calls.merge(name, sources, replace, **options), timeout)

    async def get(self, name: str, *, timeout: float | None = None) -> AdapterDetails:
        """Returns one adapter, its report and the versions of its name, oldest first.

        `name` is a selector: `name`, `name@version`, `name@alias` or `sha256:<64 hex digits>`.
        """
        return await self._invoke(_adapter_calls.get(name), timeout)

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
        """Yields the newest version of every adapter that passes all filters given.

        `labels` must be present with exactly these values. `order_by` is `name` (the default),
        `create_time`, `update_time` or `stored_bytes`, optionally with ` desc` after it. Pages of
        `page_size` adapters (1 to 1000) are requested as they are needed.
        """
        token = ""
        while True:
            call = _adapter_calls.list_page(
                page_size=page_size,
                page_token=token,
                name_prefix=name_prefix,
                labels=labels,
                family=family,
                order_by=order_by,
            )
            page, token = await self._invoke(call, timeout)
            for adapter in page:
                yield adapter
            if not token:
                return

    async def history(self, name: str, *, timeout: float | None = None) -> tuple[AdapterEvent, ...]:
        """Returns the last changes of a name, at most 500, newest first; also of a deleted name."""
        return await self._invoke(_adapter_calls.history(name), timeout)

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
        """Changes what is given and returns the adapter; None leaves a field as it is.

        `pinned` keeps the adapter in device memory, within the server's bound for all pins.
        """
        call = _adapter_calls.update(
            name,
            description=description,
            set_labels=set_labels,
            remove_labels=remove_labels,
            pinned=pinned,
        )
        return await self._invoke(call, timeout)

    async def set_alias(
        self, name: str, alias: str, targets: Targets, *, timeout: float | None = None
    ) -> Adapter:
        """Points an alias to a version, or to 1 to 8 versions by share: `{3: 95, 4: 5}`.

        A bare name follows its alias `default`, and without one its newest version.
        """
        return await self._invoke(_adapter_calls.set_alias(name, alias, targets), timeout)

    async def delete_alias(self, name: str, alias: str, *, timeout: float | None = None) -> Adapter:
        """Deletes an alias. Raises NotFound if there is none."""
        return await self._invoke(_adapter_calls.delete_alias(name, alias), timeout)

    async def rollback(
        self, name: str, alias: str = "default", *, timeout: float | None = None
    ) -> Adapter:
        """Restores the targets that an alias had before its last change."""
        return await self._invoke(_adapter_calls.rollback(name, alias), timeout)

    async def unload(self, name: str, *, timeout: float | None = None) -> bool:
        """Evicts an adapter from memory; it stays stored. Returns True if it was in memory."""
        return await self._invoke(_adapter_calls.unload(name), timeout)

    async def delete(self, name: str, *, timeout: float | None = None) -> int:
        """Deletes a name and all its versions, or one version by `name@version`.

        Returns the number of deleted versions. Running requests finish.
        """
        return await self._invoke(_adapter_calls.delete(name), timeout)

    async def _invoke(self, call: AdapterCall[T], timeout: float | None) -> T:
        method = getattr(self._stub, call.method)
        return call.read(await self._call(method, call.request, timeout))

    async def _call(
        self, method: Callable[..., Awaitable[R]], request: object, timeout: float | None
    ) -> R:
        call = self._transport.connection.call_options(timeout=timeout)
        return await self._transport.call(method, request, call)

    async def _send(
        self,
        method: grpc.StreamUnaryMultiCallable[T, R],
        messages: UploadMessages[T],
        timeout: float | None,
    ) -> R:
        info = self._transport.connection.call_options(timeout=timeout)
        ended, loop = asyncio.Event(), asyncio.get_running_loop()

        def end(_: object) -> None:
            loop.call_soon_threadsafe(ended.set)

        with messages.raise_own_error(), translate_errors(info.request_id):
            call = self._transport.start(method.future, messages, info)
            call.add_done_callback(end)
            try:
                await ended.wait()
            except asyncio.CancelledError:
                call.cancel()  # type: ignore[no-untyped-call]  # untyped in grpc-stubs
                await ended.wait()
                raise
            return call.result()

"""Adapters: the calls of AdapterService, blocking."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar, Unpack

from adaplex.client import _adapter_calls
from adaplex.client._adapter_calls import AdapterCall, Targets
from adaplex.client._transport import Transport
from adaplex.client.adapter_types import (
    Adapter,
    AdapterDetails,
    AdapterEvent,
    MergeOptions,
    UploadResult,
    Validation,
    Weighted,
)
from adaplex.client.upload import AdapterFiles, Messages, Progress
from adaplex.v1 import adapters_pb2, adapters_pb2_grpc

T = TypeVar("T")
R = TypeVar("R")


class Adapters:
    """The life of adapters on the server; `client.adapters`.

    `timeout` is in seconds, None takes the client's.
    """

    def __init__(self, transport: Transport) -> None:
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
        sources: Weighted,
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

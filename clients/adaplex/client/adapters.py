"""Adapters: AdapterService, blocking."""

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
from adaplex.client.upload import AdapterFiles, ProgressCallback, UploadMessages
from adaplex.v1 import adapters_pb2, adapters_pb2_grpc

T = TypeVar("T")
R = TypeVar("R")


class Adapters:
    """The adapters of the server, as `client.adapters`.

    `timeout` is in seconds; None selects the client's. Every method raises AdaplexClientError, and
    InvalidArgument for a value that its field cannot hold.
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
        files = AdapterFiles.read(directory)
        messages = files.messages(
            adapters_pb2.UploadAdapterRequest, name, replace=replace, progress=progress
        )
        response = self._send(self._stub.UploadAdapter, messages, timeout)
        return _adapter_calls.upload_result(response, files.warnings)

    def validate(
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
        files = AdapterFiles.read(directory)
        messages = files.messages(adapters_pb2.ValidateAdapterRequest, name, progress=progress)
        response = self._send(self._stub.ValidateAdapter, messages, timeout)
        return _adapter_calls.validation(response, files.warnings)

    def load(
        self, name: str, uri: str, *, replace: bool = False, timeout: float | None = None
    ) -> UploadResult:
        """Imports a directory or GGUF file that the server can read: a path under its allowed
        roots, `hf://org/repo[/folder][@revision]` or `s3://bucket/prefix`.

        `replace` and errors as for `upload`.
        """
        return self._invoke(_adapter_calls.load(name, uri, replace), timeout)

    def merge(
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
        return self._invoke(_adapter_calls.merge(name, sources, replace, **options), timeout)

    def get(self, name: str, *, timeout: float | None = None) -> AdapterDetails:
        """Returns one adapter, its report and the versions of its name, oldest first.

        `name` is a selector: `name`, `name@version`, `name@alias` or `sha256:<64 hex digits>`.
        """
        return self._invoke(_adapter_calls.get(name), timeout)

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
            page, token = self._invoke(call, timeout)
            yield from page
            if not token:
                return

    def history(self, name: str, *, timeout: float | None = None) -> tuple[AdapterEvent, ...]:
        """Returns the last changes of a name, at most 500, newest first; also of a deleted name."""
        return self._invoke(_adapter_calls.history(name), timeout)

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
        return self._invoke(call, timeout)

    def set_alias(
        self, name: str, alias: str, targets: Targets, *, timeout: float | None = None
    ) -> Adapter:
        """Points an alias to a version, or to 1 to 8 versions by share: `{3: 95, 4: 5}`.

        A bare name follows its alias `default`, and without one its newest version.
        """
        return self._invoke(_adapter_calls.set_alias(name, alias, targets), timeout)

    def delete_alias(self, name: str, alias: str, *, timeout: float | None = None) -> Adapter:
        """Deletes an alias. Raises NotFound if there is none."""
        return self._invoke(_adapter_calls.delete_alias(name, alias), timeout)

    def rollback(
        self, name: str, alias: str = "default", *, timeout: float | None = None
    ) -> Adapter:
        """Restores the targets that an alias had before its last change."""
        return self._invoke(_adapter_calls.rollback(name, alias), timeout)

    def unload(self, name: str, *, timeout: float | None = None) -> bool:
        """Evicts an adapter from memory; it stays stored. Returns True if it was in memory."""
        return self._invoke(_adapter_calls.unload(name), timeout)

    def delete(self, name: str, *, timeout: float | None = None) -> int:
        """Deletes a name and all its versions, or one version by `name@version`.

        Returns the number of deleted versions. Running requests finish.
        """
        return self._invoke(_adapter_calls.delete(name), timeout)

    def _invoke(self, call: AdapterCall[T], timeout: float | None) -> T:
        method = getattr(self._stub, call.method)
        return call.read(self._call(method, call.request, timeout))

    def _call(self, method: Callable[..., R], request: object, timeout: float | None) -> R:
        call = self._transport.connection.call_options(timeout=timeout)
        return self._transport.call(method, request, call)

    def _send(
        self, method: Callable[..., R], messages: UploadMessages[T], timeout: float | None
    ) -> R:
        with messages.raise_own_error():
            return self._call(method, messages, timeout)

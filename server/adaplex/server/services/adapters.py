"""AdapterService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from adaplex.adapters.catalog import AdapterRecord
from adaplex.adapters.registry import AdapterRegistry
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.errors import RequestInvalid
from adaplex.server import convert
from adaplex.server.blocking import in_thread
from adaplex.server.calls import current_call
from adaplex.server.upload import Receiver
from adaplex.v1 import adapters_pb2_grpc
from adaplex.v1.adapters_pb2 import (
    Adapter,
    DeleteAdapterRequest,
    DeleteAdapterResponse,
    GetAdapterRequest,
    GetAdapterResponse,
    ListAdaptersRequest,
    ListAdaptersResponse,
    LoadAdapterRequest,
    LoadAdapterResponse,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
    UploadAdapterRequest,
    UploadAdapterResponse,
    ValidateAdapterRequest,
    ValidateAdapterResponse,
)

MAX_LOGGED = 200
"""Characters of a name that a client sent, known to us or not."""


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """The life of adapters. Everything that reads or writes a disk runs in a thread."""

    def __init__(
        self,
        registry: AdapterRegistry,
        engine: AsyncEngine,
        receiver: Receiver,
        roots: tuple[Path, ...],
    ) -> None:
        self._registry, self._engine = registry, engine
        self._receiver, self._roots = receiver, roots

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[UploadAdapterRequest], context: Any
    ) -> UploadAdapterResponse:
        """Stores what it receives under a name."""
        async with self._receiver.receive(request_iterator) as got:
            _note(got.name)
            done = await in_thread(
                self._registry.commit, got.staging, got.name, replace=got.replace
            )
        return UploadAdapterResponse(
            adapter=self._adapter(done.record),
            report=convert.report(done.report),
            created=done.created,
        )

    async def ValidateAdapter(
        self, request_iterator: AsyncIterator[ValidateAdapterRequest], context: Any
    ) -> ValidateAdapterResponse:
        """Reports on what it receives and drops it."""
        async with self._receiver.receive(request_iterator) as got:
            report = await in_thread(self._registry.check, got.staging)
        return ValidateAdapterResponse(valid=not report.refusals, report=convert.report(report))

    async def LoadAdapter(self, request: LoadAdapterRequest, context: Any) -> LoadAdapterResponse:
        """Stores a directory that the server can read."""
        _note(request.name)
        self._registry.check_name(request.name)
        replace = convert.replaces("policy", request.policy)
        async with self._receiver.slot():
            path = await in_thread(allowed_path, request.uri, self._roots)
            done = await in_thread(
                self._registry.import_directory,
                path,
                request.name,
                replace=replace,
                roots=self._roots,
            )
        return LoadAdapterResponse(
            adapter=self._adapter(done.record),
            report=convert.report(done.report),
            created=done.created,
        )

    async def GetAdapter(self, request: GetAdapterRequest, context: Any) -> GetAdapterResponse:
        """One adapter and its report."""
        _note(request.name)
        record = await in_thread(self._registry.get, request.name)
        report = await in_thread(self._registry.report, record.digest)
        return GetAdapterResponse(adapter=self._adapter(record), report=convert.report(report))

    async def ListAdapters(
        self, request: ListAdaptersRequest, context: Any
    ) -> ListAdaptersResponse:
        """A page of adapters by name."""
        size, after = convert.page(request)
        records = await in_thread(self._registry.list, limit=size + 1, after=after)
        page, more = records[:size], len(records) > size
        return ListAdaptersResponse(
            adapters=map(self._adapter, page), next_page_token=page[-1].name if more else ""
        )

    async def UnloadAdapter(
        self, request: UnloadAdapterRequest, context: Any
    ) -> UnloadAdapterResponse:
        """Frees the adapter's memory once running requests are done."""
        _note(request.name)
        record = await in_thread(self._registry.get, request.name)
        return UnloadAdapterResponse(was_resident=await self._engine.unload(record.digest))

    async def DeleteAdapter(
        self, request: DeleteAdapterRequest, context: Any
    ) -> DeleteAdapterResponse:
        """Forgets a name, and frees the memory of contents that no other name points to."""
        _note(request.name)
        deleted = await in_thread(self._registry.delete, request.name)
        for digest in deleted.digests:
            await self._engine.unload(digest)
        return DeleteAdapterResponse(versions_deleted=deleted.versions)

    def _adapter(self, record: AdapterRecord) -> Adapter:
        """The adapter as clients see it."""
        return convert.adapter(record, resident=record.digest in self._engine.stats().in_memory)


def _note(name: str) -> None:
    """Names the adapter in the log line of this RPC."""
    current_call().log["adapter"] = name[:MAX_LOGGED]


def allowed_path(uri: str, roots: tuple[Path, ...]) -> Path:
    """The real directory behind a path or file:// URI, if it lies under one of the roots.

    Touches the disk. Whether anything exists outside the roots is not told.
    """
    if not roots:
        raise RequestInvalid("uri", "this server has no --adapter-roots to load from")
    path = _local_path(uri)
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop of links; it leads nowhere, so to no root either
        real = None
    inside = real is not None and any(real.is_relative_to(root.resolve()) for root in roots)
    convert.check("uri", inside, "must lie under one of --adapter-roots")
    assert real is not None
    convert.check("uri", _is_dir(real), "must be a directory")
    return real


def _local_path(uri: str) -> Path:
    """The absolute path that a path or file:// URI names."""
    name = uri
    with suppress(ValueError):  # of brackets in a host; such a host is not here anyway
        parts = urlsplit(uri)
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            name = unquote(parts.path)
    path = Path(name)
    convert.check("uri", path.is_absolute() and "\0" not in name, "must be an absolute path")
    return path


def _is_dir(path: Path) -> bool:
    """Whether it is a directory; nothing that cannot be looked at is one."""
    try:
        return path.is_dir()
    except OSError:  # of a name that is too long, a folder that is closed to us
        return False

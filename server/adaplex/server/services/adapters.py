"""AdapterService: uploads, imports, names, aliases, pins and deletions of adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from adaplex.adapters.api import (
    AdapterRecord,
    AdapterRegistry,
    Committed,
    Importer,
    NameRecord,
    Origin,
)
from adaplex.engine.async_engine import AsyncEngine
from adaplex.server import adapter_messages as messages
from adaplex.server.pin_follower import PinFollower
from adaplex.server.rpc_context import current_rpc
from adaplex.server.threads import in_thread
from adaplex.server.upload import Receiver
from adaplex.v1 import adapters_pb2, adapters_pb2_grpc

MAX_LOGGED_CHARS = 200
"""Length at which a client's adapter name is cut in the log."""


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Implements AdapterService. Everything that reads or writes a disk runs in a thread."""

    def __init__(
        self,
        registry: AdapterRegistry,
        importer: Importer,
        engine: AsyncEngine,
        receiver: Receiver,
        pins: PinFollower,
    ) -> None:
        self._registry, self._names, self._importer = registry, registry.names, importer
        self._engine, self._receiver, self._pins = engine, receiver, pins

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        """Stores an uploaded adapter."""
        async with self._receiver.receive(request_iterator) as upload:
            _log_adapter(upload.name)
            commit, origin = self._registry.intake.commit, _origin("upload")
            committed = await in_thread(
                commit, upload.staging, upload.name, replace=upload.replace, origin=origin
            )
        return adapters_pb2.UploadAdapterResponse(**await self._committed(committed))

    async def ValidateAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.ValidateAdapterRequest], context: Any
    ) -> adapters_pb2.ValidateAdapterResponse:
        """Reports on an uploaded adapter without storing it."""
        async with self._receiver.receive(request_iterator) as upload:
            report = await in_thread(self._registry.intake.check, upload.staging)
        return adapters_pb2.ValidateAdapterResponse(
            valid=report.valid, report=messages.report(report)
        )

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        """Stores the adapter that a URI names."""
        _log_adapter(request.name)
        replaces = messages.replaces("policy", request.policy)
        with self._receiver.slot():
            load, origin = self._importer.load, _origin()
            committed = await in_thread(
                load, request.uri, request.name, replace=replaces, origin=origin
            )
        return adapters_pb2.LoadAdapterResponse(**await self._committed(committed))

    async def MergeAdapters(
        self, request: adapters_pb2.MergeAdaptersRequest, context: Any
    ) -> adapters_pb2.MergeAdaptersResponse:
        """Stores an adapter merged from stored ones."""
        _log_adapter(request.name)
        replaces = messages.replaces("policy", request.policy)
        selectors, plan = messages.merge_plan(request)
        with self._receiver.slot():
            merge, origin = self._importer.merge, _origin()
            committed = await in_thread(
                merge, selectors, plan, request.name, replace=replaces, origin=origin
            )
        return adapters_pb2.MergeAdaptersResponse(**await self._committed(committed))

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        """Returns one adapter, its report, and the versions of its name."""
        _log_adapter(request.name)
        # The name as routing key always selects the same side of a split.
        record = await in_thread(self._names.get, request.name, routing_key=request.name)
        report = await in_thread(self._registry.programs.report, record.digest)
        entry = await in_thread(self._names.entry, record.name)
        return adapters_pb2.GetAdapterResponse(
            adapter=self._adapter(record, entry),
            report=messages.report(report),
            versions=messages.versions(entry),
        )

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        """Returns a page of adapters, each by its newest version."""
        query = messages.query(request)
        entries = await in_thread(self._names.query, replace(query, limit=query.limit + 1))
        page, more = entries[: query.limit], len(entries) > query.limit
        response = adapters_pb2.ListAdaptersResponse(adapters=map(self._newest, page))
        if more:
            after = self._names.cursor(page[-1], query)
            response.next_page_token = messages.page_token(request, after)
        return response

    async def GetAdapterHistory(
        self, request: adapters_pb2.GetAdapterHistoryRequest, context: Any
    ) -> adapters_pb2.GetAdapterHistoryResponse:
        """Returns the events of a name."""
        _log_adapter(request.name)
        history = await in_thread(self._names.history, request.name)
        return adapters_pb2.GetAdapterHistoryResponse(events=map(messages.event, history))

    async def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Any
    ) -> adapters_pb2.UpdateAdapterResponse:
        """Changes description, labels and pin."""
        _log_adapter(request.name)
        if request.pinned:  # recorded as pinned only if the arena has room
            await self._pins.add(request.name)
        entry = await in_thread(
            self._names.update,
            request.name,
            _origin(),
            description=request.description if request.HasField("description") else None,
            set_labels=dict(request.set_labels),
            remove_labels=list(request.remove_labels),
            pinned=request.pinned if request.HasField("pinned") else None,
        )
        return adapters_pb2.UpdateAdapterResponse(adapter=await self._changed(entry))

    async def SetAlias(
        self, request: adapters_pb2.SetAliasRequest, context: Any
    ) -> adapters_pb2.SetAliasResponse:
        """Points an alias to versions."""
        _log_adapter(request.name)
        targets = messages.targets(request.targets)
        set_alias = self._names.set_alias
        entry = await in_thread(set_alias, request.name, request.alias, targets, _origin())
        return adapters_pb2.SetAliasResponse(adapter=await self._changed(entry))

    async def DeleteAlias(
        self, request: adapters_pb2.DeleteAliasRequest, context: Any
    ) -> adapters_pb2.DeleteAliasResponse:
        """Deletes an alias."""
        _log_adapter(request.name)
        delete = self._names.delete_alias
        entry = await in_thread(delete, request.name, request.alias, _origin())
        return adapters_pb2.DeleteAliasResponse(adapter=await self._changed(entry))

    async def RollbackAlias(
        self, request: adapters_pb2.RollbackAliasRequest, context: Any
    ) -> adapters_pb2.RollbackAliasResponse:
        """Undoes the last change of an alias."""
        _log_adapter(request.name)
        entry = await in_thread(self._names.rollback, request.name, request.alias, _origin())
        return adapters_pb2.RollbackAliasResponse(adapter=await self._changed(entry))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        """Frees the adapter's memory once its running requests are done."""
        _log_adapter(request.name)
        records = await in_thread(self._names.candidates, request.name)
        unloaded = [await self._engine.unload(record.digest) for record in records]
        return adapters_pb2.UnloadAdapterResponse(was_resident=any(unloaded))

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Any
    ) -> adapters_pb2.DeleteAdapterResponse:
        """Deletes a name or a version, and frees the memory of content without another name."""
        _log_adapter(request.name)
        deleted = await in_thread(self._names.delete, request.name, _origin())
        for digest in deleted.digests:
            await self._engine.unload(digest)
        await self._pins.follow_up()
        return adapters_pb2.DeleteAdapterResponse(versions_deleted=deleted.versions)

    async def _committed(self, committed: Committed) -> dict[str, Any]:
        """Returns the fields of a response about a new version, after pins have followed it."""
        entry = await in_thread(self._names.entry, committed.record.name)
        await self._pins.follow_up()
        return {
            "adapter": self._adapter(committed.record, entry),
            "report": messages.report(committed.report),
            "created": committed.created,
        }

    async def _changed(self, entry: NameRecord) -> adapters_pb2.Adapter:
        """Returns the adapter of a changed name, after pins have followed the change."""
        await self._pins.follow_up()
        return self._newest(entry)

    def _newest(self, entry: NameRecord) -> adapters_pb2.Adapter:
        return self._adapter(self._names.latest(entry), entry)

    def _adapter(self, record: AdapterRecord, entry: NameRecord) -> adapters_pb2.Adapter:
        """Returns the adapter as a protobuf message, with its residency now."""
        now = self._engine.stats()
        if record.digest in now.in_memory:
            tier = adapters_pb2.RESIDENCY_TIER_ARENA
        elif record.digest in now.host:
            tier = adapters_pb2.RESIDENCY_TIER_HOST
        elif self._registry.is_local(record.digest):
            tier = adapters_pb2.RESIDENCY_TIER_DISK
        else:
            tier = adapters_pb2.RESIDENCY_TIER_SOURCE
        return messages.adapter(record, entry, tier)


def _origin(source: str = "") -> Origin:
    """Returns the origin of a change: now, by the caller's self-reported identity."""
    return Origin(datetime.now(UTC), current_rpc().actor, source)


def _log_adapter(name: str) -> None:
    """Adds the adapter's name to the log line of this RPC."""
    current_rpc().log["adapter"] = name[:MAX_LOGGED_CHARS]

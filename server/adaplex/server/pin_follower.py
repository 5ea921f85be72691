"""PinFollower: keeps the adapters of pinned names in the arena, whichever process pins them."""

from __future__ import annotations

import asyncio

import structlog

from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.catalog import AdapterRecord
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.errors import NoRoomBesidePins, PinsFull, RequestInvalid
from adaplex.server.threads import in_thread

log = structlog.get_logger("adaplex.pins")

INTERVAL_SECONDS = 1.0
"""Between two looks at what other processes on the same store have changed."""


class PinFollower:
    """Belongs to one event loop."""

    def __init__(self, registry: AdapterRegistry, engine: AsyncEngine) -> None:
        self._registry, self._engine = registry, engine
        self._pinned: dict[str, AdapterRecord] = {}
        self._refused: set[str] = set()
        """What found no room and was logged."""
        self._lock = asyncio.Lock()

    async def watch(self) -> None:
        """Follows the catalog until cancelled."""
        while True:
            await self.follow_up()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def follow_up(self) -> None:
        """Follows after a change that is done; what hinders that is logged, and tried again."""
        try:
            await self.follow()
        except Exception as error:  # a full disk, a busy catalog, a bucket that is away
            log.warning("pins not followed", error=str(error))

    async def follow(self) -> None:
        """Pins and unpins adapters as the catalog says now. An adapter without room is logged once;
        one that was unloaded, or could not be loaded, is tried again.
        """
        async with self._lock:
            records = await in_thread(self._registry.names.pinned)
            for digest in self._pinned.keys() - self._engine.stats().pinned:
                del self._pinned[digest]
            wanted = {record.digest: record for record in records}
            for digest in self._pinned.keys() - wanted.keys():
                await self._unpin(digest)
            self._refused &= wanted.keys()
            for digest, record in wanted.items():
                if digest not in self._pinned:
                    await self._try(record)

    async def add(self, name: str) -> None:
        """Pins every adapter that a name can lead to, or none. Raises PinsFull, NoRoomBesidePins,
        AdapterNotFound, or RequestInvalid for what has nothing in the arena.
        """
        records = await in_thread(self._registry.names.reachable, name)
        async with self._lock:
            added: list[str] = []
            try:
                for record in records:
                    if record.digest not in self._pinned:
                        await self._pin(record)
                        added.append(record.digest)
            except BaseException:
                for digest in added:
                    await self._unpin(digest)
                raise

    async def _try(self, record: AdapterRecord) -> None:
        try:
            await self._pin(record)
            self._refused.discard(record.digest)
        except (PinsFull, NoRoomBesidePins, RequestInvalid) as error:
            if record.digest not in self._refused:
                log.warning("adapter not pinned", adapter=record.name, error=str(error))
            self._refused.add(record.digest)

    async def _pin(self, record: AdapterRecord) -> None:
        if record.merged_only:
            reason = f"{record.name}@{record.version} can only be served merged; the arena has none"
            raise RequestInvalid("pinned", reason)
        await self._engine.pin(record.digest, record.packed_bytes, record.name)
        self._pinned[record.digest] = record

    async def _unpin(self, digest: str) -> None:
        await self._engine.unpin(digest)
        del self._pinned[digest]

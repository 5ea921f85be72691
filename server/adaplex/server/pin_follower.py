"""PinFollower: keeps the adapters of pinned names in the arena, whichever process pins them."""

from __future__ import annotations

import asyncio

import structlog

from adaplex.adapters.api import AdapterRecord, AdapterRegistry
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.errors import NoRoomBesidePins, PinsFull, RequestInvalid
from adaplex.server.threads import in_thread

log = structlog.get_logger("adaplex.pins")

INTERVAL_SECONDS = 1.0
"""Seconds between two reads of the catalog, which other processes change too."""


class PinFollower:
    """Copies pins from the catalog, which decides them, to the engine, which has the set.

    Belongs to one event loop.
    """

    def __init__(self, registry: AdapterRegistry, engine: AsyncEngine) -> None:
        self._registry, self._engine = registry, engine
        self._refused: set[str] = set()
        """Digests whose refusal was logged; they are tried again without another log line."""
        self._lock = asyncio.Lock()

    async def watch(self) -> None:
        """Follows the catalog until cancelled."""
        while True:
            await self.follow_up()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def follow_up(self) -> None:
        """Calls `follow`; logs errors instead of raising them, since `watch` tries again."""
        try:
            await self.follow()
        except Exception as error:  # a full disk, a busy catalog, an unreachable bucket
            log.warning("pins not followed", error=str(error))

    async def follow(self) -> None:
        """Pins and unpins adapters of the engine until they are those that the catalog pins.

        Logs an adapter without room once, and tries it again at each call, as one that the engine
        has unloaded or could not load.
        """
        async with self._lock:
            records = await in_thread(self._registry.names.pinned)
            desired = {record.digest: record for record in records}
            pinned = self._engine.stats().pinned
            for digest in pinned - desired.keys():
                await self._engine.unpin(digest)
            self._refused &= desired.keys()
            for digest, record in desired.items():
                if digest not in pinned:
                    await self._try_pin(record)

    async def add(self, name: str) -> None:
        """Pins every adapter that a name can resolve to, or none.

        Raises PinsFull, NoRoomBesidePins, AdapterNotFound, or RequestInvalid for an adapter that
        can only be served merged.
        """
        records = await in_thread(self._registry.names.reachable, name)
        async with self._lock:
            pinned = self._engine.stats().pinned
            added: list[str] = []
            try:
                for record in records:
                    if record.digest not in pinned:
                        await self._pin(record)
                        added.append(record.digest)
            except BaseException:
                for digest in added:
                    await self._engine.unpin(digest)
                raise

    async def _try_pin(self, record: AdapterRecord) -> None:
        try:
            await self._pin(record)
            self._refused.discard(record.digest)
        except (PinsFull, NoRoomBesidePins, RequestInvalid) as error:
            if record.digest not in self._refused:
                log.warning("adapter not pinned", adapter=record.name, error=str(error))
            self._refused.add(record.digest)

    async def _pin(self, record: AdapterRecord) -> None:
        if record.traits.merged_only:
            reason = f"{record.name}@{record.version} can only be served merged; the arena has none"
            raise RequestInvalid("pinned", reason)
        await self._engine.pin(record.digest, record.packed_bytes, record.name)

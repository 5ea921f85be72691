"""GcTimer: from time to time, removes content that a killed process left without a name."""

from __future__ import annotations

import asyncio

import structlog

from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.server.threads import in_thread

log = structlog.get_logger("adaplex.garbage")


class GcTimer:
    """What a server deletes itself goes at once; this is for what others leave behind."""

    def __init__(self, registry: AdapterRegistry, interval: float) -> None:
        """`interval` in seconds."""
        self._registry, self._interval = registry, interval

    async def watch(self) -> None:
        """Sweeps at every interval until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                gone = await in_thread(self._registry.garbage.sweep)
            except Exception as error:  # a full disk, a busy catalog: the next one may do better
                log.warning("sweep failed", error=str(error))
                continue
            if gone:
                log.info("removed content that nothing names", count=len(gone))

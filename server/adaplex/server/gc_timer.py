"""GcTimer: removes stored content without a name at regular intervals."""

from __future__ import annotations

import asyncio

import structlog

from adaplex.adapters.api import AdapterRegistry
from adaplex.server.threads import in_thread

log = structlog.get_logger("adaplex.garbage")


class GcTimer:
    """Runs the garbage collector. A server removes what it deletes at once; the timer removes what
    killed processes leave.
    """

    def __init__(self, registry: AdapterRegistry, interval: float) -> None:
        """`interval` in seconds."""
        self._registry, self._interval = registry, interval

    async def watch(self) -> None:
        """Sweeps at every interval until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                removed = await in_thread(self._registry.garbage.sweep)
            except Exception as error:  # a full disk or a busy catalog: the next sweep may succeed
                log.warning("sweep failed", error=str(error))
                continue
            if removed:
                log.info("removed content that nothing names", count=len(removed))

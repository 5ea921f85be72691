"""Health: grpc.health.v1 of the server and its services, by the engine's heartbeat and the store;
liveness by the heartbeat alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from adaplex.server.threads import in_thread

log = structlog.get_logger("adaplex.health")

LIVENESS = "liveness"
"""A service name of grpc.health.v1: SERVING while the engine's heartbeat is recent, also during a
drain."""
CHECK_SECONDS = 1.0
"""Interval at which the heartbeat is read."""
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Readiness of the server and its services, and liveness of the engine."""

    def __init__(
        self,
        services: Sequence[str],
        engine_alive: Callable[[], bool],
        *,
        store_damage: Callable[[], str] = str,
        every: float = CHECK_SECONDS,
    ) -> None:
        """`store_damage` returns why the store cannot be used, empty if it can; it may block."""
        # grpc-stubs lack `aio`.
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._services = ("", *services)
        self._engine_alive, self._every = engine_alive, every
        self._open = False
        self._alive = True
        self._store_damage, self._damage = store_damage, ""

    @property
    def ready(self) -> bool:
        """True if the server accepts requests. Safe to read from any thread."""
        return self._open and self._alive and not self._damage

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers grpc.health.v1 at the server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def open(self) -> None:
        """Reports SERVING."""
        self._open = True
        await self._publish()

    async def close(self) -> None:
        """Reports NOT_SERVING; liveness stays SERVING."""
        self._open = False
        await self._publish()

    async def watch(self) -> None:
        """Publishes changes of the engine's heartbeat and of the store until cancelled."""
        while True:
            alive = self._engine_alive()
            if alive != self._alive:
                self._alive = alive
                (log.info if alive else log.error)("engine heartbeat", alive=alive)
                await self._publish()
            damage = await in_thread(self._store_damage)
            if damage != self._damage:
                self._damage = damage
                (log.error if damage else log.info)("store", problem=damage)
                await self._publish()
            await asyncio.sleep(self._every)

    async def _publish(self) -> None:
        for service in self._services:
            await self._servicer.set(service, SERVING if self.ready else NOT_SERVING)
        await self._servicer.set(LIVENESS, SERVING if self._alive else NOT_SERVING)

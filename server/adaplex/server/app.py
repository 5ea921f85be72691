"""Server: the components wired to a gRPC and an HTTP port; start, drain and stop."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import grpc
import structlog
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from adaplex.engine.request import AdapterMode
from adaplex.server.access.guard import Guard
from adaplex.server.components import Components
from adaplex.server.config import MAX_CHUNK_BYTES, ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.gc_timer import GcTimer
from adaplex.server.generator import Generator
from adaplex.server.health import Health
from adaplex.server.http import HttpServer
from adaplex.server.interceptors import EdgeInterceptor
from adaplex.server.metrics import RpcMetrics
from adaplex.server.pin_follower import PinFollower
from adaplex.server.services.adapters import AdapterService
from adaplex.server.services.generation import GenerationService
from adaplex.server.services.info import AdapterSizes, InfoService
from adaplex.server.tls import Certificates, TlsFiles
from adaplex.server.upload import Receiver
from adaplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

log = structlog.get_logger("adaplex.app")

SERVICES = tuple(
    service.full_name
    for file in (generation_pb2, adapters_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
MAX_MESSAGE_BYTES = MAX_CHUNK_BYTES + 64 * 1024
"""Largest gRPC message: an upload chunk with the fields around it."""
FETCH_THREADS = 4
"""Threads that fetch unknown adapters on first use."""
SETTLE_SECONDS = 10.0
"""Time at a stop for cancelled handlers to finish the work of their threads."""


class Server:
    """Serves from `start` to `stop`, once."""

    def __init__(self, components: Components) -> None:
        self._components, self._config = components, components.config
        components.metrics.watch(
            components.engine.stats, max_lora=components.engine_config.max_running
        )
        components.metrics.watch_store(
            components.registry,
            store_bytes=components.config.max_store_bytes,
            cache_bytes=components.config.cache_bytes,
        )
        self._guard = Guard.of(components.config)
        self._edge = EdgeInterceptor(RpcMetrics(components.prometheus), self._guard)
        self._health = Health(SERVICES, self._engine_alive, store_damage=components.registry.damage)
        self._pins = PinFollower(components.registry, components.engine)
        self._fetch_threads = ThreadPoolExecutor(FETCH_THREADS, "fetch")
        self._generator = self._make_generator()
        files = TlsFiles.of(components.config)
        self._certificates = Certificates(files) if files else None
        self._grpc = grpc.aio.server(
            interceptors=[self._edge], options=channel_arguments(components.config)
        )
        self._add_services()
        self._http: HttpServer | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._stopped = False
        self.port = 0
        """Bound gRPC port."""

    @property
    def http_port(self) -> int:
        """Bound HTTP port."""
        assert self._http is not None
        return self._http.port

    async def start(self) -> None:
        """Binds both ports and starts to serve. Raises ConfigError for a port that is not free."""
        config = self._config
        self.port = _bind(self._grpc, config, self._certificates)
        try:
            self._http = HttpServer(
                config.http_host,
                config.http_port,
                self._components.prometheus,
                lambda: self._health.ready,
                self._certificates,
                self._guard,
            )
        except OSError as error:
            where = f"{config.http_host}:{config.http_port}"
            raise ConfigError(f"http_port: cannot bind {where}: {error.strerror}") from error
        await self._components.engine.start()
        await self._grpc.start()
        await self._health.open()
        collector = GcTimer(self._components.registry, config.gc_interval)
        self._watchers = [
            asyncio.create_task(watch())
            for watch in (self._health.watch, self._pins.watch, collector.watch)
        ]

    async def drain(self, hard: asyncio.Event) -> None:
        """Refuses new requests, and waits for the running ones: at most `shutdown_timeout`, and not
        once `hard` is set.
        """
        await self._health.close()
        self._edge.draining = True
        self._components.engine.drain()
        log.info("draining", in_flight=len(self._edge.inflight))
        waits = [
            asyncio.ensure_future(self._edge.inflight.idle()),
            asyncio.ensure_future(hard.wait()),
        ]
        await asyncio.wait(
            waits, timeout=self._config.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        for wait in waits:
            wait.cancel()

    async def stop(self) -> None:
        """Cancels what still runs and frees everything. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        await self._health.close()
        await self._grpc.stop(None)
        try:
            await asyncio.wait_for(self._edge.inflight.idle(), SETTLE_SECONDS)
        except TimeoutError:
            log.warning("handlers still run", in_flight=len(self._edge.inflight))
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._components.engine.stop()
        if self._http is not None:
            await asyncio.to_thread(self._http.close)
        if self._guard is not None:
            self._guard.close()
        self._generator.close()
        self._fetch_threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._components.registry.close)

    async def _fetch_missing(self, selector: str) -> bool:
        """Fetches an unknown adapter by `resolve_from`; see Importer.fetch_missing."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._fetch_threads, self._components.importer.fetch_missing, selector
        )

    def _engine_alive(self) -> bool:
        engine = self._components.engine
        return engine.healthy and engine.heartbeat_age < self._config.stall_timeout

    def _make_generator(self) -> Generator:
        components = self._components
        limits = components.engine_config
        return Generator(
            engine=components.engine,
            registry=components.registry,
            tokenizer=components.tokenizer,
            limits=components.limits,
            max_preparing=limits.max_waiting + limits.max_running,
            metrics=components.metrics,
            model_name=components.model.name,
            mode=AdapterMode(self._config.adapter_mode),
            fetch_missing=self._fetch_missing,
        )

    def _add_services(self) -> None:
        components, config, server = self._components, self._config, self._grpc
        generation = GenerationService(self._generator, self._config.stream_interval)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
        receiver = Receiver(
            components.registry.intake,
            max_uploads=config.max_uploads,
            idle_timeout=config.upload_idle_timeout,
        )
        adapters = AdapterService(
            components.registry, components.importer, components.engine, receiver, self._pins
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)
        info = InfoService(
            version=_version(),
            model=components.model,
            engine=components.engine,
            engine_config=components.engine_config,
            registry=components.registry,
            sizes=AdapterSizes(config.max_adapter_bytes, config.max_adapter_rank),
            store_bytes=config.max_store_bytes,
        )
        server_pb2_grpc.add_ServerServiceServicer_to_server(info, server)
        self._health.add_to(server)
        names = (*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)


@asynccontextmanager
async def serve(components: Components) -> AsyncIterator[Server]:
    """Yields a started server, and stops it at the end of the block."""
    server = Server(components)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


def _version() -> str:
    try:
        return importlib.metadata.version("adaplex")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree, not installed
        return "unknown"


def _bind(server: grpc.aio.Server, config: ServerConfig, certificates: Certificates | None) -> int:
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{config.port}"
    try:
        if certificates is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, certificates.for_grpc())
    except RuntimeError as error:
        raise ConfigError(f"port: cannot bind {address}; is it in use?") from error


def channel_arguments(config: ServerConfig) -> list[tuple[str, int]]:
    """Returns the gRPC channel arguments."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # With port reuse, two servers on one port would each get half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        # Detects within minutes that a streaming client has vanished.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients ping every 10 s at the fastest; half of it leaves room for delays on the way.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # Load balancers move clients when connections end; running RPCs get the same time again.
        ("grpc.max_connection_age_ms", int(config.max_connection_age * 1e3)),
        ("grpc.max_connection_age_grace_ms", int(config.max_connection_age * 1e3)),
    ]

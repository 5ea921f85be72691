"""InfoService: facts, limits and current load of this server."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from adaplex.adapters.api import AdapterRegistry, BaseModule, StoreUsage
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.config import EngineConfig
from adaplex.server.config import MAX_CHUNK_BYTES
from adaplex.server.threads import in_thread
from adaplex.v1 import server_pb2, server_pb2_grpc


@dataclass(frozen=True)
class ModelInfo:
    """Facts of the base model. Fields have the names of BaseModelInfo."""

    name: str
    architecture: str
    quantization: str
    group_size: int
    compute_dtype: str
    device: str
    digest: str
    fingerprint: str
    weight_bytes: int
    step_weight_bytes: int
    kv_token_bytes: int
    vocab_size: int
    modules: tuple[BaseModule, ...]

    def message(self, max_model_len: int) -> server_pb2.BaseModelInfo:
        """Returns the facts as a protobuf message."""
        facts = {**vars(self), "modules": [_module(module) for module in self.modules]}
        return server_pb2.BaseModelInfo(**facts, max_model_len=max_model_len)


@dataclass(frozen=True)
class AdapterSizes:
    """Limits on one adapter."""

    max_adapter_bytes: int
    max_adapter_rank: int


class InfoService(server_pb2_grpc.ServerServiceServicer):
    """Implements ServerService."""

    def __init__(
        self,
        *,
        version: str,
        model: ModelInfo,
        engine: AsyncEngine,
        engine_config: EngineConfig,
        registry: AdapterRegistry,
        sizes: AdapterSizes,
        store_bytes: int,
    ) -> None:
        """`store_bytes` is the quota of the store."""
        self._version, self._model, self._engine = version, model, engine
        self._config, self._registry, self._sizes = engine_config, registry, sizes
        self._store_bytes = store_bytes
        self._started = time.monotonic()

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: Any
    ) -> server_pb2.GetServerInfoResponse:
        """Returns facts and limits of the server, and its load now."""
        usage = await in_thread(self._registry.names.usage)
        return server_pb2.GetServerInfoResponse(
            version=self._version,
            model=self._model.message(self._config.max_model_len),
            capacity=self._capacity(usage),
            limits=server_pb2.LimitsInfo(
                max_concurrent_sequences=self._config.max_running,
                max_waiting_requests=self._config.max_waiting,
                max_chunk_bytes=MAX_CHUNK_BYTES,
                **vars(self._sizes),
            ),
            uptime_seconds=time.monotonic() - self._started,
        )

    def _capacity(self, usage: StoreUsage) -> server_pb2.CapacityInfo:
        now = self._engine.stats()
        return server_pb2.CapacityInfo(
            requests_running=now.running,
            requests_waiting=now.waiting,
            kv_blocks_total=now.kv_blocks_total,
            kv_blocks_used=now.kv_blocks_used,
            kv_block_tokens=self._config.block_tokens,
            arena_bytes_total=now.arena_bytes_total,
            arena_bytes_used=now.arena_bytes_used,
            adapters_stored=usage.names,
            adapters_resident=len(now.in_memory),
            merged_bytes_total=now.merged_bytes_total,
            merged_bytes_used=now.merged_bytes_used,
            host_bytes_total=now.host_bytes_total,
            host_bytes_used=now.host_bytes_used,
            store_bytes_total=self._store_bytes,
            store_bytes_used=usage.stored_bytes,
            pinned_bytes_total=now.pinned_bytes_total,
            pinned_bytes_used=now.pinned_bytes_used,
        )


def _module(module: BaseModule) -> server_pb2.AdaptableModule:
    return server_pb2.AdaptableModule(
        name=module.name,
        kind=module.kind,
        in_features=module.in_features,
        out_features=module.out_features,
        is_head=module.is_head,
    )

"""A real server on free ports over a fake model: the engine, the store and the wire are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.config import EngineConfig
from adaplex.engine.engine import Engine
from adaplex.server.app import Server, serve
from adaplex.server.components import Components
from adaplex.server.config import ServerConfig
from adaplex.server.generation_messages import ModelLimits
from adaplex.server.metrics import Metrics, scraped_registry
from adaplex.server.open_store import open_store
from adaplex.server.services.info import ModelInfo
from adaplex.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2_grpc, server_pb2_grpc
from adaplex.v1.generation_pb2 import GenerateRequest, GenerationSpec
from adapters.handmade import staged
from server.adapter_uploads import adapter_files, upload_messages
from server.calls import spec, until
from server.fake_model import BASE, EOS, MODEL, VOCAB, ByteTokenizer, ScriptedRunner


@dataclass
class ServerRig:
    """A running server and the objects inside it."""

    server: Server
    components: Components
    engine: Engine
    runner: ScriptedRunner
    channel: grpc.aio.Channel

    @property
    def generation(self) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def adapters(self) -> Any:
        return adapters_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def info(self) -> Any:
        return server_pb2_grpc.ServerServiceStub(self.channel)

    def generate(
        self, prompt: str | GenerationSpec = "hello", *, metadata: Any = None, **fields: Any
    ) -> Any:
        """Calls Generate with a specification, or with the fields of one."""
        whole = prompt if isinstance(prompt, GenerationSpec) else spec(prompt, **fields)
        return self.generation.Generate(GenerateRequest(spec=whole), metadata=metadata)

    async def health(self, service: str = "") -> int:
        """Returns the status of a service by grpc.health.v1."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)

    async def upload_files(self, files: dict[str, bytes], name: str = "a", policy: int = 0) -> Any:
        """Uploads the files of an adapter."""
        return await self.send("UploadAdapter", upload_messages(files, name=name, policy=policy))

    async def upload(self, name: str, seed: int = 0, *, replace: bool = False) -> Any:
        policy = adapters_pb2.UPLOAD_POLICY_REPLACE if replace else 0
        return await self.upload_files(adapter_files(seed), name, policy)

    async def send(self, rpc: str, messages: list[Any]) -> Any:
        """Streams messages from a thread: when a server ends an RPC in the middle of a stream,
        grpc.aio's client may report its own failed write instead.
        """

        def call() -> Any:
            with grpc.insecure_channel(f"127.0.0.1:{self.server.port}") as channel:
                return getattr(adapters_pb2_grpc.AdapterServiceStub(channel), rpc)(iter(messages))

        return await asyncio.to_thread(call)


def toy_components(
    folder: Path,
    runner: ScriptedRunner,
    engine: dict[str, int] | None = None,
    tokenizer: ByteTokenizer | None = None,
    **settings: Any,
) -> tuple[Components, Engine]:
    """Returns components over a fake model, and the engine inside them."""
    config = ServerConfig(**{"port": 0, "http_port": 0, "store_dir": folder / "store"} | settings)
    sizes = {"num_blocks": 65, "arena_bytes": 1 << 16, "merged_bytes": 1 << 16}
    sizes |= {"max_model_len": 256, "max_running": 4, "max_waiting": 8}
    sizes |= {"max_step_tokens": 64, "max_chunk_tokens": 32}
    limits = EngineConfig(**sizes | (engine or {}))
    store = open_store(config, BASE, element_bytes=4)
    prometheus = scraped_registry()
    metrics = Metrics(prometheus, model_name=MODEL, vllm_names=config.vllm_metric_names)
    programs = store.registry.programs
    core = Engine(limits, runner, programs, base_digest=BASE.digest, observer=metrics)
    components = Components(
        config=config,
        model=ModelInfo(
            name=MODEL,
            architecture="llama",
            quantization="fp32",
            group_size=0,
            compute_dtype="float32",
            device="cpu",
            digest=BASE.digest,
            fingerprint=BASE.fingerprint,
            weight_bytes=1000,
            step_weight_bytes=900,
            kv_token_bytes=64,
            vocab_size=VOCAB,
            modules=tuple(BASE.modules.values()),
        ),
        limits=ModelLimits(VOCAB, limits.max_model_len, frozenset([EOS])),
        tokenizer=tokenizer or ByteTokenizer(),
        registry=store.registry,
        importer=store.importer,
        engine_config=limits,
        engine=AsyncEngine(core),
        metrics=metrics,
        prometheus=prometheus,
    )
    return components, core


@asynccontextmanager
async def rig(
    folder: Path,
    *,
    runner: ScriptedRunner | None = None,
    engine: dict[str, int] | None = None,
    tokenizer: ByteTokenizer | None = None,
    **settings: Any,
) -> AsyncIterator[ServerRig]:
    """Yields a server on free ports; checks at the end that blocks, leases and files balance."""
    runner = runner or ScriptedRunner()
    components, core = toy_components(folder, runner, engine, tokenizer, **settings)
    async with serve(components) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield ServerRig(server, components, core, runner, channel)
        runner.gate.set()
        if not server._stopped:
            await until(lambda: not core.has_work and not len(server._edge.inflight))
            components.registry.check_integrity()
            assert components.registry.leased == 0
            assert components.registry.garbage.orphans() == frozenset()
            assert staged(components.config.store_dir) == []
    core.check_integrity()
    assert not core.has_work

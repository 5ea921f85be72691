"""A real server on free ports over a fake model: the engine, the store and the wire are real."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save

from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.batch import Batch
from adaplex.engine.config import EngineConfig
from adaplex.engine.engine import Engine
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import Logprob, Request, SampledToken
from adaplex.server.app import Server, serve
from adaplex.server.components import Components
from adaplex.server.config import ServerConfig
from adaplex.server.convert import ModelLimits
from adaplex.server.metrics import Metrics
from adaplex.server.open_store import open_store
from adaplex.server.services.info import ModelInfo
from adaplex.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2_grpc, server_pb2_grpc
from adapters.handmade import staged
from server.calls import until

EOS = 256
VOCAB = 257
MODEL = "toy"
FEATURES = 8
BASE = BaseSpec(
    name=MODEL,
    digest="sha256:" + "0" * 64,
    fingerprint="sha256:" + "1" * 64,
    model_type="llama",
    modules={
        name: BaseModule(name, "linear", FEATURES, FEATURES)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    },
    weight=lambda _: torch.zeros(FEATURES, FEATURES),
)


class ByteTokenizer:
    """A token is a byte of UTF-8; 256 ends the text."""

    chat_template = "yes"

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> list[int]:
        if conversation[0]["role"] == "assistant":
            raise ValueError("the user speaks first")
        return [byte for m in conversation for byte in f"{m['role']}:{m['content']}\n".encode()]

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return bytes(t for t in token_ids if t < EOS).decode(errors="replace")


def shifted_echo(request: Request) -> list[int]:
    """The prompt and an end; an adapter shows in the first letter: its digest's first digit."""
    mark = [ord(request.adapter.digest[7])] if request.adapter else []
    return [*mark, *request.prompt, EOS]


@dataclass
class FakeRunner:
    """Says what `answer` tells it to; steps are slow while `gate` is closed."""

    answer: Callable[[Request], list[int]] = shifted_echo
    gate: threading.Event = field(default_factory=threading.Event)
    slow: float = 0.05
    """Seconds of a step while the gate is closed."""
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, batch: Batch) -> list[SampledToken]:
        self.gate.wait(self.slow)
        if self.failure is not None:
            raise self.failure
        return [self._next(chunk.sequence) for chunk in batch.sampling]

    def _next(self, sequence: Any) -> SampledToken:
        answer = self.answer(sequence.request)
        token = answer[len(sequence.output) % len(answer)]
        wanted = sequence.request.sampling.logprobs
        logprob = None if wanted is None else Logprob(token, -0.5, ((token, -0.5),) * wanted)
        return SampledToken(token, logprob)

    def pack_adapter(self, program: AdapterProgram) -> None: ...

    def remove_host(self, digest: str) -> None: ...

    def copy_adapter(self, digest: str, offset: int, nbytes: int) -> None: ...

    def load_adapter(self, program: AdapterProgram, offset: int, nbytes: int) -> None: ...

    def remove_adapter(self, digest: str) -> None: ...

    def build_merged(self, program: AdapterProgram) -> int:
        return 100

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        return FoldedShare(100)

    def remove_merged(self, digest: str) -> None: ...

    def step_costs(self) -> StepCosts:
        return StepCosts((1, 2), (1.0, 1.0), (1.0, 1.0), (0.1, 0.1), 0.1)


@dataclass
class Rig:
    """A running server and everything a test may look at."""

    server: Server
    parts: Components
    engine: Engine
    runner: FakeRunner
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

    async def upload(self, name: str, seed: int = 0, *, replace: bool = False) -> Any:
        policy = adapters_pb2.UPLOAD_POLICY_REPLACE if replace else 0
        stream = upload_messages(adapter_files(seed), name=name, policy=policy)
        return await self.send("UploadAdapter", stream)

    async def send(self, rpc: str, messages: list[Any]) -> Any:
        """Streams messages from a thread. When a server answers in the middle of a stream,
        grpc.aio's client may report its own failed write instead.
        """

        def call() -> Any:
            with grpc.insecure_channel(f"127.0.0.1:{self.server.port}") as channel:
                return getattr(adapters_pb2_grpc.AdapterServiceStub(channel), rpc)(iter(messages))

        return await asyncio.to_thread(call)


def adapter_files(seed: int = 0, **config: Any) -> dict[str, bytes]:
    """A small LoRA checkpoint for BASE as PEFT writes it."""
    rank = 2
    generator = torch.Generator().manual_seed(seed)
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    tensors = {}
    for module in BASE.modules:
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, FEATURES, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(FEATURES, rank, generator=generator)
    return {
        "adapter_config.json": json.dumps(described | config).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def upload_messages(
    files: dict[str, bytes],
    *,
    name: str = "a",
    policy: int = 0,
    chunk: int = 100,
    message: Any = adapters_pb2.UploadAdapterRequest,
) -> list[Any]:
    """The messages of an upload."""
    metadata = adapters_pb2.AdapterUpload(name=name, policy=policy)  # type: ignore[arg-type]
    for file, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        metadata.files.add(name=file, size_bytes=len(data), sha256=digest)
    messages = [message(metadata=metadata)]
    for index, data in enumerate(files.values()):
        for offset in range(0, len(data), chunk):
            part = adapters_pb2.AdapterChunk(
                file_index=index, offset=offset, data=data[offset : offset + chunk]
            )
            messages.append(message(chunk=part))
    return messages


def toy_parts(
    folder: Path,
    runner: FakeRunner,
    engine: dict[str, int] | None = None,
    tokenizer: ByteTokenizer | None = None,
    **settings: Any,
) -> tuple[Components, Engine]:
    """Components over a fake model, and the engine inside them."""
    config = ServerConfig(**{"port": 0, "http_port": 0, "store_dir": folder / "store"} | settings)
    sizes = {"num_blocks": 65, "arena_bytes": 1 << 16, "merged_bytes": 1 << 16}
    sizes |= {"max_model_len": 256, "max_running": 4, "max_waiting": 8}
    sizes |= {"max_step_tokens": 64, "max_chunk_tokens": 32}
    limits = EngineConfig(**sizes | (engine or {}))
    store = open_store(config, BASE, element_bytes=4)
    prometheus = CollectorRegistry()
    metrics = Metrics(prometheus, model_name=MODEL, vllm_names=config.vllm_metric_names)
    core = Engine(
        *(limits, runner, store.registry.programs), base_digest=BASE.digest, observer=metrics
    )
    parts = Components(
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
    return parts, core


@asynccontextmanager
async def rig(
    folder: Path,
    *,
    runner: FakeRunner | None = None,
    engine: dict[str, int] | None = None,
    tokenizer: ByteTokenizer | None = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """A server on free ports; everything balances when it has stopped."""
    runner = runner or FakeRunner()
    parts, core = toy_parts(folder, runner, engine, tokenizer, **settings)
    async with serve(parts) as server:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Rig(server, parts, core, runner, channel)
        runner.gate.set()
        if not server._stopped:
            await until(lambda: not core.has_work and not len(server._edge.inflight))
            parts.registry.check_integrity()
            assert parts.registry.leased == 0
            assert parts.registry.garbage.orphans() == frozenset()
            assert staged(parts.config.store_dir) == []
    core.check_integrity()
    assert not core.has_work

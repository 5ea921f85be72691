"""ModelServerRig: a whole server in this process, with a tiny model and real gRPC on port 0."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from adaplex.client import AsyncClient
from adaplex.server.app import Server, serve
from adaplex.server.build import build
from adaplex.server.components import Components
from adaplex.server.load_config import load_config
from peft_adapters import everything, load_plain, save_adapter
from time_limits import TEST_SECONDS

HERE = Path(__file__).parent
Serving = Callable[..., AbstractAsyncContextManager["ModelServerRig"]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives the tests of this folder TEST_SECONDS, as they start servers and load models."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@dataclass
class ModelServerRig:
    """A running server of a real model, its components and a client."""

    server: Server
    parts: Components
    client: AsyncClient

    def check_idle(self) -> None:
        """Asserts, after the stop, the engine's integrity, and that no request or block is left."""
        engine = self.parts.engine._engine
        engine.check_integrity()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


@pytest.fixture
def serving(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Serving:
    """`async with serving(setting=value, ...) as rig` serves the tiny llama, and checks that the
    engine is idle afterwards.
    """

    @asynccontextmanager
    async def running(**settings: Any) -> AsyncIterator[ModelServerRig]:
        flags = {
            "model": str(tiny_model("llama")),
            "quantization": "fp32",
            "save_quantized": False,
            "store_dir": tmp_path / "store",
            "port": 0,
            "http_port": 0,
            "threads": 1,
            "kv_cache_bytes": "8MiB",
            "arena_bytes": "1MiB",
        }
        parts = build(load_config(flags | settings), lambda _: None)
        async with serve(parts) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            rig = ModelServerRig(server, parts, client)
            yield rig
        rig.check_idle()

    return running


@pytest.fixture(scope="session")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]
) -> list[Path]:
    """Twenty random LoRA adapters of the tiny llama, ranks 2 to 16."""
    base = load_plain(tiny_model("llama"))
    work = tmp_path_factory.mktemp("adapters")
    with torch.random.fork_rng():
        return [
            save_adapter(
                base,
                work / f"a{i}",
                seed=100 + i,
                size=0.2,
                r=(2, 4, 8, 16)[i % 4],
                lora_alpha=8,
                target_modules=everything("llama")[: 2 + i % 6],
            )
            for i in range(20)
        ]

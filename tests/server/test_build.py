from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.model.base.source import default_cache
from adaplex.server.app import serve
from adaplex.server.build import build, engine_limits, open_store
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.v1 import generation_pb2_grpc, server_pb2_grpc
from adaplex.v1.generation_pb2 import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    GenerationSpec,
    SamplingParams,
)
from adaplex.v1.server_pb2 import GetServerInfoRequest
from server.fake_model import BASE
from tiny import VOCAB, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


async def test_a_server_is_built_from_its_settings_alone(model: Path, tmp_path: Path) -> None:
    config = ServerConfig(
        **{"model": str(model), "model_name": "tiny", "quantization": "fp32", "threads": 1},
        **{"port": 0, "http_port": 0, "store_dir": tmp_path, "kv_cache_bytes": "1MiB"},
    )
    steps: list[str] = []
    parts = build(config, steps.append)
    assert any("KV cache" in step for step in steps)
    assert steps[-1] == "warming up"
    async with (
        serve(parts) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        chat = ChatPrompt(messages=[ChatMessage(role="user", content="hi")])
        spec = GenerationSpec(chat=chat, sampling=SamplingParams(max_tokens=8, ignore_eos=True))
        call: Any = generation_pb2_grpc.GenerationServiceStub(channel).Generate(
            GenerateRequest(spec=spec)
        )
        answer = await call
        assert answer.started.model == "tiny"
        assert len(answer.token_ids) == 8
        info: Any = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(GetServerInfoRequest())
        said = (await info).model
    assert (said.architecture, said.quantization, said.device) == ("llama", "fp32", "cpu")
    # 1 MiB of fp32 blocks: 3 layers, keys and values, 2 heads of 16, 16 tokens a block.
    blocks = (1 << 20) // (3 * 2 * 2 * 16 * 16 * 4)
    assert parts.engine_config.num_blocks == blocks
    assert said.max_model_len == (blocks - 1) * 16
    assert said.kv_token_bytes == 3 * 2 * 2 * 16 * 4
    assert said.vocab_size == VOCAB
    assert said.weight_bytes - said.step_weight_bytes == VOCAB * 64 * 4  # input embeddings
    linears = {m.name: m for m in said.modules if m.kind == "linear"}
    assert len(linears) == 3 * 7 + 1
    assert [name for name, module in linears.items() if module.is_head] == ["lm_head"]
    down = linears["model.layers.0.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (128, 64)


@pytest.mark.parametrize(
    ("settings", "saves"),
    [
        ({"quantization": "nf4"}, True),
        ({"quantization": "int8"}, True),
        ({"quantization": "int4-group", "group_size": 16}, True),
        ({"quantization": "nf4", "save_quantized": False}, False),
        ({"quantization": "bf16"}, False),
    ],
)
def test_the_second_start_quantizes_only_what_was_not_saved(
    model: Path, tmp_path: Path, settings: dict[str, Any], saves: bool
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(default_cache() / "kernels")  # built once for all tests
    config = ServerConfig(
        **{"model": str(model), "cache": cache, "threads": 1, "store_dir": tmp_path / "store"},
        **{"kv_cache_bytes": "1MiB"},
        **settings,
    )
    quantized = []
    for _ in range(2):
        steps: list[str] = []
        parts = build(config, steps.append)
        parts.registry.close()
        assert parts.model.group_size == settings.get("group_size", 0)
        quantized.append(any(step.startswith("quantizing") for step in steps))
    assert quantized == [True, not saves]
    assert len(list(cache.glob("quantized/*.safetensors"))) == saves


@pytest.mark.parametrize("quantization", ["fp32", "bf16"])
def test_an_8_bit_head_counts_as_a_weight_and_halves_what_greedy_steps_read(
    model: Path, tmp_path: Path, quantization: str
) -> None:
    infos = []
    for head in ("bf16", "int8"):
        config = ServerConfig(
            **{"model": str(model), "quantization": quantization, "head": head, "threads": 1},
            **{"store_dir": tmp_path / head, "kv_cache_bytes": "1MiB"},
        )
        parts = build(config, lambda _: None)
        parts.registry.close()
        infos.append(parts.model)
    plain, int8 = infos
    copy, element = VOCAB * (64 + 8), 4 if quantization == "fp32" else 2
    assert int8.weight_bytes - plain.weight_bytes == copy
    assert plain.step_weight_bytes - int8.step_weight_bytes == VOCAB * 64 * element - copy
    assert int8.digest == plain.digest


class Base:
    """The attributes of a base that sizing reads."""

    max_positions = 4096

    def kv_block_bytes(self, block_tokens: int) -> int:
        return block_tokens * 1024


def limits(**settings: Any) -> Any:
    return engine_limits(ServerConfig(**settings), Base())  # type: ignore[arg-type]


def test_the_context_is_the_models_where_the_cache_holds_it() -> None:
    assert limits(kv_cache_bytes="512MiB").max_model_len == 4096
    assert limits(kv_cache_bytes="512MiB", max_model_len=100).max_model_len == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 5000}, "max_model_len: must be at most the model's 4096"),
        ({"max_model_len": 4000, "kv_cache_bytes": "1MiB"}, "kv_cache_bytes: 63 blocks"),
        ({"max_running": 600}, "max_step_tokens: must be at least max_running=600"),
        ({"max_chunk_tokens": 513}, "max_chunk_tokens: must be 1 to 512"),
        ({"kv_cache_bytes": "1KiB"}, "kv_cache_bytes: must be at least 32768 bytes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        limits(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("case", ["a file", "in a file", "a catalog", "objects"])
def test_a_store_that_cannot_be_kept_is_refused_by_name(tmp_path: Path, case: str) -> None:
    store = tmp_path / "store"
    if case == "a file":
        store.write_text("x")
    elif case == "in a file":
        (tmp_path / "file").write_text("x")
        store = tmp_path / "file" / "store"
    else:
        store.mkdir()
        (store / {"a catalog": "catalog.sqlite3", "objects": "objects"}[case]).write_text("x" * 99)
    with pytest.raises(ConfigError, match="store_dir: "):
        open_store(ServerConfig(store_dir=store), BASE, element_bytes=4)


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(30, "Read-only file system")])
def test_a_store_that_the_system_refuses_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="store_dir: cannot store adapters in"):
        open_store(ServerConfig(store_dir=tmp_path / "s"), BASE, element_bytes=4)

"""Builds the components from the configuration: the only module that knows every package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from adaplex.adapters.api import BaseSpec
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.config import EngineConfig
from adaplex.engine.engine import Engine
from adaplex.engine.errors import RequestInvalid
from adaplex.model.base.loader import BaseModel, load_base
from adaplex.model.base.source import default_cache
from adaplex.model.constants import KV_BLOCK_TOKENS
from adaplex.model.progress import Progress
from adaplex.model.runner import ModelRunner
from adaplex.server.components import Components
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.generation_messages import ModelLimits
from adaplex.server.metrics import Metrics, scraped_registry
from adaplex.server.open_store import import_adapters, open_store
from adaplex.server.services.info import ModelInfo

BUILD_SECONDS = 90.0
"""Time to wait for the build of the C kernels, several times what it takes on two idle cores. A
server without them answers several times slower, until it is started again.
"""


def build(config: ServerConfig, progress: Progress) -> Components:
    """Loads the base, opens the store and makes the engine, in seconds to minutes.

    Raises ConfigError for settings that do not fit the model, and the AdaplexErrors of the model
    and of the adapters to import.
    """
    base = load(config, progress)
    spec = replace(base.spec, name=config.model_name or base.spec.name)
    engine_config = engine_limits(config, base)
    progress("opening the adapter store")
    store = open_store(config, spec, element_bytes=base.dtype.itemsize)
    import_adapters(config, store, progress)
    use_threads(config, base)
    progress(f"sizing the KV cache: {engine_config.num_blocks} blocks of {KV_BLOCK_TOKENS} tokens")
    runner = ModelRunner.for_base(
        base,
        num_blocks=engine_config.num_blocks,
        block_tokens=engine_config.block_tokens,
        arena_bytes=engine_config.arena_bytes,
        enforce_eager=config.enforce_eager,
        int8_head=config.head == "int8",
        progress=progress,
    )
    progress("warming up")
    runner.warm_up()
    prometheus = scraped_registry()
    metrics = Metrics(prometheus, model_name=spec.name, vllm_names=config.vllm_metric_names)
    source = store.registry.programs
    engine = Engine(engine_config, runner, source, base_digest=spec.digest, observer=metrics)
    return Components(
        config=config,
        model=_model_info(spec, base, runner.int8_head_bytes),
        limits=ModelLimits(base.vocab_size, engine_config.max_model_len, base.eos_token_ids),
        tokenizer=base.tokenizer,
        registry=store.registry,
        importer=store.importer,
        engine_config=engine_config,
        engine=AsyncEngine(engine),
        metrics=metrics,
        prometheus=prometheus,
    )


def load(config: ServerConfig, progress: Progress) -> BaseModel:
    """Loads the base model. Raises ModelError."""
    torch.set_num_threads(config.compute_threads)
    return load_base(
        config.model,
        quantization=config.quantization,
        group_size=config.group_size,
        dtype=config.dtype,
        device=config.device,
        cpu_activations=config.cpu_activations,
        build_patience=BUILD_SECONDS,
        cache=config.cache,
        saved=_saved_bases(config),
        cache_limit=config.max_cache_bytes,
        progress=progress,
    )


def use_threads(config: ServerConfig, base: BaseModel) -> None:
    """Gives the compute threads to the kernels in C, if the base has them, else to torch."""
    if base.kernels is not None:
        base.kernels.use_threads(config.compute_threads)
        torch.set_num_threads(1)  # two teams of threads would compete for the cores


def _saved_bases(config: ServerConfig) -> Path | None:
    """Returns the folder of saved quantized bases. A dense base is not saved: its file would be
    large and save little time.
    """
    if not config.save_quantized or config.quantization in ("bf16", "fp32"):
        return None
    return (config.cache or default_cache()) / "quantized"


def engine_limits(config: ServerConfig, base: BaseModel) -> EngineConfig:
    """Returns the engine's limits for this base. Raises ConfigError that names the setting."""
    num_blocks = config.kv_cache_bytes // base.kv_block_bytes(KV_BLOCK_TOKENS)
    if num_blocks < 2:
        raise ConfigError(
            f"kv_cache_bytes: must be at least {2 * base.kv_block_bytes(KV_BLOCK_TOKENS)} bytes"
        )
    max_model_len = config.max_model_len or min(
        base.max_positions, (num_blocks - 1) * KV_BLOCK_TOKENS
    )
    if max_model_len > base.max_positions:
        raise ConfigError(f"max_model_len: must be at most the model's {base.max_positions}")
    try:
        return EngineConfig(
            num_blocks=num_blocks,
            arena_bytes=config.arena_bytes,
            merged_bytes=config.merged_bytes,
            host_bytes=config.host_bytes,
            max_pinned_share=config.max_pinned_share,
            prefetch_ahead=config.prefetch_ahead,
            block_tokens=KV_BLOCK_TOKENS,
            max_model_len=max_model_len,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_step_tokens=config.max_step_tokens,
            max_chunk_tokens=config.max_chunk_tokens,
            max_stretch=config.max_stretch,
            prefix_cache=config.prefix_cache,
        )
    except RequestInvalid as error:
        raise ConfigError(str(error)) from error


def _model_info(spec: BaseSpec, base: BaseModel, int8_head_bytes: int) -> ModelInfo:
    weight_bytes = base.weight_bytes + int8_head_bytes
    head_bytes = sum(
        each.nbytes for name, each in base.backends.items() if spec.modules[name].is_head
    )
    unread = _embedding_bytes(base) + (head_bytes if int8_head_bytes else 0)
    return ModelInfo(
        name=spec.name,
        architecture=spec.model_type,
        quantization=base.quantization,
        group_size=base.group_size,
        compute_dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        digest=spec.digest,
        fingerprint=spec.fingerprint,
        weight_bytes=weight_bytes,
        step_weight_bytes=weight_bytes - unread,
        kv_token_bytes=base.kv_block_bytes(1),
        vocab_size=base.vocab_size,
        modules=tuple(spec.modules.values()),
    )


def _embedding_bytes(base: BaseModel) -> int:
    """Bytes of the input embeddings, of which a step reads one row per token."""
    table: torch.Tensor = base.module.get_input_embeddings().weight  # type: ignore[operator]
    return table.numel() * table.element_size()

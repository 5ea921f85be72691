"""Inputs: random adapters for a model, written once, so that all runs use the same.

They are in the peers' cache folder, in a folder named by the model's digest, together with the
systems' conversions of them and of the model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from adaplex.adapters.durable_files import file_sha256, publish

from . import install
from .system import PeerError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linears of a llama-shaped model."""
SIZE = 0.05
"""Standard deviation of A and B, large enough that no two adapters give the same answers."""


def model_files(model: Path) -> Path:
    """Returns the cache folder for files derived from this model."""
    digest = hashlib.sha256()
    for file in sorted([model / "config.json", *model.glob("*.safetensors")]):
        digest.update(file_sha256(file).encode())
    target = install.folder() / "files" / digest.hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    return target


def adapters(model: Path, count: int, rank: int) -> tuple[Path, ...]:
    """Returns PEFT directories of `count` bf16 adapters of the rank on all linears."""
    shapes = _linear_shapes(model)
    if not shapes:
        raise PeerError(f"{model}: the model has none of {TARGETS}")
    where = model_files(model)
    return tuple(
        _adapter(shapes, where / f"r{rank}-{SIZE}-{seed}", rank, seed) for seed in range(count)
    )


def _linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Returns (out, in) by module name, without reading weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return {
        name: tuple(module.weight.shape)
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }


def _adapter(shapes: dict[str, tuple[int, int]], target: Path, rank: int, seed: int) -> Path:
    """Writes an adapter, unless it exists."""
    import torch
    from safetensors.torch import save_file

    if target.is_dir():
        return target
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            weight = torch.randn(shape, generator=rng) * SIZE
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = weight.bfloat16()
    staging = target.with_suffix(".partial")
    staging.mkdir(exist_ok=True)
    save_file(tensors, staging / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": TARGETS,
    }
    (staging / "adapter_config.json").write_text(json.dumps(config))
    publish(staging, target)
    return target

"""Inputs: random adapters for a model, written once and kept, so that every run asks the same.

They lie under the peers' cache folder, named by the model's content, with what systems make of them
and of the model in formats of their own.
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
"""Standard deviation of A and B: enough that no two adapters answer alike."""


def model_files(model: Path) -> Path:
    """The cache folder for files made of this model."""
    digest = hashlib.sha256()
    for file in sorted([model / "config.json", *model.glob("*.safetensors")]):
        digest.update(file_sha256(file).encode())
    target = install.folder() / "files" / digest.hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    return target


def adapters(model: Path, count: int, rank: int) -> tuple[Path, ...]:
    """PEFT directories of `count` adapters of the rank on all linears, in bf16."""
    shapes = _linear_shapes(model)
    if not shapes:
        raise PeerError(f"{model}: none of {TARGETS} in this model")
    where = model_files(model)
    return tuple(
        _adapter(shapes, where / f"r{rank}-{SIZE}-{seed}", rank, seed) for seed in range(count)
    )


def _linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in), without reading a weight."""
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
    """Writes one, unless it is there."""
    import torch
    from safetensors.torch import save_file

    if target.is_dir():
        return target
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            weight = torch.randn(shape, generator=dice) * SIZE
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

"""A base with a module of every kind, and LoRA tensors for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adapters.handmade import PREFIX, config

QUERY, GATE, NORM = "layers.0.q_proj", "layers.0.gate_proj", "layers.0.norm"
UP, DOWN = "layers.0.experts.gate_up_proj", "layers.0.experts.down_proj"
TABLE, HEAD = "embed_tokens", "lm_head"
LIMITS = AdapterLimits()
MODULES = [
    BaseModule(TABLE, "embedding", 20, 8),
    BaseModule(QUERY, "linear", 8, 6, has_bias=True),
    BaseModule(GATE, "linear", 8, 12),
    BaseModule(UP, "experts", 8, 12, experts=3),
    BaseModule(DOWN, "experts", 6, 8, experts=3),
    BaseModule(NORM, "norm", 8, 8, has_bias=True),
    BaseModule("layers.0", "block", 8, 8, layer=0, part="mlp"),
    BaseModule(HEAD, "linear", 8, 20, is_head=True),
]
WEIGHTS = {
    m.name: torch.randn(
        (20, 8) if m.kind == "embedding" else (8,) if m.kind == "norm" else (m.out_features, 8),
        generator=torch.Generator().manual_seed(i),
    )
    for i, m in enumerate(MODULES)
    if m.kind not in ("experts", "block")
}
BIASES = {QUERY: torch.full([6], 0.5), NORM: torch.full([8], 0.25)}


def base(**changes: Any) -> BaseSpec:
    fields: dict[str, Any] = {"tied": False, "weight": WEIGHTS.__getitem__} | changes
    modules = {m.name: m for m in MODULES}
    return BaseSpec("org/base", "base", "llama", modules, BIASES, **fields)


def pair(module: str, *, rank: int = 2, into: int = 8, out: int = 6) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.ones(rank, into),
        f"{PREFIX}{module}.lora_B.weight": torch.ones(out, rank),
    }


def table(rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{TABLE}.lora_embedding_A": torch.randn(rank, 20),
        f"{PREFIX}{TABLE}.lora_embedding_B": torch.randn(8, rank),
    }


def lower(
    weights: Mapping[str, Tensor],
    /,
    *,
    spec: BaseSpec | None = None,
    limits: AdapterLimits = LIMITS,
    **fields: Any,
) -> AdapterProgram:
    settings = config(**{"target_modules": ["q_proj"]} | fields)
    return formats.lower(Checkpoint(settings, dict(weights)), spec or base(), limits)


def refused(weights: Mapping[str, Tensor], /, **fields: Any) -> dict[str, str]:
    """Where -> why."""
    with pytest.raises(AdapterInvalid) as caught:
        lower(weights, **fields)
    return {refusal.where: refusal.reason for refusal in caught.value.refusals}

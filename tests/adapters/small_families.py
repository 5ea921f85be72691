"""A small adapter of each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from adapters.handmade import DOWN, HIDDEN, INNER, NORM, PREFIX, QUERY, VALUE, make_base

LIMITS = AdapterLimits()
EMBEDDING, BLOCK = "model.embed_tokens", "model.layers.0.self_attn"
HEADS, FEATURES = 2, 3


def base_of(layers: int = 1) -> BaseSpec:
    """One layer, with the embedding and the attention."""
    plain = make_base(layers=layers)
    more = [BaseModule(EMBEDDING, "embedding", 24, HIDDEN)] + [
        BaseModule(
            f"model.layers.{i}.self_attn", "block", HIDDEN, HIDDEN, layer=i, part="attention"
        )
        for i in range(layers)
    ]
    modules = {**plain.modules, **{module.name: module for module in more}}
    return replace(plain, modules=modules, kv_shapes=((HEADS, FEATURES, FEATURES),) * layers)


BASE = base_of()
Weights = dict[str, Tensor]


def at(module: str, **roles: Tensor) -> Weights:
    """Tensors of one module under PEFT's keys."""
    return {f"{PREFIX}{module}.{role}": tensor for role, tensor in roles.items()}


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def loha(out: int, inputs: int, rank: int = 2) -> Weights:
    a, b = ones(out, rank), ones(rank, inputs)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 3, "num_transformer_submodules": 1}
MADE: Mapping[str, tuple[dict[str, Any], Weights]] = {
    "ADALORA": (
        {"init_r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        at(QUERY, lora_A=ones(2, HIDDEN), lora_B=ones(HIDDEN, 2), lora_E=ones(2, 1)),
    ),
    "VERA": (
        {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        {"base_model.vera_A": ones(2, INNER), "base_model.vera_B": ones(HIDDEN, 2)}
        | at(QUERY, vera_lambda_b=ones(HIDDEN), vera_lambda_d=ones(2))
        | at(DOWN, vera_lambda_b=ones(HIDDEN), vera_lambda_d=ones(2)),
    ),
    "LOHA": (
        {"r": 2, "alpha": 4, "target_modules": ["v_proj"]},
        at(VALUE, **loha(HIDDEN // 2, HIDDEN)),
    ),
    "LOKR": (
        {"r": 1, "alpha": 4, "target_modules": ["q_proj"]},
        at(QUERY, lokr_w1=ones(2, 2), lokr_w2_a=ones(4, 1), lokr_w2_b=ones(1, 4)),
    ),
    "IA3": (
        {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        at(QUERY, ia3_l=ones(HIDDEN, 1)) | at(DOWN, ia3_l=ones(1, INNER)),
    ),
    "LN_TUNING": (
        {"target_modules": ["norm"]},
        at(
            NORM,
            **{"ln_tuning_layers.weight": ones(HIDDEN), "ln_tuning_layers.bias": ones(HIDDEN)},
        ),
    ),
    "BITFIT": ({}, at(QUERY, bias=ones(HIDDEN)) | at(VALUE, bias=ones(HIDDEN // 2))),
    "BEFT": ({"target_modules": ["v_proj"]}, at(VALUE, beft_bias=ones(1, HIDDEN // 2))),
    "PROMPT_TUNING": (VIRTUAL, {"prompt_embeddings": ones(3, HIDDEN)}),
    "P_TUNING": (VIRTUAL, {"prompt_embeddings": ones(3, HIDDEN)}),
    "CPT": (VIRTUAL | {"cpt_token_ids": [1, 2, 3]}, {"prompt_embeddings": ones(3, HIDDEN)}),
    "MULTITASK_PROMPT_TUNING": (
        VIRTUAL | {"num_tasks": 2, "num_ranks": 1, "task_id": 1},
        {
            "prompt_embeddings": ones(3, HIDDEN),
            "prefix_task_cols": ones(2, 3, 1),
            "prefix_task_rows": torch.tensor([2.0, 3.0])[:, None, None].expand(2, 1, HIDDEN),
        },
    ),
    "CARTRIDGE": (
        VIRTUAL | {"num_frozen_tokens": 1},
        {"prompt_embeddings": ones(3, 2 * HEADS * FEATURES)},
    ),
    "PREFIX_TUNING": (VIRTUAL, {"prompt_embeddings": ones(3, 2 * HEADS * FEATURES)}),
}


def lower(
    kind: str,
    weights: Mapping[str, Tensor | None] | None = None,
    /,
    *,
    base: BaseSpec = BASE,
    limits: AdapterLimits = LIMITS,
    **fields: Any,
) -> AdapterProgram:
    """Lowers the family's small adapter with fields and tensors changed; None takes one away."""
    config, tensors = MADE[kind]
    changed: dict[str, Tensor | None] = {**tensors, **(weights or {})}
    kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
    return formats.lower(Checkpoint({"peft_type": kind, **config, **fields}, kept), base, limits)


def refusals(kind: str, *args: Any, **fields: Any) -> dict[str, str]:
    """Where -> why."""
    with pytest.raises(AdapterInvalid) as caught:
        lower(kind, *args, **fields)
    return {refusal.where: refusal.reason for refusal in caught.value.refusals}

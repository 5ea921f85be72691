"""Lowers one low-rank pair of LoRA, with its scale, pooling, magnitudes and bias."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from adaplex.adapters.formats.lora import dora, qalora
from adaplex.adapters.formats.lora.parameters import by_expert
from adaplex.adapters.formats.lora.tensors import LoraTensors
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext
from adaplex.adapters.formats.targets import pattern_value
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight"}
TABLE = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
"""Key suffixes of the two halves of a pair: LINEAR at linears and experts, TABLE at embeddings."""


def lower_pair(
    context: LoweringContext, tensors: LoraTensors, names: Mapping[str, str]
) -> ModuleProgram | None:
    """Returns the program of the pair at a module of the base; None, with refusals, if its tensors
    do not fit. `names` maps modules to the names that patterns match, where these differ.
    """
    module = context.base.modules[tensors.name]
    halves = _halves(context, module, tensors)
    if halves is None:
        return None
    a, b = halves
    name = names.get(module.name, module.name)
    rank = rank_of(context, name)
    pooled = qalora.pooling_of(context, module, a)
    if not _fit(context, module, tensors, rank, pooled):
        return None
    scale = scale_of(context, name, rank)
    if pooled is not None:
        scale *= pooled.factor
        a = pooled.expanded(a)
        context.add_note(qalora.pooling_note(context, pooled))
    if module.kind == "experts":
        b = by_expert(b, module.experts)
    group = 1 if pooled is None else pooled.group
    pair = LowRank(a, b.float() * scale, group, lookup=module.kind == "embedding")
    program = ModuleProgram(module.name, pair, _bias(context, module, tensors, scale), scale)
    magnitude = _optional_tensor(context, tensors, "magnitude", "lora_magnitude_vector", "use_dora")
    if magnitude is None or not context.check_shape(
        tensors.keys["magnitude"], magnitude, module.out_features
    ):
        return program
    return dora.apply_magnitude(context, module, program, magnitude)


def rank_of(context: LoweringContext, name: str) -> int:
    """Returns the rank that the config gives a module, which may differ by module."""
    config = context.config
    rank: int = pattern_value(config, "rank_pattern", name, config["r"], context.patterns)
    return rank


def scale_of(context: LoweringContext, name: str, rank: int) -> float:
    """Returns alpha / r, or alpha / sqrt(r) for rsLoRA; alpha may differ by module."""
    config = context.config
    alpha = pattern_value(config, "alpha_pattern", name, config["lora_alpha"], context.patterns)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _halves(
    context: LoweringContext, module: BaseModule, tensors: LoraTensors
) -> tuple[Tensor, Tensor] | None:
    """Returns a and b; None, with refusals, if one is missing or belongs to another module kind."""
    is_table = module.kind == "embedding"
    other = [kind for kind in ("a", "b", "table_a", "table_b") if kind.startswith("t") != is_table]
    for kind in other:
        if tensors.has(kind):
            context.refuse(tensors.keys[kind], f"does not fit a module of kind {module.kind}")
    if tensors.has(*other):
        return None
    a, b = (tensors.get(f"table_{half}" if is_table else half) for half in "ab")
    if a is None or b is None:
        missing = (TABLE if is_table else LINEAR)["a" if a is None else "b"]
        context.refuse(f"{PREFIX}{module.name}.{missing}", "is missing: a pair needs both halves")
        return None
    return a, b


def _fit(
    context: LoweringContext,
    module: BaseModule,
    tensors: LoraTensors,
    rank: int,
    pooled: qalora.Pooling | None,
) -> bool:
    """Refuses halves of wrong shapes; True if both fit."""
    rank *= module.experts or 1
    width = module.in_features if pooled is None else module.in_features // pooled.group
    a, b = ("table_a", "table_b") if module.kind == "embedding" else ("a", "b")
    fits = (
        context.check_shape(tensors.keys[a], tensors.found[a], rank, width),
        context.check_shape(tensors.keys[b], tensors.found[b], module.out_features, rank),
    )
    return all(fits)


def _bias(
    context: LoweringContext, module: BaseModule, tensors: LoraTensors, scale: float
) -> Tensor | None:
    """Returns the scaled bias of `lora_B`; None if there is none, or it is refused."""
    bias = _optional_tensor(context, tensors, "b_bias", "lora_B.bias", "lora_bias")
    if bias is None or not context.check_shape(tensors.keys["b_bias"], bias, module.out_features):
        return None
    return bias.float() * scale


def _optional_tensor(
    context: LoweringContext, tensors: LoraTensors, kind: str, end: str, field: str
) -> Tensor | None:
    """Returns a tensor that must be present exactly if `field` is set; refused otherwise."""
    tensor, wanted = tensors.get(kind), bool(context.config.get(field))
    if wanted and tensor is None:
        context.refuse(f"{PREFIX}{tensors.name}.{end}", f"is missing, but {field} is set")
    elif tensor is not None and not wanted:
        context.refuse(tensors.keys[kind], f"is present, but {field} is not set")
    return tensor if wanted else None

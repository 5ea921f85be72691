"""Shared by LoHa and LoKr: config checks, rank and scale of modules, and exact low-rank pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats.base import Lowered
from adaplex.adapters.formats.lowering_context import (
    COMMON_FIELDS,
    TARGET_FIELDS,
    LoweringContext,
    is_number,
    is_rank,
)
from adaplex.adapters.formats.peft_modules import (
    ExpandedSize,
    Roles,
    check_has_targets,
    lower_modules,
    tensors_by_module,
)
from adaplex.adapters.formats.targets import pattern_value
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.program import ModuleProgram

USED = TARGET_FIELDS | frozenset(
    ["peft_type", "r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"]
)
"""Config fields that change the answer; they enter the digest."""
HARMLESS = COMMON_FIELDS | frozenset(
    ["rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"]
)
"""Config fields that do not change the answer."""
CONVOLUTION = "belongs to a convolution, which no decoder has"
LowerPair = Callable[[LoweringContext, ExpandedSize, BaseModule, Roles], ModuleProgram | None]
"""Lowers one module; returns None, with refusals, if its tensors do not fit."""


def lower_pairs(
    context: LoweringContext,
    title: str,
    roles: Collection[str],
    lower_pair: LowerPair,
    *,
    harmless: Collection[str],
    convolution: str,
) -> Lowered:
    """Lowers a checkpoint, see Format. `convolution` is part of the keys that only convolutions
    have.
    """
    context.check_fields(title, USED, harmless)
    _check_used(context)
    context.raise_refusals()
    found = tensors_by_module(context, title, roles, unsupported={convolution: CONVOLUTION})
    lower_one = partial(lower_pair, context, ExpandedSize(context.limits))
    return Lowered(lower_modules(context, found, lower_one))


def _check_used(context: LoweringContext) -> None:
    """Refuses fields of the wrong kind."""
    config = context.config
    context.check_kind("r", is_rank(config.get("r")), "a positive integer")
    context.check_kind("alpha", is_number(config.get("alpha")), "a positive number")
    context.check_patterns()
    check_has_targets(context)


def rank_and_scale(context: LoweringContext, name: str) -> tuple[int, float]:
    """Returns a module's rank, and alpha / rank. Raises AdapterTooLarge for too large a rank."""
    config, patterns = context.config, context.patterns
    rank: int = pattern_value(config, "rank_pattern", name, config["r"], patterns)
    if rank > context.limits.max_rank:
        raise AdapterTooLarge(
            f"{name} has rank {rank}, the limit is {context.limits.max_rank}", field="r"
        )
    return rank, pattern_value(config, "alpha_pattern", name, config["alpha"], patterns) / rank


def trivial_pair(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a matrix [out, in] as a product b [out, rank] a [rank, in], one of them the identity,
    with the rank of its smaller side.
    """
    out, inputs = weight.shape
    return (weight, torch.eye(inputs)) if inputs <= out else (torch.eye(out), weight)

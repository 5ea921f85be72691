"""VeRA as HF PEFT 0.21 writes it: y += lambda_b * B (lambda_d * A x), one A and B for all modules.

A and B have the size of the widest module; each module uses their first columns and rows. They are
in the checkpoint, or are generated from a seed as PEFT does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import (
    COMMON_FIELDS,
    PREFIX,
    TARGET_FIELDS,
    LoweringContext,
    is_rank,
)
from adaplex.adapters.formats.peft_modules import (
    ExpandedSize,
    Roles,
    check_bias_field,
    check_has_targets,
    check_present,
    lower_modules,
    shared_tensor,
    tensors_by_module,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

SHARED = ("base_model.vera_A", "base_model.vera_B")
ROLES = ("vera_lambda_b", "vera_lambda_d")
ONLY = "vera_only"
"""Value of `bias` for which only the targets' biases are trained."""
USED = (TARGET_FIELDS - {"exclude_modules"}) | frozenset(
    ["peft_type", "r", "projection_prng_key", "save_projection", "bias", "modules_to_save"]
)
"""Config fields that change the answer; they enter the digest."""
HARMLESS = COMMON_FIELDS | frozenset(
    ["vera_dropout", "d_initial", "fan_in_fan_out", "init_weights"]
)


class Vera:
    """Format of VeRA; see the module's docstring."""

    family = "vera"
    semantic_fields = USED
    about = FormatRow("VeRA", ("low-rank", "bias", "replaced weight"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("VeRA", USED, HARMLESS)
        _check_used(context)
        context.raise_refusals()
        found = tensors_by_module(context, "VeRA", ROLES, shared=SHARED)
        adapted = [
            base.modules[n] for n in found if n in base.modules and found[n].keys() & {*ROLES}
        ]
        projections = _projections(context, adapted)
        lower_one = partial(_lower, context, projections, ExpandedSize(limits))
        return Lowered(lower_modules(context, found, lower_one, only=ONLY), tuple(context.notes))


def random_projections(key: int, rank: int, wide: int, tall: int) -> tuple[Tensor, Tensor]:
    """Returns A [rank, wide] and B [tall, rank], bit for bit as `peft.tuners.vera.model` draws
    them.
    """
    generator = torch.Generator().manual_seed(key)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw(rank, wide), draw(tall, rank)


def _check_used(context: LoweringContext) -> None:
    """Refuses fields of the wrong kind, and a rank above the limit."""
    config = context.config
    rank, key = config.get("r", 0), config.get("projection_prng_key", 0)
    fits = context.check_kind("r", is_rank(rank), "a positive integer")
    if fits and rank > context.limits.max_rank:
        raise AdapterTooLarge(
            f"the rank is {rank}, the limit is {context.limits.max_rank}", field="r"
        )
    fits = type(key) is int and -(1 << 63) <= key < 1 << 63
    context.check_kind("projection_prng_key", fits, "an integer of 64 bits")
    fits = isinstance(config.get("save_projection", True), bool)
    context.check_kind("save_projection", fits, "true or false")
    check_bias_field(context, ONLY)
    check_has_targets(context)


def _projections(
    context: LoweringContext, modules: Iterable[BaseModule]
) -> tuple[Tensor, Tensor] | None:
    """Returns A and B for these modules; None, with refusals, if they are missing or do not fit."""
    sizes = [(module.in_features, module.out_features) for module in modules]
    if not sizes:
        return None
    wide, tall = (max(size) for size in zip(*sizes, strict=True))
    config, (a, b) = context.config, (shared_tensor(context, name) for name in SHARED)
    if not config.get("save_projection", True):
        if a is not None or b is not None:
            context.add_note("vera_A and vera_B are ignored, because save_projection is false")
        return random_projections(config.get("projection_prng_key", 0), config["r"], wide, tall)
    if a is None or b is None:
        name = SHARED[0] if a is None else SHARED[1]
        context.refuse(name, "is missing, but save_projection is true")
        return None
    fits = (
        context.check_shape(SHARED[0], a, config["r"], wide),
        context.check_shape(SHARED[1], b, tall, config["r"]),
    )
    return (a.float(), b.float()) if all(fits) else None


def _lower(
    context: LoweringContext,
    projections: tuple[Tensor, Tensor] | None,
    expanded: ExpandedSize,
    module: BaseModule,
    roles: Roles,
) -> ModuleProgram | None:
    """Returns the program of one module, with both vectors multiplied into B."""
    if projections is None or not check_present(context, module, roles, *ROLES):
        return None
    (a, b), rank, key = projections, context.config["r"], f"{PREFIX}{module.name}."
    inner, outer = roles["vera_lambda_d"], roles["vera_lambda_b"]
    fits = (
        context.check_shape(f"{key}vera_lambda_d", inner, rank),
        context.check_shape(f"{key}vera_lambda_b", outer, module.out_features),
    )
    if not all(fits):
        return None
    expanded.add(module, rank)
    scaled = outer.float()[:, None] * b[: module.out_features] * inner.float()
    return ModuleProgram(module.name, LowRank(a[:, : module.in_features], scaled))

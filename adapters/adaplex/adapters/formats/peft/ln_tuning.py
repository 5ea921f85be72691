"""LN tuning as HF PEFT 0.21 writes it: trained copies replace the base's norms.

PEFT accepts any target module, so linears and the embedding may be replaced too.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import COMMON_FIELDS, PREFIX, LoweringContext
from adaplex.adapters.formats.peft_modules import (
    Roles,
    check_has_targets,
    lower_modules,
    tensors_by_module,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec, ModuleKind
from adaplex.adapters.program.program import ModuleProgram

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"
KINDS: tuple[ModuleKind, ...] = ("norm", "linear", "embedding")
USED = frozenset(["peft_type", "target_modules", "exclude_modules", "modules_to_save"])
"""Config fields that change the answer; they enter the digest."""


class LNTuning:
    """Format of LN tuning; see the module's docstring."""

    family = "ln-tuning"
    semantic_fields = USED
    about = FormatRow("LN tuning", ("replaced weight", "bias"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("LN tuning", USED, COMMON_FIELDS)
        check_has_targets(context)
        context.raise_refusals()
        found = tensors_by_module(context, "LN tuning", (WEIGHT, BIAS))
        return Lowered(lower_modules(context, found, partial(_lower, context), kinds=KINDS))


def _lower(context: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    weight, bias, key = roles.get(WEIGHT), roles.get(BIAS), f"{PREFIX}{module.name}."
    if weight is not None:
        if not context.check_shape(f"{key}{WEIGHT}", weight, *_shape(module)):
            return None
        weight = (weight.T if module.transposed else weight).float()
    if bias is not None:
        bias = context.bias_difference(module, f"{key}{BIAS}", bias)
    return ModuleProgram(module.name, weight=weight, bias=bias)


def _shape(module: BaseModule) -> tuple[int, ...]:
    """Returns the shape of the weight as the base stores it."""
    if module.kind == "norm":
        return (module.out_features,)
    sizes = module.out_features, module.in_features
    return sizes[::-1] if module.transposed or module.kind == "embedding" else sizes

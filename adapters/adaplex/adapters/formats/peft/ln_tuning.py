"""LN tuning as HF PEFT 0.21 writes it: a trained copy of each norm stands in for the base's.

PEFT copies whatever module it is told to, so a linear or the embedding may be one of them.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats import lowering_context as shared
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext
from adaplex.adapters.formats.peft_modules import Roles, by_module, check_has_targets, lower_modules
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec, ModuleKind
from adaplex.adapters.program.program import ModuleProgram

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"
KINDS: tuple[ModuleKind, ...] = ("norm", "linear", "embedding")
USED = frozenset(["peft_type", "target_modules", "exclude_modules", "modules_to_save"])


class LNTuning:
    """The format; see the module's docstring."""

    family = "ln-tuning"
    semantic_fields = USED
    about = FormatRow("LN tuning", ("replaced weight", "bias"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = LoweringContext(checkpoint, base, limits)
        reading.check_known("LN tuning", USED, shared.HARMLESS)
        check_has_targets(reading)
        reading.raise_refused()
        found = by_module(reading, "LN tuning", (WEIGHT, BIAS))
        return Lowered(lower_modules(reading, found, partial(_lower, reading), kinds=KINDS))


def _lower(reading: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    weight, bias, key = roles.get(WEIGHT), roles.get(BIAS), f"{PREFIX}{module.name}."
    if weight is not None:
        if not reading.fits(f"{key}{WEIGHT}", weight, *_shape(module)):
            return None
        weight = (weight.T if module.transposed else weight).float()
    if bias is not None:
        bias = reading.bias_difference(module, f"{key}{BIAS}", bias)
    return ModuleProgram(module.name, weight=weight, bias=bias)


def _shape(module: BaseModule) -> tuple[int, ...]:
    """Of the weight, as the base stores it."""
    if module.kind == "norm":
        return (module.out_features,)
    sizes = module.out_features, module.in_features
    return sizes[::-1] if module.transposed or module.kind == "embedding" else sizes

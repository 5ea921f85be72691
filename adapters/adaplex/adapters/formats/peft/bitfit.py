"""Adapters of biases: BitFit, and BEFT as HF PEFT 0.21 writes it.

PEFT has no BitFit. Ours is a PEFT directory whose config has `"peft_type": "BITFIT"` and whose
tensors base_model.model.<module>.bias are the trained biases of linears and norms; modules without
a bias may get one. BEFT's `beft_bias` is added to the module's output.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import COMMON_FIELDS, PREFIX, LoweringContext
from adaplex.adapters.formats.peft_modules import (
    Roles,
    check_has_targets,
    check_linear,
    lower_modules,
    tensors_by_module,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import ModuleProgram

HARMLESS = COMMON_FIELDS | frozenset(["init_weights"])
"""Config fields of BEFT that do not change the answer."""


class BitFit:
    """Format of BitFit: trained biases; see the module's docstring."""

    family = "bitfit"
    semantic_fields = frozenset(["peft_type"])
    about = FormatRow("BitFit", ("bias",))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("BitFit", self.semantic_fields)
        found = tensors_by_module(context, "BitFit", ("bias",), more={})
        programs = [_lower_bitfit(context, name, found[name]) for name in sorted(found)]
        context.raise_refusals()
        return Lowered(tuple(program for program in programs if program is not None))


class Beft:
    """Format of BEFT: added biases; see the module's docstring."""

    family = "beft"
    semantic_fields = frozenset(["peft_type", "target_modules", "modules_to_save"])
    about = FormatRow("BEFT", ("bias", "replaced weight"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("BEFT", self.semantic_fields, HARMLESS)
        check_has_targets(context)
        context.raise_refusals()
        found = tensors_by_module(context, "BEFT", ("beft_bias",))
        return Lowered(lower_modules(context, found, partial(_lower_beft, context)))


def _lower_bitfit(context: LoweringContext, name: str, roles: Roles) -> ModuleProgram | None:
    module, bias, key = context.base.modules.get(name), roles["bias"], f"{PREFIX}{name}.bias"
    if module is None or module.kind not in ("linear", "norm"):
        context.refuse(key, f"the base {context.base.name} has no linear or norm of this name")
        return None
    if not context.check_shape(key, bias, module.out_features):
        return None
    base = context.base.biases.get(name)
    return ModuleProgram(name, bias=bias.float() if base is None else bias.float() - base)


def _lower_beft(context: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    bias, key = roles["beft_bias"], f"{PREFIX}{module.name}.beft_bias"
    if not check_linear(context, module, "BEFT") or not context.check_shape(
        key, bias, 1, module.out_features
    ):
        return None
    return ModuleProgram(module.name, bias=bias.float().flatten())

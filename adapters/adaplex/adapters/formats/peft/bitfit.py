"""Biases alone: BitFit, and BEFT as HF PEFT 0.21 writes it.

PEFT has no BitFit; ours is a PEFT directory whose config says `"peft_type": "BITFIT"` and whose
tensors base_model.model.<module>.bias are the trained biases of linears and norms. A module without
a bias gets one. BEFT's `beft_bias` is added to what the module gives.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats import lowering_context as shared
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext
from adaplex.adapters.formats.peft_modules import (
    Roles,
    by_module,
    check_has_targets,
    is_linear,
    lower_modules,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import ModuleProgram

HARMLESS = shared.HARMLESS | frozenset(["init_weights"])


class BitFit:
    """The format of trained biases; see the module's docstring."""

    family = "bitfit"
    semantic_fields = frozenset(["peft_type"])
    about = FormatRow("BitFit", ("bias",))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = LoweringContext(checkpoint, base, limits)
        reading.check_known("BitFit", self.semantic_fields)
        found = by_module(reading, "BitFit", ("bias",), more={})
        programs = [_trained(reading, name, found[name]) for name in sorted(found)]
        reading.raise_refused()
        return Lowered(tuple(program for program in programs if program is not None))


class Beft:
    """The format of added biases; see the module's docstring."""

    family = "beft"
    semantic_fields = frozenset(["peft_type", "target_modules", "modules_to_save"])
    about = FormatRow("BEFT", ("bias", "replaced weight"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = LoweringContext(checkpoint, base, limits)
        reading.check_known("BEFT", self.semantic_fields, HARMLESS)
        check_has_targets(reading)
        reading.raise_refused()
        found = by_module(reading, "BEFT", ("beft_bias",))
        return Lowered(lower_modules(reading, found, partial(_added, reading)))


def _trained(reading: LoweringContext, name: str, roles: Roles) -> ModuleProgram | None:
    module, bias, key = reading.base.modules.get(name), roles["bias"], f"{PREFIX}{name}.bias"
    if module is None or module.kind not in ("linear", "norm"):
        reading.refuse(key, f"the base {reading.base.name} has no linear or norm of this name")
        return None
    if not reading.fits(key, bias, module.out_features):
        return None
    base = reading.base.biases.get(name)
    return ModuleProgram(name, bias=bias.float() if base is None else bias.float() - base)


def _added(reading: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    bias, key = roles["beft_bias"], f"{PREFIX}{module.name}.beft_bias"
    if not is_linear(reading, module, "BEFT") or not reading.fits(
        key, bias, 1, module.out_features
    ):
        return None
    return ModuleProgram(module.name, bias=bias.float().flatten())

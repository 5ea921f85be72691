"""IA3 as HF PEFT 0.21 writes it: a vector times the input of feed-forward modules, and times the
output, bias included, of the others.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats import lowering_context as shared
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import PREFIX, LoweringContext, is_names
from adaplex.adapters.formats.peft_modules import Roles, by_module, check_has_targets, lower_modules
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import ModuleProgram

USED = frozenset(
    ["peft_type", "target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"]
)
HARMLESS = shared.HARMLESS | frozenset(["fan_in_fan_out", "init_ia3_weights"])


class IA3:
    """The format; see the module's docstring."""

    family = "ia3"
    semantic_fields = USED
    about = FormatRow("IA3", ("input scale", "output scale", "replaced weight"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = LoweringContext(checkpoint, base, limits)
        reading.check_known("IA3", USED, HARMLESS)
        check_has_targets(reading)
        feedforward = reading.config.get("feedforward_modules")
        fits = feedforward is not None and is_names(feedforward)
        reading.check_kind("feedforward_modules", fits, "a string or a list of strings")
        reading.raise_refused()
        found = by_module(reading, "IA3", ("ia3_l",))
        return Lowered(lower_modules(reading, found, partial(_lower, reading)))


def _lower(reading: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    scale, key = roles["ia3_l"], f"{PREFIX}{module.name}.ia3_l"
    if _is_feedforward(reading, module.name):
        fits = reading.fits(key, scale, 1, module.in_features)
        return ModuleProgram(module.name, input_scale=scale.float().flatten()) if fits else None
    fits = reading.fits(key, scale, module.out_features, 1)
    return ModuleProgram(module.name, output_scale=scale.float().flatten()) if fits else None


def _is_feedforward(reading: LoweringContext, name: str) -> bool:
    """By PEFT's rule: a list names ends of modules, not whole words."""
    wanted = reading.config["feedforward_modules"]
    if isinstance(wanted, str):
        return reading.patterns.match(wanted, name, "feedforward_modules") is not None
    return name.endswith(tuple(wanted))

"""IA3 as HF PEFT 0.21 writes it: a vector scales the input of feed-forward modules, and the output,
bias included, of other modules.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import (
    COMMON_FIELDS,
    PREFIX,
    LoweringContext,
    is_names,
)
from adaplex.adapters.formats.peft_modules import (
    Roles,
    check_has_targets,
    lower_modules,
    tensors_by_module,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.program import ModuleProgram

USED = frozenset(
    ["peft_type", "target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"]
)
"""Config fields that change the answer; they enter the digest."""
HARMLESS = COMMON_FIELDS | frozenset(["fan_in_fan_out", "init_ia3_weights"])
"""Config fields that do not change the answer."""


class IA3:
    """Format of IA3; see the module's docstring."""

    family = "ia3"
    semantic_fields = USED
    about = FormatRow("IA3", ("input scale", "output scale", "replaced weight"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("IA3", USED, HARMLESS)
        check_has_targets(context)
        feedforward = context.config.get("feedforward_modules")
        fits = feedforward is not None and is_names(feedforward)
        context.check_kind("feedforward_modules", fits, "a string or a list of strings")
        context.raise_refusals()
        found = tensors_by_module(context, "IA3", ("ia3_l",))
        return Lowered(lower_modules(context, found, partial(_lower, context)))


def _lower(context: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    scale, key = roles["ia3_l"], f"{PREFIX}{module.name}.ia3_l"
    if _is_feedforward(context, module.name):
        fits = context.check_shape(key, scale, 1, module.in_features)
        return ModuleProgram(module.name, input_scale=scale.float().flatten()) if fits else None
    fits = context.check_shape(key, scale, module.out_features, 1)
    return ModuleProgram(module.name, output_scale=scale.float().flatten()) if fits else None


def _is_feedforward(context: LoweringContext, name: str) -> bool:
    """True for a feed-forward module, by PEFT's rule: the entries of a list are suffixes of names,
    not necessarily whole words.
    """
    entries = context.config["feedforward_modules"]
    if isinstance(entries, str):
        return context.patterns.match(entries, name, "feedforward_modules") is not None
    return name.endswith(tuple(entries))

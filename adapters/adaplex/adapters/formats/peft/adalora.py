"""AdaLoRA as HF PEFT 0.21 writes it: y += B (E * A) x * alpha / (init_r + 1e-5).

PEFT saves only the ranks that were not pruned, but still divides by the initial rank.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import (
    COMMON_FIELDS,
    MAX_NUMBER,
    PREFIX,
    TARGET_FIELDS,
    LoweringContext,
    is_rank,
)
from adaplex.adapters.formats.peft_modules import (
    Roles,
    check_bias_field,
    check_has_targets,
    check_present,
    lower_modules,
    tensors_by_module,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

ROLES = ("lora_A", "lora_B", "lora_E")
ONLY = "lora_only"
"""Value of `bias` for which only the targets' biases are trained."""
USED = TARGET_FIELDS | frozenset(
    ["peft_type", "init_r", "lora_alpha", "rank_pattern", "bias", "modules_to_save"]
)
"""Config fields that change the answer; they enter the digest."""
HARMLESS = COMMON_FIELDS | frozenset(
    [
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "r",
        "use_rslora",
        "alpha_pattern",
        "lora_dropout",
        "fan_in_fan_out",
        "init_lora_weights",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
    ]
)
"""Config fields for training, and LoRA's fields that AdaLoRA does not read."""
EPSILON = 1e-5
"""PEFT adds this to the rank in the divisor."""


class AdaLora:
    """Format of AdaLoRA; see the module's docstring."""

    family = "adalora"
    semantic_fields = USED
    about = FormatRow("AdaLoRA", ("low-rank", "bias", "replaced weight"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        context = LoweringContext(checkpoint, base, limits)
        context.check_fields("AdaLoRA", USED, HARMLESS)
        _check_used(context)
        context.raise_refusals()
        found = tensors_by_module(context, "AdaLoRA", ROLES)
        programs = lower_modules(context, found, partial(_lower, context), only=ONLY)
        if not programs:
            context.refuse("rank_pattern", "prunes all ranks of all modules: nothing would change")
            context.raise_refusals()
        context.check_ranks(programs, "init_r")
        return Lowered(programs)


def _check_used(context: LoweringContext) -> None:
    """Refuses fields of the wrong kind."""
    config = context.config
    alpha, ranks = config.get("lora_alpha", ""), config.get("rank_pattern") or {}
    context.check_kind("init_r", is_rank(config.get("init_r")), "a positive integer")
    fits = type(alpha) in (int, float) and abs(alpha) < MAX_NUMBER
    context.check_kind("lora_alpha", fits, "a number")
    fits = isinstance(ranks, dict) and all(
        isinstance(kept, list) and all(type(k) is bool for k in kept) for kept in ranks.values()
    )
    context.check_kind("rank_pattern", fits, "a map from names to lists of true and false")
    check_bias_field(context, ONLY)
    check_has_targets(context)


def _lower(context: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    """Returns the program of one module; None if all its ranks are pruned, or its tensors do not
    fit.
    """
    if not check_present(context, module, roles, *ROLES):
        return None
    config, key = context.config, f"{PREFIX}{module.name}.lora_"
    kept = _unpruned(context, module.name)
    rank, a, b, e = sum(kept), roles["lora_A"], roles["lora_B"], roles["lora_E"]
    fits = (
        context.check_shape(f"{key}A", a, rank, module.in_features),
        context.check_shape(f"{key}B", b, module.out_features, rank),
        context.check_shape(f"{key}E", e, rank, 1),
    )
    if not all(fits) or rank == 0:
        return None
    alpha = float(config["lora_alpha"])
    scale = (alpha if alpha > 0 else rank) / (config["init_r"] + EPSILON)
    return ModuleProgram(
        module.name, LowRank(a.float() * e.float(), b.float() * scale), scale=scale
    )


def _unpruned(context: LoweringContext, name: str) -> list[bool]:
    """Returns, for each of a module's initial ranks, True if it was not pruned."""
    patterns, init_r = context.config.get("rank_pattern") or {}, context.config["init_r"]
    for key in (f"{name}.lora_E", f"{name}.lora_E.default"):
        if key in patterns:
            kept: list[bool] = patterns[key]
            if len(kept) != init_r:
                context.refuse(
                    "rank_pattern", f"has {len(kept)} ranks for {name}, but init_r is {init_r}"
                )
            return kept
    return [True] * int(init_r)

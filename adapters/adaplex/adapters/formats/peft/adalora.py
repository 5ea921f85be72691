"""AdaLoRA as HF PEFT 0.21 writes it: y += B (E * A) x * alpha / (init_r + 1e-5), some ranks pruned.

PEFT saves the ranks that are left, and keeps dividing by the initial one.
"""

from __future__ import annotations

from functools import partial

from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.formats import lowering_context as shared
from adaplex.adapters.formats.base import FormatRow, Lowered
from adaplex.adapters.formats.lowering_context import (
    MAX_NUMBER,
    PREFIX,
    TARGETS,
    LoweringContext,
    is_rank,
)
from adaplex.adapters.formats.peft_modules import (
    Roles,
    all_there,
    by_module,
    check_bias_field,
    check_has_targets,
    lower_modules,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import ModuleProgram

ROLES = ("lora_A", "lora_B", "lora_E")
ONLY = "lora_only"
USED = TARGETS | frozenset(
    ["peft_type", "init_r", "lora_alpha", "rank_pattern", "bias", "modules_to_save"]
)
HARMLESS = shared.HARMLESS | frozenset(
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
"""Of training, or LoRA's, which AdaLoRA does not read."""
EPSILON = 1e-5
"""PEFT adds it to the rank that it divides by."""


class AdaLora:
    """The format; see the module's docstring."""

    family = "adalora"
    semantic_fields = USED
    about = FormatRow("AdaLoRA", ("low-rank", "bias", "replaced weight"))

    def lower(self, checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> Lowered:
        """See Format."""
        reading = LoweringContext(checkpoint, base, limits)
        reading.check_known("AdaLoRA", USED, HARMLESS)
        _check_used(reading)
        reading.raise_refused()
        found = by_module(reading, "AdaLoRA", ROLES)
        programs = lower_modules(reading, found, partial(_lower, reading), only=ONLY)
        if not programs:
            reading.refuse("rank_pattern", "leaves no rank of any module: nothing would change")
            reading.raise_refused()
        reading.check_ranks(programs, "init_r")
        return Lowered(programs)


def _check_used(reading: LoweringContext) -> None:
    """Refuses fields of the wrong kind."""
    config = reading.config
    alpha, ranks = config.get("lora_alpha", ""), config.get("rank_pattern") or {}
    reading.check_kind("init_r", is_rank(config.get("init_r")), "a positive integer")
    fits = type(alpha) in (int, float) and abs(alpha) < MAX_NUMBER
    reading.check_kind("lora_alpha", fits, "a number")
    fits = isinstance(ranks, dict) and all(
        isinstance(kept, list) and all(type(k) is bool for k in kept) for kept in ranks.values()
    )
    reading.check_kind("rank_pattern", fits, "a map from names to lists of true and false")
    check_bias_field(reading, ONLY)
    check_has_targets(reading)


def _lower(reading: LoweringContext, module: BaseModule, roles: Roles) -> ModuleProgram | None:
    """One module; None when all its ranks are pruned."""
    if not all_there(reading, module, roles, *ROLES):
        return None
    config, key = reading.config, f"{PREFIX}{module.name}.lora_"
    kept = _kept(reading, module.name)
    rank, a, b, e = sum(kept), roles["lora_A"], roles["lora_B"], roles["lora_E"]
    fits = (
        reading.fits(f"{key}A", a, rank, module.in_features),
        reading.fits(f"{key}B", b, module.out_features, rank),
        reading.fits(f"{key}E", e, rank, 1),
    )
    if not all(fits) or rank == 0:
        return None
    alpha = float(config["lora_alpha"])
    scale = (alpha if alpha > 0 else rank) / (config["init_r"] + EPSILON)
    return ModuleProgram(
        module.name, LowRank(a.float() * e.float(), b.float() * scale), scale=scale
    )


def _kept(reading: LoweringContext, name: str) -> list[bool]:
    """Which of a module's initial ranks were kept."""
    patterns, init_r = reading.config.get("rank_pattern") or {}, reading.config["init_r"]
    for key in (f"{name}.lora_E", f"{name}.lora_E.default"):
        if key in patterns:
            kept: list[bool] = patterns[key]
            if len(kept) != init_r:
                reading.refuse(
                    "rank_pattern", f"has {len(kept)} ranks for {name}, but init_r is {init_r}"
                )
            return kept
    return [True] * int(init_r)

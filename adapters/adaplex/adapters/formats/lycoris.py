"""What LoHa and LoKr share: config, rank and scale of each module, and exact low-rank pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.adapters.formats import reading as shared
from adaplex.adapters.formats.injected import check_has_targets
from adaplex.adapters.formats.reading import TARGETS, Reading, is_number, is_rank
from adaplex.adapters.formats.targets import pattern_value

USED = TARGETS | frozenset(
    ["peft_type", "r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"]
)
HARMLESS = shared.HARMLESS | frozenset(
    ["rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"]
)
CONVOLUTION = "is of a convolution, which no decoder has"


def check_used(reading: Reading) -> None:
    """Refuses fields of the wrong kind."""
    config = reading.config
    reading.check_kind("r", is_rank(config.get("r")), "a positive integer")
    reading.check_kind("alpha", is_number(config.get("alpha")), "a positive number")
    for name, fits in (("rank_pattern", is_rank), ("alpha_pattern", is_number)):
        patterns = config.get(name) or {}
        kind = "integers" if fits is is_rank else "numbers"
        right = isinstance(patterns, dict) and all(map(fits, patterns.values()))
        reading.check_kind(name, right, f"a map from patterns to positive {kind}")
    check_has_targets(reading)


def rank_and_scale(reading: Reading, name: str) -> tuple[int, float]:
    """The module's own rank, and alpha / rank. Raises AdapterTooLarge for a rank over the limit."""
    config, patterns = reading.config, reading.patterns
    rank: int = pattern_value(config, "rank_pattern", name, config["r"], patterns)
    if rank > reading.limits.max_rank:
        raise AdapterTooLarge(
            f"{name} has rank {rank}, the limit is {reading.limits.max_rank}", field="r"
        )
    return rank, pattern_value(config, "alpha_pattern", name, config["alpha"], patterns) / rank


def thin(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] as an exact product [out, rank] [rank, in] of its smaller side's rank."""
    out, inputs = weight.shape
    return (weight, torch.eye(inputs)) if inputs <= out else (torch.eye(out), weight)

"""Small adapters, and plans to merge them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint
from adaplex.adapters.compose.merge import MergeMethod, MergePlan, merge_checkpoints
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adapters.handmade import BASE, checkpoint, tensors

LIMITS = AdapterLimits()
EQUAL_RANKS = [method for method in MergeMethod if not method.any_ranks]


def plan(method: MergeMethod, *weights: float, **fields: Any) -> MergePlan:
    density = 0.5 if method.prunes else None
    return MergePlan(method, weights or (0.7, -0.4), **({"density": density} | fields))


def merged(plan: MergePlan, *sources: Checkpoint, base: BaseSpec = BASE) -> Checkpoint:
    return merge_checkpoints(plan, sources or (source(0), source(1)), base)


def source(seed: int, *suffixes: str, rank: int = 2, **fields: Any) -> Checkpoint:
    fields = {"r": rank, "target_modules": list(suffixes) or ["q_proj", "v_proj"]} | fields
    return checkpoint(tensors(*suffixes, rank=rank, seed=seed), **fields)


def lower(checkpoint: Checkpoint, base: BaseSpec = BASE) -> AdapterProgram:
    return formats.lower(checkpoint, base, LIMITS)


def deltas(checkpoint: Checkpoint, base: BaseSpec = BASE) -> dict[str, Tensor]:
    """Module -> [out, in] that the checkpoint adds, as this server serves it."""
    found = {}
    for module in lower(checkpoint, base).modules:
        assert module.low_rank is not None
        found[module.module] = module.low_rank.b @ module.low_rank.a
    return found

"""AdapterTraits: facts of an adapter that admission needs before its tensors are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterTraits:
    """Facts of a lowered adapter that do not depend on the compute dtype.

    A program computes them; its report, its version in the catalog and each request carry them on.
    """

    modules: int = 0
    """Number of base modules that the adapter changes."""
    max_rank: int = 0
    """Largest rank of any module, 0 without a low-rank delta."""
    leading: int = 0
    """Positions that the adapter puts before the prompt: its KV prefix and virtual tokens."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in the prompt the adapter applies; empty: from the
    start."""
    merged_only: bool = False
    """True if some module has only a merged weight, so that no other mode can serve the adapter."""


NO_TRAITS = AdapterTraits()
"""Traits of a checkpoint that could not be lowered."""

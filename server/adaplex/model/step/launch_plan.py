"""LaunchPlan: at which modules the adapters of a step need which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from adaplex.model.weights.site_table import SiteField


class Launch(IntEnum):
    """Kinds of kernels at a module; each value is an index into `LaunchPlan.modules`."""

    INPUT = 0
    """Scale the input."""
    WEIGHT = 1
    """Multiply by another weight."""
    ROWS = 2
    """Multiply by other rows of the weight."""
    NARROW = 3
    """Compute a x, the narrow middle of a low-rank delta or of a bottleneck."""
    OUTPUT = 4
    """Scale the output, and add the delta and the bias."""
    VIRTUAL = 5
    """Write embeddings of virtual tokens."""


FIELDS_OF_LAUNCH = {
    Launch.INPUT: (SiteField.INPUT_SCALE,),
    Launch.WEIGHT: (SiteField.DENSE,),
    Launch.ROWS: (SiteField.ROW_COUNT,),
    Launch.NARROW: (SiteField.RANK,),
    Launch.OUTPUT: (SiteField.RANK, SiteField.BIAS, SiteField.OUTPUT_SCALE),
    Launch.VIRTUAL: (SiteField.VIRTUAL_COUNT,),
}
"""Launch -> columns of the table; a module needs the launch if any of them is not zero."""


@dataclass(frozen=True)
class LaunchPlan:
    """For each Launch the modules that need it."""

    modules: tuple[int, ...] = (0,) * len(Launch)
    """By Launch; bit i of each is set if the module numbered i needs it."""

    @classmethod
    def of(cls, table: NDArray[np.int64]) -> LaunchPlan:
        """Returns what one adapter needs; `table` [modules, SiteField] as in AdapterWeights."""
        needs = (table[:, FIELDS_OF_LAUNCH[launch]].any(axis=1) for launch in Launch)
        bits = (np.packbits(needed, bitorder="little").tobytes() for needed in needs)
        return cls(tuple(int.from_bytes(each, "little") for each in bits))

    @classmethod
    def everywhere(cls, modules: int) -> LaunchPlan:
        """Returns every launch at every module of a base with so many modules."""
        return cls(((1 << modules) - 1,) * len(Launch))

    def __or__(self, other: LaunchPlan) -> LaunchPlan:
        return LaunchPlan(tuple(a | b for a, b in zip(self.modules, other.modules, strict=True)))

    def __contains__(self, other: LaunchPlan) -> bool:
        return all(not b & ~a for a, b in zip(self.modules, other.modules, strict=True))

    def at(self, module: int) -> frozenset[Launch]:
        """Returns the launches at one module, by its number."""
        return frozenset(launch for launch in Launch if self.modules[launch] >> module & 1)

"""LaunchPlan: at which modules the adapters of a step need which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from adaplex.model.kernels.native.structs import SITE_FIELDS


class Launch(IntEnum):
    """What the kernels at a module do; see SITE_FIELDS for what an adapter then has there."""

    INPUT = 0
    """Scale the input."""
    WEIGHT = 1
    """Use another weight."""
    ROWS = 2
    """Use other rows of the weight."""
    NARROW = 3
    """Make the narrow middle of a low-rank delta or of a bottleneck."""
    OUTPUT = 4
    """Scale the output, and add the delta and the bias."""
    VIRTUAL = 5
    """Put embeddings before the prompt."""


FIELDS = {
    Launch.INPUT: ("input_scale",),
    Launch.WEIGHT: ("dense",),
    Launch.ROWS: ("row_count",),
    Launch.NARROW: ("rank",),
    Launch.OUTPUT: ("rank", "bias", "output_scale"),
    Launch.VIRTUAL: ("virtual_count",),
}
"""Of which any makes the launch necessary."""


@dataclass(frozen=True)
class LaunchPlan:
    """For each Launch the modules that need it, as the bits of a number."""

    modules: tuple[int, ...] = (0,) * len(Launch)

    @classmethod
    def of(cls, table: NDArray[np.int64]) -> LaunchPlan:
        """What an adapter needs; `table` [modules, SITE_FIELDS] as in AdapterWeights."""
        columns = ([SITE_FIELDS.index(field) for field in FIELDS[launch]] for launch in Launch)
        needed = (np.packbits(table[:, c].any(axis=1), bitorder="little") for c in columns)
        return cls(tuple(int.from_bytes(bits.tobytes(), "little") for bits in needed))

    @classmethod
    def everywhere(cls, modules: int) -> LaunchPlan:
        """What adapters of all kinds together need, of a base with so many modules."""
        return cls(((1 << modules) - 1,) * len(Launch))

    def __or__(self, other: LaunchPlan) -> LaunchPlan:
        return LaunchPlan(tuple(a | b for a, b in zip(self.modules, other.modules, strict=True)))

    def __contains__(self, other: LaunchPlan) -> bool:
        return all(not b & ~a for a, b in zip(self.modules, other.modules, strict=True))

    def at(self, module: int) -> frozenset[Launch]:
        """Those of one module, by its number."""
        return frozenset(launch for launch in Launch if self.modules[launch] >> module & 1)

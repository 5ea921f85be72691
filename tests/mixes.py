"""Mixes of six adapters over the rows of a step, on which grouped kernels are tested."""

from __future__ import annotations

import random
from collections.abc import Sequence

from adaplex.model.weights.adapter_weights import AdapterRun, AdapterWeights

ROWS = 25
"""Rows of every mix but the distinct one."""
_chance = random.Random(3)
MIXES: dict[str, list[int | None]] = {
    "distinct": [None, *range(6)],
    "identical": [None, *[4] * (ROWS - 1)],
    "uniform": [*sorted(i % 5 for i in range(ROWS - 1)), None],
    "skewed": [4] * 18 + [None] * 2 + [0, 1, 1, 2, 5],
    "zipf": [
        *sorted(min(int(1 / (1 - _chance.random())) - 1, 5) for _ in range(ROWS - 1)),
        None,
    ],
}
"""Name -> adapter of each row, None for base rows; one adapter's rows are neighbours."""


def runs_of_mix(mix: Sequence[int | None], adapters: Sequence[AdapterWeights]) -> list[AdapterRun]:
    """Returns the runs of a mix, in the order of their rows."""
    made: list[AdapterRun] = []
    for row, used in enumerate(mix):
        if used is None:
            continue
        if made and made[-1].stop == row and made[-1].weights is adapters[used]:
            made[-1] = AdapterRun(made[-1].start, row + 1, adapters[used])
        else:
            made.append(AdapterRun(row, row + 1, adapters[used]))
    return made

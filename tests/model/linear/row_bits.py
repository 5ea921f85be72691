"""The bits of rows of a linear, alone and in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.model.linear.backend import LinearBackend


def assert_rows_are_invariant(layer: LinearBackend, x: Tensor) -> None:
    """x [64, in]. Each row has the same bits alone, in parts of the batch and in all of it."""
    whole = layer(x)
    for start, stop in [*((i, i + 1) for i in range(64)), (0, 3), (1, 8), (5, 41), (2, 17)]:
        assert torch.equal(layer(x[start:stop]), whole[start:stop])

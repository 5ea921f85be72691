"""The table that kernels read: for each module of the base, what one adapter does there.

A table is int64 [modules, SiteField]: a C `Site` (see types.h) in each row, which Triton kernels
read too.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from adaplex.adapters.program.primitives import Activation, Bottleneck, Reads


class SiteField(IntEnum):
    """Columns of the table: addresses of tensors, and numbers. Zero where an adapter has none."""

    A = 0
    """Address of a."""
    B = 1
    """Address of b."""
    RANK = 2
    BIAS = 3
    """Address of the bias [out]."""
    DENSE = 4
    """Address of the weight [out, in] that replaces the base's."""
    OUTPUT_SCALE = 5
    """Address of the scale [out]."""
    INPUT_SCALE = 6
    """Address of the scale [in]."""
    INNER = 7
    """Address of the bias between a and b of a bottleneck."""
    SHAPE = 8
    """`shape_code` of a bottleneck."""
    ROWS = 9
    """Address of the replaced rows [row_count, in]."""
    ROW_IDS = 10
    """Address of their numbers, int32 [row_count]."""
    ROW_COUNT = 11
    VIRTUAL = 12
    """Address of the virtual tokens [virtual_count, hidden]."""
    VIRTUAL_COUNT = 13
    ZEROS = 14
    """Address of the zeros of int4 groups that replace the base's."""


SITE_FIELDS = tuple(field.name.lower() for field in SiteField)
"""Names of the columns, as `Site` in types.h has them."""

ACTIVATIONS, READS = tuple(Activation), tuple(Reads)
"""In the order of their numbers in the kernels."""


def empty_table(modules: int) -> NDArray[np.int64]:
    """Returns zeros [modules, SiteField]: an adapter that does nothing."""
    return np.zeros((modules, len(SiteField)), dtype=np.int64)


def shape_code(bottleneck: Bottleneck) -> int:
    """Returns the SHAPE of a bottleneck: activation + 16 * reads."""
    return ACTIVATIONS.index(bottleneck.activation) + 16 * READS.index(bottleneck.reads)

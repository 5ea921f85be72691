"""Products: what the linears of a base multiply by on its device. See `adaplex.model.select`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from adaplex.model.kernels import reference
from adaplex.model.weights.int4_group import Int4Weight
from adaplex.model.weights.nf4 import Nf4Weight

DenseProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [rows, in], weight [out, in], bias [out] or None) -> x W' + bias [rows, out] in x's type."""
Int4Product = Callable[[Tensor, Int4Weight, Tensor | None], Tensor]
"""DenseProduct with a weight in int4-group."""
Nf4Product = Callable[[Tensor, Nf4Weight, Tensor | None], Tensor]
"""DenseProduct with a weight in nf4."""


@dataclass(frozen=True)
class Products:
    """One row-invariant product for each format of a weight; by default torch's."""

    dense: DenseProduct = reference.dense_product
    int4: Int4Product = reference.int4_product
    nf4: Nf4Product | None = None
    """None where no product reads Nf4Weight; bitsandbytes' own kernel may serve then."""
    row_counts: tuple[int, ...] = ()
    """Numbers of rows that together launch every kernel, to compile them; none where none is
    compiled."""

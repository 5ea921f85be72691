"""NativeInt4Linear: int4-group in panels, multiplied by the C kernels of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.int4_group import Int4GroupLinear
from adaplex.model.linear.native import NativeLinear, dense_linear
from adaplex.model.linear.products import Products
from adaplex.model.weights.int4_group import (
    CENTER,
    Int4Weight,
    fits,
    folded_zeros,
    grouped_weight,
    int4_roundtrip,
)
from adaplex.model.weights.integer_weight import IntegerWeight
from adaplex.model.weights.panel_codes import single_codes, unpack_groups


class NativeInt4Linear(NativeLinear):
    """`scales` holds pairs of scale and zero; `zeros`, if any, replace the zeros of the pairs."""

    def __init__(
        self,
        kernels: NativeKernels,
        shape: tuple[int, int],
        panels: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        zeros: Tensor | None = None,
    ) -> None:
        """`panels`, `scales` [panels, groups, 16, 2] and fp32 `zeros` [panels, groups, 16] as
        NativeKernels packs them.
        """
        super().__init__(kernels, shape, panels, scales, bias)
        assert scales is not None
        self._pairs, self.zeros = scales, zeros
        self.group = self.in_features // scales.shape[1]
        """Inputs that share a scale."""
        self.struct.group = self.group
        self.struct.zeros = None if zeros is None else zeros.data_ptr()

    @classmethod
    def quantized(
        cls, kernels: NativeKernels, weight: Tensor, bias: Tensor | None, group: int
    ) -> NativeInt4Linear:
        """Quantizes a weight [out, in] whose `in` is a multiple of `group`."""
        made = Int4Weight.quantized(weight, group)
        pairs = kernels.pack_groups(torch.stack((made.scales, made.zeros), -1))
        shape = (weight.shape[0], weight.shape[1])
        return cls(kernels, shape, kernels.pack_codes(made.codes), pairs, bias)

    def dequantize(self) -> Tensor:
        """See LinearBackend."""
        pairs = self._kernels.unpack_codes(self.panels, self.out_features)
        return grouped_weight(single_codes(pairs), *self._grid())

    def integers(self) -> IntegerWeight:
        """See NativeLinear."""
        pairs = self._kernels.unpack_codes(self.panels, self.out_features)
        return IntegerWeight(single_codes(pairs).int() - CENTER, *self._grid())

    @property
    def nbytes(self) -> int:
        """See LinearBackend; a backend with its own zeros shares all else with another one."""
        return int(super().nbytes if self.zeros is None else self.zeros.nbytes)

    def folded(self, low_rank: LowRank, bias: Tensor | None) -> LinearBackend | None:
        """See LinearBackend."""
        if not fits(low_rank, self.group):
            return None
        zeros = self._kernels.pack_groups(folded_zeros(low_rank, *self._grid()))
        shape = (self.out_features, self.in_features)
        return NativeInt4Linear(self._kernels, shape, self.panels, self._pairs, bias, zeros)

    def folded_bytes(self, low_rank: LowRank) -> int | None:
        """See LinearBackend."""
        return self._pairs.nbytes if fits(low_rank, self.group) else None

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Returns scales and zeros [out, groups]."""
        scales, zeros = unpack_groups(self._pairs, self.out_features).unbind(-1)
        if self.zeros is not None:
            zeros = unpack_groups(self.zeros, self.out_features)
        return scales, zeros


def int4_linear(
    kernels: NativeKernels | None,
    products: Products,
    weight: Tensor,
    bias: Tensor | None,
    group: int,
) -> LinearBackend:
    """Returns the backend for a weight [out, in] in the compute dtype. A weight of a width that
    `group` does not divide is quantized, dequantized once and kept dense: the same values, more
    bytes.
    """
    if weight.shape[1] % group:
        return dense_linear(kernels, products, int4_roundtrip(weight, group), bias)
    if kernels is None:
        return Int4GroupLinear(Int4Weight.quantized(weight, group), bias, products.int4)
    return NativeInt4Linear.quantized(kernels, weight, bias, group)

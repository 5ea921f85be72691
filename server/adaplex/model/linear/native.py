"""NativeLinear: a frozen weight in panels, multiplied by the C kernels of the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import memmove

import torch
from torch import Tensor

from adaplex.model import huge_pages
from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.kernels.native import structs
from adaplex.model.kernels.native.kernels import CODE_LINE, NativeKernels
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.linear.products import Products
from adaplex.model.weights.integer_weight import IntegerWeight
from adaplex.model.weights.nf4 import NF4_VALUES
from adaplex.model.weights.panel_codes import (
    nf4_weight,
    single_codes,
    unpack_dense,
    unpack_groups,
)


class NativeLinear(LinearBackend):
    """Dense in the compute dtype, or nf4 with values rounded to bf16 and block maxima in fp32."""

    def __init__(
        self,
        kernels: NativeKernels,
        shape: tuple[int, int],
        panels: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """`panels` and `scales` as NativeKernels packs them, for a weight of `shape` [out, in]."""
        super().__init__(shape, bias)
        self._kernels = kernels
        self.panels, self.scales = panels, scales
        self._wide_bias = None if bias is None else bias.float().contiguous()
        self.struct = structs.Weight(
            panels.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if self._wide_bias is None else self._wide_bias.data_ptr(),
            self.in_features,
            self.out_features,
            int8_inputs=int(scales is not None and kernels.int8_activations),
        )

    @classmethod
    def dense(cls, kernels: NativeKernels, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        """Packs a weight [out, in] in the compute dtype."""
        shape = (weight.shape[0], weight.shape[1])
        return cls(kernels, shape, kernels.pack_dense(weight), None, bias)

    @classmethod
    def nf4(cls, kernels: NativeKernels, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        """Quantizes a weight [out, in] by bitsandbytes and packs it."""
        shape = (weight.shape[0], weight.shape[1])
        from adaplex.model.linear.bitsandbytes_linear import quantize_nf4  # slow to import

        codes, state = quantize_nf4(weight)
        return cls(kernels, shape, *kernels.pack_nf4(codes, state.absmax, shape), bias)

    @classmethod
    def restored(
        cls,
        kernels: NativeKernels,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> NativeLinear:
        """Makes the backend that gave these tensors. Raises ValueError for panels of another
        shape.
        """
        panels, scales = tensors["panels"], tensors.get("scales")
        units: tuple[int, ...] = (shape[1] // kernels.per_unit, PANEL_COLUMNS, kernels.per_unit)
        if scales is not None:
            units = (shape[1] // 8, CODE_LINE)
        if tuple(panels.shape) != (-(-shape[0] // PANEL_COLUMNS), *units):
            raise ValueError(f"panels {tuple(panels.shape)} do not hold a weight {shape}")
        scales = None if scales is None else _in_huge_pages(scales)
        return cls(kernels, shape, _in_huge_pages(panels), scales, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """See LinearBackend."""
        return self._kernels.linear(self.struct, x)

    def dequantize(self) -> Tensor:
        """See LinearBackend."""
        if self.scales is None:
            return unpack_dense(self.panels, self.out_features).float()
        values = torch.tensor(NF4_VALUES).bfloat16().float()
        pairs = self._kernels.unpack_codes(self.panels, self.out_features)
        return nf4_weight(pairs, self.scales, values)

    def integers(self) -> IntegerWeight:
        """Returns the 4-bit weight as it is multiplied by activations of 8 bits."""
        assert self.scales is not None
        pairs = self._kernels.unpack_codes(self.panels, self.out_features)
        scales = unpack_groups(self.scales, self.out_features)
        return IntegerWeight.nf4(single_codes(pairs), scales, self._kernels.nf4_units)

    def tensors(self) -> dict[str, Tensor]:
        """See LinearBackend."""
        stored = {"panels": self.panels, "scales": self.scales}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        return int(self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes))


def _in_huge_pages(mapped: Tensor) -> Tensor:
    """Returns a copy of a contiguous tensor that lies in the small pages of a mapped file. One
    thread copies it: torch's would wait for each other at every tensor, which takes ten times as
    long while other processes use the processor.
    """
    assert mapped.is_contiguous()
    copy = huge_pages.empty(*mapped.shape, dtype=mapped.dtype)
    memmove(copy.data_ptr(), mapped.data_ptr(), mapped.nbytes)
    return copy


def dense_linear(
    kernels: NativeKernels | None, products: Products, weight: Tensor, bias: Tensor | None
) -> LinearBackend:
    """Returns a dense backend for a weight [out, in] in the compute dtype: in panels where there
    are C kernels and the width has panels, else multiplied by `products`.
    """
    native = native_linear(kernels, weight, bias, nf4=False) if kernels else None
    return native or DenseLinear(weight, bias, products.dense)


def native_linear(
    kernels: NativeKernels, weight: Tensor, bias: Tensor | None, *, nf4: bool
) -> NativeLinear | None:
    """Returns the backend for a weight [out, in] in the compute dtype; None if a weight of this
    width has no panels. An nf4 weight whose width has none is kept dense, with its nf4 values.
    """
    if nf4 and kernels.packs_nf4(weight.shape[1]):
        return NativeLinear.nf4(kernels, weight, bias)
    if not kernels.packs_dense(weight.shape[1]):
        return None
    if nf4:
        from adaplex.model.linear.bitsandbytes_linear import nf4_roundtrip  # slow to import

        weight = nf4_roundtrip(weight)
    return NativeLinear.dense(kernels, weight, bias)

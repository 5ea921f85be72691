"""NativeLinear: a frozen weight in panels, multiplied by the C kernels of the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaplex.model import huge_pages
from adaplex.model.kernels.native import structs
from adaplex.model.kernels.native.kernels import (
    LANES,
    NativeKernels,
    unpack_dense,
)
from adaplex.model.linear.backend import DenseLinear, LinearBackend
from adaplex.model.weights.panel_codes import nf4_weight

NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What nf4's codes stand for, as bitsandbytes has it."""


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
        """`panels` and `scales` as NativeKernels packs them."""
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
        )

    @classmethod
    def dense(cls, kernels: NativeKernels, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        """Keeps a weight [out, in] in the compute dtype."""
        shape = (weight.shape[0], weight.shape[1])
        return cls(kernels, shape, kernels.pack_dense(weight), None, bias)

    @classmethod
    def nf4(cls, kernels: NativeKernels, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        """Quantizes a weight [out, in] by bitsandbytes."""
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
        """What gave these tensors. Raises ValueError for panels of another shape."""
        panels, scales = tensors["panels"], tensors.get("scales")
        units = (shape[1] // kernels.per_unit, LANES, kernels.per_unit)
        if scales is not None:
            units = (shape[1] // 8, LANES, 2)
        if tuple(panels.shape) != (-(-shape[0] // LANES), *units):
            raise ValueError(f"panels {tuple(panels.shape)} do not hold a weight {shape}")
        scales = None if scales is None else _in_large_pages(scales)
        return cls(kernels, shape, _in_large_pages(panels), scales, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """See LinearBackend."""
        return self._kernels.linear(self.struct, x)

    def dequantize(self) -> Tensor:
        """See LinearBackend."""
        if self.scales is None:
            return unpack_dense(self.panels, self.out_features).float()
        values = torch.tensor(NF4_VALUES).bfloat16().float()
        return nf4_weight(self.panels, self.scales, self.out_features, values)

    def tensors(self) -> dict[str, Tensor]:
        """See LinearBackend."""
        kept = {"panels": self.panels, "scales": self.scales}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        return int(self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes))


def _in_large_pages(mapped: Tensor) -> Tensor:
    """A copy of what lies in the pages of a file, which are small."""
    return huge_pages.empty(*mapped.shape, dtype=mapped.dtype).copy_(mapped)


def dense_linear(
    kernels: NativeKernels | None, weight: Tensor, bias: Tensor | None
) -> LinearBackend:
    """A dense backend for a weight [out, in] in the compute dtype, in panels where there are
    kernels.
    """
    native = native_linear(kernels, weight, bias, nf4=False) if kernels else None
    return native or DenseLinear(weight, bias)


def native_linear(
    kernels: NativeKernels, weight: Tensor, bias: Tensor | None, *, nf4: bool
) -> NativeLinear | None:
    """The backend for a weight [out, in] in the compute dtype; None where it has no panels."""
    if nf4 and kernels.packs_nf4(weight.shape[1]):
        return NativeLinear.nf4(kernels, weight, bias)
    if not kernels.packs_dense(weight.shape[1]):
        return None
    if nf4:
        from adaplex.model.linear.bitsandbytes_linear import nf4_roundtrip  # slow to import

        weight = nf4_roundtrip(weight)
    return NativeLinear.dense(kernels, weight, bias)

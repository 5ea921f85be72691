"""Int4GroupLinear: int4-group as it was quantized, multiplied by the device's product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.model.kernels import reference
from adaplex.model.linear.backend import DenseLinearMaker, LinearBackend
from adaplex.model.linear.products import Int4Product
from adaplex.model.weights.int4_group import Int4Weight, fits


class Int4GroupLinear(LinearBackend):
    """An Int4Weight, which a delta that fits its groups folds into without loss."""

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None,
        product: Int4Product = reference.int4_product,
        *,
        shares: bool = False,
    ) -> None:
        """`shares`: codes and scales belong to another backend and do not count as bytes."""
        super().__init__((weight.codes.shape[0], weight.codes.shape[1] * 2), bias)
        self.weight, self._product, self._shares = weight, product, shares

    @classmethod
    def restored(
        cls,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        product: Int4Product = reference.int4_product,
    ) -> Int4GroupLinear:
        """Makes the backend that gave these tensors."""
        return cls(Int4Weight(**tensors), bias, product)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.weight.scales.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """See LinearBackend."""
        return self._product(x, self.weight, self.bias)

    def dequantize(self) -> Tensor:
        """See LinearBackend."""
        return self.weight.dequantized()

    def tensors(self) -> dict[str, Tensor]:
        """See LinearBackend."""
        weight = self.weight
        return {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        weight = self.weight
        shared = 0 if self._shares else weight.codes.nbytes + weight.scales.nbytes
        return shared + weight.zeros.nbytes

    def folded_kinds(
        self, dense: DenseLinearMaker, *, dtype: torch.dtype, device: torch.device
    ) -> list[LinearBackend]:
        """See LinearBackend. A weight that keeps its codes has zeros in fp32."""
        folded = replace(self.weight, zeros=self.weight.zeros.float())
        bias = torch.zeros(self.out_features, dtype=dtype, device=device)
        own = [Int4GroupLinear(folded, each, self._product) for each in (None, bias)]
        return [*own, *super().folded_kinds(dense, dtype=dtype, device=device)]

    def folded(self, low_rank: LowRank, bias: Tensor | None) -> LinearBackend | None:
        """See LinearBackend."""
        if not fits(low_rank, self.group):
            return None
        return Int4GroupLinear(self.weight.folded(low_rank), bias, self._product, shares=True)

    def folded_bytes(self, low_rank: LowRank) -> int | None:
        """See LinearBackend."""
        return self.weight.zeros.numel() * 4 if fits(low_rank, self.group) else None

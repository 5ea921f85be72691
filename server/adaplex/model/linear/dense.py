"""DenseLinear: a frozen weight in the compute dtype, prepacked for oneDNN on a CPU that can."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from adaplex.model.kernels import onednn, reference
from adaplex.model.kernels.reference import ROW_TILE, whole_tiles
from adaplex.model.linear.backend import DenseLinearMaker, LinearBackend
from adaplex.model.linear.products import DenseProduct


class DenseLinear(LinearBackend):
    """The weight in the compute dtype; prepacked for oneDNN where torch's product serves."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        product: DenseProduct = reference.dense_product,
    ) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias)
        self._dtype = weight.dtype
        self._product = product
        self._packed = product is reference.dense_product and onednn.multiplies(weight)
        self._weight = onednn.prepacked(weight, ROW_TILE) if self._packed else weight.contiguous()

    @classmethod
    def restored(
        cls,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        product: DenseProduct = reference.dense_product,
    ) -> DenseLinear:
        """Makes the backend that gave these tensors."""
        return cls(tensors["weight"], bias, product)

    def __call__(self, x: Tensor) -> Tensor:
        """See LinearBackend."""
        if not self._packed:
            return self._product(x, self._weight, self.bias)
        return onednn.multiply(whole_tiles(x), self._weight, self.bias)[: x.shape[0]]

    def dequantize(self) -> Tensor:
        """See LinearBackend."""
        return self.tensors()["weight"].float()

    def tensors(self) -> dict[str, Tensor]:
        """See LinearBackend."""
        return {"weight": self._weight.to_dense() if self._packed else self._weight}

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        return self.elements * self._dtype.itemsize

    def folded_kinds(
        self, dense: DenseLinearMaker, *, dtype: torch.dtype, device: torch.device
    ) -> list[LinearBackend]:
        """See LinearBackend. Folded weights differ from this one by a bias at most."""
        other = copy.copy(self)
        bias = torch.zeros(self.out_features, dtype=dtype, device=device)
        other.bias = bias if self.bias is None else None
        return [other]

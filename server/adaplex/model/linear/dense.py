"""DenseLinear: a frozen weight in the compute dtype, prepacked for oneDNN on a CPU that can."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from adaplex.model.kernels import reference
from adaplex.model.kernels.reference import ROW_TILE, whole_tiles
from adaplex.model.linear.backend import DenseLinearMaker, LinearBackend
from adaplex.model.linear.products import DenseProduct

log = logging.getLogger(__name__)


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
        self._packed = product is reference.dense_product and _prepacks(weight)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROW_TILE)
            if self._packed
            else weight.contiguous()
        )

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
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(
            whole_tiles(x), self._weight, self.bias, "none", [], ""
        )
        return packed[: x.shape[0]]

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


def _prepacks(weight: Tensor) -> bool:
    """True if oneDNN can prepack a weight of this type on this device."""
    on_cpu = weight.device.type == "cpu"
    return on_cpu and torch.backends.mkldnn.is_available() and _probe_prepacking(weight.dtype)


@cache
def _probe_prepacking(dtype: torch.dtype) -> bool:
    """True if this processor and this build of torch prepack weights of a type: tried once, with a
    tiny weight. oneDNN refuses bf16 on processors without AVX512BW and AVX-NE-CONVERT.
    """
    weight, x = torch.ones(ROW_TILE, 8, dtype=dtype), torch.ones(ROW_TILE, 8, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROW_TILE)
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.warning("%s weights are multiplied without prepacking: %s", dtype, reason)
        return False
    return True

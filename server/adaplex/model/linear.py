"""Linear backends: how a frozen weight of the base is kept and multiplied.

Every backend is row-invariant on CPU (see kernels.reference) and can give its weight back as it
is effectively used, which merging builds on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from adaplex.adapters.primitives import LowRank
from adaplex.model.kernels.reference import ROW_TILE, linear_rows, whole_tiles


class LinearBackend(ABC):
    """y = x W' + bias for a frozen W [out, in]; x [rows, in] in the compute dtype."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        self.out_features, self.in_features = shape
        self.bias = bias

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight in effect, fp32 [out, in]; may be the kept one itself: not to be written."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps of the weight, by name; `restored` makes the same backend of it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weight."""

    def warm_up(self, _dtype: torch.dtype) -> None:
        """Compiles what products of any number of rows of this type need, merged or not."""
        return

    def merged(self, _low_rank: LowRank, _bias: Tensor | None) -> LinearBackend | None:
        """Weight and delta in one, without loss, kept as the weight is and sharing what it can;
        None where a dense weight has to hold both. `_bias` is the whole one.
        """
        return None

    def merged_bytes(self, _low_rank: LowRank) -> int | None:
        """Bytes of what `merged` gives; None where it gives none."""
        return None


class DenseLinear(LinearBackend):
    """The weight in the compute dtype; prepacked for oneDNN on CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias)
        self._dtype = weight.dtype
        self._packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROW_TILE)
            if self._packed
            else weight.contiguous()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """See LinearBackend."""
        if not self._packed:
            y = linear_rows(x, self._weight)
            return y if self.bias is None else y + self.bias
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

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None) -> DenseLinear:
        """What gave these tensors."""
        return cls(tensors["weight"], bias)

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        return self.out_features * self.in_features * self._dtype.itemsize

"""Linear backends: how a frozen weight of the base is kept and multiplied.

Every backend is row-invariant (see kernels.reference and, for CUDA devices, kernels.triton_product)
and can give its weight back as it is effectively used, which merging builds on.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.model.kernels.reference import ROW_TILE, linear_rows, whole_tiles

log = logging.getLogger(__name__)


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

    def warm_up(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compiles what products of any number of rows of this type need, merged or not. For
        devices with Triton.
        """
        from adaplex.model.kernels.triton.product import EVERY_TILE  # as in dense_product

        backends = [self, *self.merged_kinds(dtype, device)]
        for rows in EVERY_TILE:
            x = torch.zeros(rows, self.in_features, dtype=dtype, device=device)
            for backend in backends:
                backend(x)

    def merged_kinds(self, dtype: torch.dtype, device: torch.device) -> list[LinearBackend]:
        """One of each kind that merging may make of it, whatever its numbers."""
        weight = torch.zeros(self.out_features, self.in_features, dtype=dtype, device=device)
        return [DenseLinear(weight, None), DenseLinear(weight, weight[:, 0].contiguous())]

    def merged(self, _low_rank: LowRank, _bias: Tensor | None) -> LinearBackend | None:
        """Weight and delta in one, without loss, kept as the weight is and sharing what it can;
        None where a dense weight has to hold both. `_bias` is the whole one.
        """
        return None

    def merged_bytes(self, _low_rank: LowRank) -> int | None:
        """Bytes of what `merged` gives; None where it gives none."""
        return None


DenseProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [rows, in], weight [out, in], bias [out] or None) -> x W' + bias, [rows, out]."""


def torch_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By torch; the measure of the kernels."""
    y = linear_rows(x, weight)
    return y if bias is None else y + bias


def dense_product(device: torch.device) -> DenseProduct:
    """Triton's on a CUDA device, torch's elsewhere."""
    if device.type != "cuda":
        return torch_product
    # Imported here, since only torch for CUDA brings Triton along.
    from adaplex.model.kernels.triton import weight_formats

    return weight_formats.dense_product


class DenseLinear(LinearBackend):
    """The weight in the compute dtype; prepacked for oneDNN on CPU."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, product: DenseProduct | None = None
    ) -> None:
        """`product` is by default the fastest here."""
        super().__init__((weight.shape[0], weight.shape[1]), bias)
        self._dtype = weight.dtype
        self._product = product or dense_product(weight.device)
        self._packed = self._product is torch_product and _prepacks(weight)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROW_TILE)
            if self._packed
            else weight.contiguous()
        )

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

    def merged_kinds(self, dtype: torch.dtype, device: torch.device) -> list[LinearBackend]:
        """See LinearBackend."""
        other = copy.copy(self)
        bias = torch.zeros(self.out_features, dtype=dtype, device=device)
        other.bias = bias if self.bias is None else None
        return [other]

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None) -> DenseLinear:
        """What gave these tensors."""
        return cls(tensors["weight"], bias)

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        return self.out_features * self.in_features * self._dtype.itemsize


def _prepacks(weight: Tensor) -> bool:
    """True where oneDNN can prepack a weight like this one."""
    on_cpu = weight.device.type == "cpu"
    return on_cpu and torch.backends.mkldnn.is_available() and _probe_prepacking(weight.dtype)


@cache
def _probe_prepacking(dtype: torch.dtype) -> bool:
    """True where this processor and this build of torch prepack weights of a type: tried once, with
    a tiny weight. oneDNN refuses bf16 on processors without AVX512BW and AVX-NE-CONVERT.
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

"""LinearBackend: how a frozen weight of the base is kept and multiplied.

Every backend is row-invariant (see kernels.reference and, for CUDA devices, kernels.triton.product)
and can give its weight back as it is effectively used, which folding builds on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank


class LinearBackend(ABC):
    """y = x W' + bias for a frozen W [out, in]; x [rows, in] in the compute dtype."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        self.out_features, self.in_features = shape
        self.bias = bias

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> y [rows, out]."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Returns the weight in effect, fp32 [out, in]; it may be the stored weight itself, so it
        must not be written to.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Returns the stored tensors of the weight by name; `restored` makes the same backend of
        them.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weight."""

    @property
    def elements(self) -> int:
        """Elements of the weight, out * in."""
        return self.out_features * self.in_features

    def warm_up(
        self,
        row_counts: Sequence[int],
        dense: DenseLinearMaker,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Runs products of these numbers of rows, by this weight and by each kind that folding may
        make of it, so that their kernels are compiled.
        """
        backends = [self, *self.folded_kinds(dense, dtype=dtype, device=device)]
        for rows in row_counts:
            x = torch.zeros(rows, self.in_features, dtype=dtype, device=device)
            for backend in backends:
                backend(x)

    def folded_kinds(
        self, dense: DenseLinearMaker, *, dtype: torch.dtype, device: torch.device
    ) -> list[LinearBackend]:
        """Returns a backend of each kind that folding may make of this one, with any numbers."""
        weight = torch.zeros(self.out_features, self.in_features, dtype=dtype, device=device)
        return [dense(weight, None), dense(weight, weight[:, 0].contiguous())]

    def folded(self, _low_rank: LowRank, _bias: Tensor | None) -> LinearBackend | None:
        """Returns weight plus delta without loss, in the weight's own format and sharing what it
        can; None where only a dense weight can hold both. `_bias` [out] is the whole bias.
        """
        return None

    def folded_bytes(self, _low_rank: LowRank) -> int | None:
        """Returns the bytes of `folded`; None where it returns None."""
        return None


DenseLinearMaker = Callable[[Tensor, Tensor | None], LinearBackend]
"""(weight [out, in] in the compute dtype, bias [out] or None) -> dense backend of the device."""

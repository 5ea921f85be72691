"""IntegerWeight: 4-bit weights as the integers that activations of 8 bits are multiplied by.

W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) / units with g the group of input i. The values of
nf4 are rounded to integers, `units` of which are 1; the codes of int4-group are integers already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.model.weights.nf4 import NF4_VALUES

INT8_BLOCK = 32
"""Inputs of a row that share a scale when activations are rounded to 8 bits."""


@dataclass(frozen=True)
class IntegerWeight:
    """A weight [out, in]."""

    codes: Tensor
    """Integers [out, in]."""
    scales: Tensor
    """[out, groups]."""
    zeros: Tensor
    """[out, groups]."""
    units: float = 1.0

    @classmethod
    def nf4(cls, codes: Tensor, scales: Tensor, units: float) -> IntegerWeight:
        """Makes the weight of nf4 codes of 0 to 15 [out, in] and maxima of blocks [out, blocks]."""
        table = torch.tensor(NF4_VALUES).mul(units).round().int()
        return cls(table[codes.int()], scales, torch.zeros_like(scales), units)

    def dequantized(self) -> Tensor:
        """Returns the weight, fp32 [out, in]."""
        codes = self.codes.float().view(*self.scales.shape, -1)
        centered = codes - self.zeros.float()[..., None]
        return (centered * self.scales.float()[..., None]).flatten(1) / self.units

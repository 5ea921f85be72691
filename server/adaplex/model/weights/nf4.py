"""nf4: weights of 4 bits by bitsandbytes; Nf4Weight as bitsandbytes stores it on CUDA devices.

There the maxima of blocks are quantized too. For block b of NF4_BLOCK neighbouring inputs:
W[b, i] = value[code[b, i]] * (step[maximum[b]] * scale[b // NESTED] + offset).
Source: bitsandbytes.functional.QuantState and dequantize_4bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NF4_BLOCK = 64
"""Weights that share one absolute maximum."""
NESTED = 256
"""Blocks that share a scale of their maxima."""
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Values of the codes 0 to 15, as in bitsandbytes."""


@dataclass(frozen=True)
class Nf4Weight:
    """A weight [out, in] whose `in` is a multiple of NF4_BLOCK."""

    codes: Tensor
    """uint8 [out, in / 2], the first code of a pair in the high half."""
    values: Tensor
    """fp32 [16]."""
    maxima: Tensor
    """uint8 [out * in / NF4_BLOCK]."""
    steps: Tensor
    """fp32 [256], by maximum."""
    scales: Tensor
    """fp32 [out * in / NF4_BLOCK / NESTED], rounded up."""
    offset: Tensor
    """fp32 [1]."""

    @classmethod
    def of(cls, data: Tensor, state: Any) -> Nf4Weight:
        """Wraps the tensors of bitsandbytes, quantized with `compress_statistics`; not copied."""
        assert (state.blocksize, state.state2.blocksize) == (NF4_BLOCK, NESTED)
        rows, columns = state.shape
        assert columns % NF4_BLOCK == 0
        return cls(
            data.view(torch.uint8).view(rows, columns // 2),
            state.code.float(),
            state.absmax,
            state.state2.code.float(),
            state.state2.absmax.float(),
            state.offset.float().view(1),
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns fp32 [out, in], the weight that products in `dtype` multiply by: its values are
        rounded to `dtype`, so it is exact in fp32.
        """
        scales = self.scales.repeat_interleave(NESTED)[: len(self.maxima)]
        maxima = self.steps[self.maxima.int()] * scales + self.offset
        codes = torch.stack((self.codes >> 4, self.codes & 15), -1).view(-1, NF4_BLOCK)
        blocks = self.values.to(dtype).float()[codes.int()] * maxima[:, None]
        return blocks.view(len(self.codes), -1)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors, in order."""
        return (self.codes, self.values, self.maxima, self.steps, self.scales, self.offset)

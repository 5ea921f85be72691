"""nf4 as bitsandbytes keeps it on CUDA devices: codes, and the maxima of blocks quantized too.

W[b, i] = value[code[b, i]] * (step[maximum[b]] * scale[b // NESTED] + offset) for block b of
NF4_BLOCK neighbouring inputs. Source: bitsandbytes.functional.QuantState and dequantize_4bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaplex.model.kernels.native.kernels import NF4_BLOCK

NESTED = 256
"""Blocks that share a scale of their maxima."""


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
        """The tensors of bitsandbytes, not copied; quantized with `compress_statistics`."""
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
        """fp32 [out, in] as products in `dtype` have it, which rounds the values: exact in fp32."""
        scales = self.scales.repeat_interleave(NESTED)[: len(self.maxima)]
        maxima = self.steps[self.maxima.int()] * scales + self.offset
        codes = torch.stack((self.codes >> 4, self.codes & 15), -1).view(-1, NF4_BLOCK)
        blocks = self.values.to(dtype).float()[codes.int()] * maxima[:, None]
        return blocks.view(len(self.codes), -1)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors in order."""
        return (self.codes, self.values, self.maxima, self.steps, self.scales, self.offset)


Nf4Product = Callable[[Tensor, Nf4Weight, Tensor | None], Tensor]
"""(x [rows, in], weight, bias [out] or None) -> x W' + bias, [rows, out] in x's type."""


def nf4_product(device: torch.device) -> Nf4Product | None:
    """Triton's on a CUDA device; elsewhere there is none for weights that are kept so."""
    if device.type != "cuda":
        return None
    # Imported here, since only torch for CUDA brings Triton along.
    from adaplex.model.kernels.triton import weight_formats

    return weight_formats.nf4_product

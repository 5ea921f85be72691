"""int4-group: weights of 4 bits, with a scale and a zero for each group of inputs, as in GPTQ.

W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) with g = i // group and codes of -8 to 7. The grid
of a group goes from min(0, least weight) to max(0, largest weight) in 15 steps, and its zero is one
of the codes; the scale is rounded to bf16, then each weight to the nearest step. A delta that is
the same for all inputs of a group (QA-LoRA's) moves the zeros only:
W + delta = scale * (code - (zero - delta / scale)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank

INT4_GROUP = "int4-group"
"""Name of the quantization."""
GROUP_SIZES = (16, 32, 64, 128)
STEPS = 15
CENTER = 8
"""Nibble, of 0 to 15, that stores code 0."""
LEAST_SCALE = 1e-12
"""Scale of a group of zeros: not 0, so that its zero can be moved as any other."""


@dataclass(frozen=True)
class Int4Weight:
    """A quantized weight [out, in]."""

    codes: Tensor
    """uint8 [out, in / 2]: code + CENTER in half a byte, the first of two in the high half."""
    scales: Tensor
    """bf16 [out, groups]."""
    zeros: Tensor
    """[out, groups]: integers in bf16, or any numbers in fp32 where a delta is folded in."""

    @classmethod
    def quantized(cls, weight: Tensor, group: int) -> Int4Weight:
        """Rounds a weight [out, in] whose `in` is a multiple of `group`."""
        groups = weight.float().view(weight.shape[0], -1, group)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / STEPS).clamp(min=LEAST_SCALE).bfloat16()
        step = scales.float()
        zeros = (-low / step).round().clamp(0, STEPS)
        nibbles = (groups / step[..., None]).round() + zeros[..., None]
        pairs = nibbles.clamp(0, STEPS).to(torch.uint8).view(weight.shape[0], -1, 2)
        codes = pairs[..., 0] << 4 | pairs[..., 1]
        return cls(codes, scales, (zeros - CENTER).bfloat16())

    def dequantized(self) -> Tensor:
        """Returns the weight in effect, fp32 [out, in]; exact unless a delta is in its zeros."""
        nibbles = torch.stack((self.codes >> 4, self.codes & 15), -1).flatten(1)
        return grouped_weight(nibbles, self.scales, self.zeros)

    def folded(self, low_rank: LowRank) -> Int4Weight:
        """Returns this weight plus a delta that `fits`; codes and scales are shared."""
        zeros = folded_zeros(low_rank, self.scales, self.zeros)
        return Int4Weight(self.codes, self.scales, zeros)


def fits(low_rank: LowRank, group: int) -> bool:
    """True if a delta is the same for all inputs of each group, so that it folds into zeros."""
    return low_rank.group % group == 0


def folded_zeros(low_rank: LowRank, scales: Tensor, zeros: Tensor) -> Tensor:
    """Returns fp32 [out, groups]: the zeros, moved by a delta that `fits`."""
    group = low_rank.a.shape[1] // scales.shape[1]
    a, b = low_rank.a[:, ::group].to(scales.device), low_rank.b.to(scales.device)
    return zeros.float() - b.float() @ a.float() / scales.float()


def grouped_weight(nibbles: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """nibbles [out, in], scales and zeros [out, groups] -> fp32 weight [out, in]."""
    codes = (nibbles.float() - CENTER).view(*scales.shape, -1)
    return ((codes - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)


def int4_roundtrip(weight: Tensor, group: int) -> Tensor:
    """Returns a weight [out, in] quantized and dequantized, in its own type; the last group may be
    short.
    """
    columns = weight.shape[1]
    whole = F.pad(weight, (0, -columns % group))
    return Int4Weight.quantized(whole, group).dequantized()[:, :columns].to(weight.dtype)

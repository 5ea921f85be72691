"""int4-group: weights in 4 bits with a scale and a zero for each group of inputs, as GPTQ has them.

W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) with g = i // group and codes of -8 to 7. The grid
of a group goes from min(0, its least weight) to max(0, its largest) in 15 steps, and its zero is
one of the codes; the scale is rounded to bf16, then weights to the nearest step. A delta that is
the same for all inputs of a group (QA-LoRA's) is another zero:
W + delta = scale * (code - (zero - delta / scale)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.model.kernels.reference import linear_rows
from adaplex.model.linear.backend import LinearBackend

INT4_GROUP = "int4-group"
"""Its name as a quantization."""
GROUP_SIZES = (16, 32, 64, 128)
STEPS = 15
CENTER = 8
"""Of the nibbles 0 to 15, the one that is code 0."""
LEAST_SCALE = 1e-12
"""Of a group of zeros, whose zero can be moved as any other's."""


@dataclass(frozen=True)
class Int4Weight:
    """A quantized weight [out, in]."""

    codes: Tensor
    """uint8 [out, in / 2], each code + CENTER in half a byte, the first in the high one."""
    scales: Tensor
    """bf16 [out, groups]."""
    zeros: Tensor
    """[out, groups]; whole numbers in bf16, or any in fp32."""

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
        """The weight in effect, fp32 [out, in]; exact unless a delta is in its zeros."""
        nibbles = torch.stack((self.codes >> 4, self.codes & 15), -1).flatten(1)
        return grouped_weight(nibbles, self.scales, self.zeros)

    def merged(self, low_rank: LowRank) -> Int4Weight:
        """With a delta that `fits`; codes and scales are shared."""
        zeros = merged_zeros(low_rank, self.scales, self.zeros)
        return Int4Weight(self.codes, self.scales, zeros)


Int4Product = Callable[[Tensor, Int4Weight, Tensor | None], Tensor]
"""(x [rows, in], weight, bias [out] or None) -> x W' + bias, [rows, out] in x's type."""


def dequantized_product(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """By torch, which makes the whole weight for each product; the measure of the kernels."""
    y = linear_rows(x, weight.dequantized().to(x.dtype))
    return y if bias is None else y + bias


def int4_product(device: torch.device) -> Int4Product:
    """Triton's on a CUDA device, torch's elsewhere."""
    if device.type != "cuda":
        return dequantized_product
    # Imported here, since only torch for CUDA brings Triton along.
    from adaplex.model.kernels.triton import weight_formats

    return weight_formats.int4_product


class Int4GroupLinear(LinearBackend):
    """int4-group as it was quantized, multiplied by what the device has for it."""

    def __init__(
        self,
        weight: Int4Weight,
        bias: Tensor | None,
        *,
        shares: bool = False,
        product: Int4Product | None = None,
    ) -> None:
        """`shares`: codes and scales are those of another one. `product` is by default the fastest
        here.
        """
        super().__init__((weight.codes.shape[0], weight.codes.shape[1] * 2), bias)
        self.weight, self._shares = weight, shares
        self._product = product or int4_product(weight.codes.device)

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

    def merged_kinds(self, dtype: torch.dtype, device: torch.device) -> list[LinearBackend]:
        """See LinearBackend. What keeps its codes has zeros in fp32."""
        merged = replace(self.weight, zeros=self.weight.zeros.float())
        bias = torch.zeros(self.out_features, dtype=dtype, device=device)
        kept = [Int4GroupLinear(merged, b, product=self._product) for b in (None, bias)]
        return [*kept, *super().merged_kinds(dtype, device)]

    def tensors(self) -> dict[str, Tensor]:
        """See LinearBackend."""
        weight = self.weight
        return {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Int4GroupLinear:
        """What gave these tensors."""
        return cls(Int4Weight(**tensors), bias)

    @property
    def nbytes(self) -> int:
        """See LinearBackend."""
        weight = self.weight
        shared = 0 if self._shares else weight.codes.nbytes + weight.scales.nbytes
        return shared + weight.zeros.nbytes

    def merged(self, low_rank: LowRank, bias: Tensor | None) -> LinearBackend | None:
        """See LinearBackend."""
        if not fits(low_rank, self.group):
            return None
        merged = self.weight.merged(low_rank)
        return Int4GroupLinear(merged, bias, shares=True, product=self._product)

    def merged_bytes(self, low_rank: LowRank) -> int | None:
        """See LinearBackend."""
        return self.weight.zeros.numel() * 4 if fits(low_rank, self.group) else None


def fits(low_rank: LowRank, group: int) -> bool:
    """Whether a delta is the same for all inputs of each group."""
    return low_rank.group % group == 0


def merged_zeros(low_rank: LowRank, scales: Tensor, zeros: Tensor) -> Tensor:
    """fp32 [out, groups]: where the zeros are with a delta that `fits`."""
    group = low_rank.a.shape[1] // scales.shape[1]
    a, b = low_rank.a[:, ::group].to(scales.device), low_rank.b.to(scales.device)
    return zeros.float() - b.float() @ a.float() / scales.float()


def grouped_weight(nibbles: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """fp32 [out, in] of nibbles [out, in], scales and zeros [out, groups]."""
    codes = (nibbles.float() - CENTER).view(*scales.shape, -1)
    return ((codes - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)


def int4_roundtrip(weight: Tensor, group: int) -> Tensor:
    """What int4-group makes of a weight [out, in], in its dtype; the last group may be short."""
    columns = weight.shape[1]
    whole = F.pad(weight, (0, -columns % group))
    return Int4Weight.quantized(whole, group).dequantized()[:, :columns].to(weight.dtype)

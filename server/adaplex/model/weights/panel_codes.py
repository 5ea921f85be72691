"""Weights out of the panels that the C kernels read: how a packed weight is dequantized."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_dense(panels: Tensor, rows: int) -> Tensor:
    """panels [panels, units, 16, per_unit] -> weight [rows, in]."""
    return panels.permute(0, 2, 1, 3).reshape(-1, panels.shape[1] * panels.shape[3])[:rows]


def unpack_groups(packed: Tensor, rows: int) -> Tensor:
    """packed [panels, groups, 16, ..], of `NativeKernels.pack_groups` -> [rows, groups, ..]."""
    return packed.transpose(1, 2).flatten(0, 1)[:rows]


def single_codes(pairs: Tensor) -> Tensor:
    """pairs uint8 [rows, in / 2], as of `NativeKernels.unpack_codes` -> codes of 0 to 15, uint8
    [rows, in].
    """
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def nf4_weight(pairs: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """pairs as in `single_codes`, scales [panels, groups, 16] of groups of inputs, values fp32 [16]
    of the codes -> weight in effect, fp32 [rows, in].
    """
    rows = pairs.shape[0]
    # Two values are looked up at once, as one number of eight bytes.
    both = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1).view(torch.int64)
    found = both.flatten().index_select(0, pairs.to(torch.int32).flatten()).view(torch.float32)
    grouped = found.view(rows, scales.shape[1], -1)
    return grouped.mul_(unpack_groups(scales, rows)[..., None]).view(rows, -1)

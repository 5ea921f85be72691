"""Weights out of the panels that the C kernels read: how a packed weight is dequantized."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_dense(panels: Tensor, rows: int) -> Tensor:
    """panels [panels, units, LANES, per_unit] -> weight [rows, in]."""
    return panels.permute(0, 2, 1, 3).reshape(-1, panels.shape[1] * panels.shape[3])[:rows]


def unpack_groups(packed: Tensor, rows: int) -> Tensor:
    """packed [panels, groups, LANES, ..], of `NativeKernels.pack_groups` -> [rows, groups, ..]."""
    return packed.transpose(1, 2).flatten(0, 1)[:rows]


def code_pairs(panels: Tensor, rows: int) -> Tensor:
    """panels [panels, in / 8, LANES, 2], of `NativeKernels.pack_codes` -> uint8 [rows, in / 2]: the
    codes of two inputs, the first in the low half.
    """
    # A line of a row is 8 inputs: those of even place in one int16, those of odd in the next.
    lines = panels.view(torch.int32)[..., 0].transpose(1, 2).flatten(0, 1)[:rows].contiguous()
    even, odd = _spread(lines & 0xFFFF), _spread(lines >> 16 & 0xFFFF)
    return (even | odd << 4).view(torch.uint8)


def codes(panels: Tensor, rows: int) -> Tensor:
    """panels as in `code_pairs` -> codes of 0 to 15, uint8 [rows, in]."""
    pairs = code_pairs(panels, rows)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def nf4_weight(panels: Tensor, scales: Tensor, rows: int, values: Tensor) -> Tensor:
    """panels as in `code_pairs`, scales [panels, groups, LANES] of groups of inputs, values fp32
    [16] of the codes -> weight in effect, fp32 [rows, in].
    """
    # Two values are looked up at once, as one number of eight bytes.
    both = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)
    pairs = code_pairs(panels, rows).to(torch.int32).flatten()
    found = both.view(torch.int64).flatten().index_select(0, pairs).view(torch.float32)
    grouped = found.view(rows, scales.shape[1], -1)
    return grouped.mul_(unpack_groups(scales, rows)[..., None]).view(rows, -1)


def _spread(halves: Tensor) -> Tensor:
    """int32 of four codes in their low 16 bits -> one code a byte, the lowest first."""
    halves = (halves | halves << 8) & 0x00FF00FF
    return (halves | halves << 4) & 0x0F0F0F0F

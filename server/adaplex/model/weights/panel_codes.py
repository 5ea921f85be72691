"""Weights out of the panels that the C kernels read: how a packed weight is dequantized."""

from __future__ import annotations

from torch import Tensor


def unpack_dense(panels: Tensor, rows: int) -> Tensor:
    """panels [panels, units, 16, per_unit] -> weight [rows, in]."""
    return panels.permute(0, 2, 1, 3).reshape(-1, panels.shape[1] * panels.shape[3])[:rows]


def unpack_groups(packed: Tensor, rows: int) -> Tensor:
    """packed [panels, groups, 16, ..], of `NativeKernels.pack_groups` -> [rows, groups, ..]."""
    return packed.transpose(1, 2).flatten(0, 1)[:rows]


def nf4_weight(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """codes of 0 to 15, uint8 [rows, in], scales [panels, groups, 16] of groups of inputs,
    values fp32 [16] of the codes -> weight in effect, fp32 [rows, in].
    """
    rows = codes.shape[0]
    grouped = values[codes.int()].view(rows, scales.shape[1], -1)
    return grouped.mul_(unpack_groups(scales, rows)[..., None]).view(rows, -1)

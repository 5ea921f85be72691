"""Weights out of panels, two codes at a time, against one code at a time."""

from __future__ import annotations

import pytest
import torch

from adaplex.model.constants import SIMD_LANES
from adaplex.model.weights.nf4 import NF4_BLOCK, NF4_VALUES
from adaplex.model.weights.panel_codes import codes, nf4_weight, unpack_groups

VALUES = torch.tensor(NF4_VALUES).bfloat16().float()
SHAPES = [(3, 64), (16, 128), (70, 192), (321, 128)]
"""[out, in], with panels that are not full."""


def one_at_a_time(panels: torch.Tensor, rows: int) -> torch.Tensor:
    """Codes of 0 to 15, int32 [rows, in]."""
    shifts = torch.arange(0, 16, 4, dtype=torch.int32)
    codes = (panels.to(torch.int32)[..., None] >> shifts) & 15
    # [panels, lines, SIMD_LANES, parity, nibble] -> input 8 line + 2 nibble + parity.
    return codes.permute(0, 2, 1, 4, 3).reshape(panels.shape[0] * SIMD_LANES, -1)[:rows]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_same_to_the_bit(shape: tuple[int, int]) -> None:
    rows, columns = shape
    generator, panels = torch.Generator().manual_seed(rows), -(-rows // SIMD_LANES)
    each = (panels, columns // 8, SIMD_LANES, 2)
    packed = torch.randint(-(1 << 15), 1 << 15, each, dtype=torch.int16, generator=generator)
    scales = torch.rand(panels, columns // NF4_BLOCK, SIMD_LANES, generator=generator)
    expected = one_at_a_time(packed, rows)
    assert expected.unique().tolist() == list(range(16))
    assert torch.equal(codes(packed, rows).int(), expected)
    blocks = VALUES[expected].view(rows, -1, NF4_BLOCK)
    weight = (blocks * unpack_groups(scales, rows)[..., None]).view(shape)
    assert torch.equal(nf4_weight(packed, scales, rows, VALUES), weight)

"""Weights out of panels: as the kernels' own unpacking, which takes a code at a time."""

from __future__ import annotations

import pytest
import torch

from adaplex.model.kernels.native.kernels import LANES, NF4_BLOCK, unpack_codes, unpack_nf4
from adaplex.model.native_linear import NF4_VALUES
from adaplex.model.panel_codes import codes, nf4_weight

VALUES = torch.tensor(NF4_VALUES).bfloat16().float()
SHAPES = [(3, 64), (16, 128), (70, 192), (321, 128)]
"""[out, in], with panels that are not full."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_same_to_the_bit(shape: tuple[int, int]) -> None:
    rows, columns = shape
    generator, panels = torch.Generator().manual_seed(rows), -(-rows // LANES)
    each = (panels, columns // 8, LANES, 2)
    packed = torch.randint(-(1 << 15), 1 << 15, each, dtype=torch.int16, generator=generator)
    scales = torch.rand(panels, columns // NF4_BLOCK, LANES, generator=generator)
    expected = unpack_codes(packed, rows)
    assert expected.unique().tolist() == list(range(16))
    assert torch.equal(codes(packed, rows).int(), expected)
    weight = unpack_nf4(packed, scales, rows, VALUES)
    assert weight.shape == shape
    assert torch.equal(nf4_weight(packed, scales, rows, VALUES), weight)

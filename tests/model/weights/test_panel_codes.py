"""4-bit codes into panels and out again, in the order of every instruction set."""

from __future__ import annotations

import pytest
import torch

from adaplex.model.base.source import default_cache
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.kernels.native.kernels import CODE_LINE, NativeKernels
from adaplex.model.weights.nf4 import NF4_BLOCK, NF4_VALUES
from adaplex.model.weights.panel_codes import nf4_weight, single_codes, unpack_groups
from instruction_sets import each_instruction_set

VALUES = torch.tensor(NF4_VALUES).bfloat16().float()
SHAPES = [(3, 64), (16, 128), (70, 192), (321, 128)]
"""[out, in], with panels that are not full."""


@each_instruction_set
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_come_out_as_they_went_in(
    instructions: InstructionSet, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    kernels = NativeKernels(torch.bfloat16, default_cache(), instructions)
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(rows))
    assert codes.unique().tolist() == list(range(16))
    pairs = codes.view(rows, -1, 2).to(torch.uint8)
    panels = kernels.pack_codes(pairs[..., 0] << 4 | pairs[..., 1])
    assert panels.shape == (-(-rows // 16), columns // 8, CODE_LINE)
    assert torch.equal(single_codes(kernels.unpack_codes(panels, rows)).long(), codes)
    absent = -rows % 16 * columns
    bits = panels.int().view(-1, 1) >> torch.arange(8, dtype=torch.int32) & 1
    present = kernels.pack_codes(torch.full((rows, columns // 2), 0xFF, dtype=torch.uint8))
    assert int((present == 0).sum()) * 2 == absent  # columns beyond `out` are zero
    assert int(bits.sum()) == int((codes[..., None] >> torch.arange(4) & 1).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_weights_are_value_times_scale_to_the_bit(shape: tuple[int, int]) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
    scales = torch.rand(-(-rows // 16), columns // NF4_BLOCK, 16, generator=generator)
    blocks = VALUES[codes.long()].view(rows, -1, NF4_BLOCK)
    weight = (blocks * unpack_groups(scales, rows)[..., None]).view(shape)
    pairs = codes.view(rows, -1, 2)
    assert torch.equal(nf4_weight(pairs[..., 0] | pairs[..., 1] << 4, scales, VALUES), weight)

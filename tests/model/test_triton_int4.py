"""Triton's products by int4-group weights, against torch's. On the GPU, or interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaplex.adapters.primitives import LowRank
from adaplex.adapters.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode
from adaplex.model.int4_group import (
    GROUP_SIZES,
    Int4GroupLinear,
    Int4Weight,
    dequantized_product,
    int4_product,
)
from adaplex.model.kernels import triton_int4
from rig import Rig, prompt

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(100, 384), (64, 128), (5, 1408), (321, 256)]
"""[out, in]: both may end within a block, and splits may be of several blocks or one."""
ROWS = (1, 15, 17, 64, 70)
"""One tile, several, and more than have a program for each split."""
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8 + 1e-5}
"""Of the largest product, from exact: sums are in fp32, and bf16 rounds by half of at most 2^-7."""
TWICE = {torch.float32: 6e-6, torch.bfloat16: 2**-6}
"""From torch, which multiplies the same numbers but adds them in its own order, and which rounds
before a bias and after."""


pytestmark = pytest.mark.usefixtures("round_to_nearest")


def pair(width: int, outs: int, group: int) -> LowRank:
    """A delta that is the same for all inputs of a group."""
    a = torch.randn(4, width // group).mul(0.1).repeat_interleave(group, 1)
    return LowRank(a, torch.randn(outs, 4).mul(0.3), group)


def linear(
    shape: tuple[int, int],
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    biased: bool = True,
    merged: bool = False,
) -> Int4GroupLinear:
    """A random weight, with Triton's product."""
    torch.manual_seed(shape[0] + group)
    weight = Int4Weight.quantized((torch.randn(shape) * 0.1).to(DEVICE), group)
    bias = torch.randn(shape[0]).to(DEVICE, dtype) if biased else None
    made = Int4GroupLinear(weight, bias, product=triton_int4.int4_product)
    if not merged:
        return made
    moved = made.merged(pair(shape[1], shape[0], group), bias)
    assert isinstance(moved, Int4GroupLinear)
    return moved


def exactly(layer: Int4GroupLinear, x: Tensor) -> Tensor:
    """What the product of x's numbers and the weight's in x's type is, fp64."""
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.dequantize().to(x.dtype).double(), bias)


def inputs(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("merged", [False, True], ids=["base", "merged"])
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_equals_torch_on_the_dequantized_weight(
    group: int, dtype: torch.dtype, biased: bool, merged: bool
) -> None:
    for shape in SHAPES:
        layer = linear(shape, group, dtype, biased=biased, merged=merged)
        for rows in ROWS:
            x = inputs(rows, shape[1], dtype)
            exact = exactly(layer, x)
            largest = float((exact if layer.bias is None else exact - layer.bias).abs().max())
            got = layer(x)
            assert got.dtype == dtype
            assert (got - exact).abs().max() <= ROUNDING[dtype] * float(exact.abs().max())
            others = dequantized_product(x, layer.weight, layer.bias)
            assert (got.float() - others.float()).abs().max() <= TWICE[dtype] * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_block_may_be_a_part_of_one(dtype: torch.dtype) -> None:
    """A width that groups divide and blocks do not; what is not there has no weight."""
    layer = linear((70, 208), 16, dtype)
    x = inputs(9, 208, dtype)
    expected = exactly(layer, x)
    assert (layer(x) - expected).abs().max() <= ROUNDING[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_column_is_the_weight_bit_for_bit(dtype: torch.dtype) -> None:
    """Rows of the identity ask for single weights, which no sum rounds."""
    for group, merged in ((16, True), (32, False), (64, True), (128, False)):
        layer = linear((33, 256), group, biased=False, merged=merged)
        one = torch.eye(256, dtype=dtype, device=DEVICE)
        weight = layer.dequantize().to(dtype)
        assert torch.equal(layer(one), weight.T)
        assert torch.equal(layer(one[100:113]), weight.T[100:113])


@pytest.mark.usefixtures("element_by_element")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_among_any_number(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """In either tile, alone in a program for each split or with all splits in one."""
    layer = linear(shape, 32, dtype)
    x = inputs(100, shape[1], dtype)
    whole = layer(x)
    for rows in (*(range(1, 41) if shape == SHAPES[0] else (1, 16, 17, 40)), 64, 65):
        assert torch.equal(layer(x[:rows]), whole[:rows])
    for start, stop in ((7, 8), (20, 45), (99, 100), (30, 100)):
        assert torch.equal(layer(x[start:stop]), whole[start:stop])


def test_the_shape_alone_decides_how_inputs_are_split() -> None:
    for outs, width in [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (48, 208)]:
        split = triton_int4.split_size(outs, width)
        assert split % triton_int4.BLOCK_IN == 0
        splits = -(-width // split)
        programs = splits * -(-outs // triton_int4.BLOCK_OUT)
        blocks = -(-width // triton_int4.BLOCK_IN)
        assert splits == 1 or programs <= triton_int4.PROGRAMS
        assert splits == blocks or programs > triton_int4.PROGRAMS // 2
    assert triton_int4.split_size(4096, 4096) == 1024


def test_rows_may_have_gaps_between_them() -> None:
    layer = linear((100, 384), 64, torch.float32)
    wide = inputs(9, 500, torch.float32)[:, 50:434]
    expected = dequantized_product(wide, layer.weight, layer.bias)
    assert (layer(wide) - expected).abs().max() < 3e-6 * float(expected.abs().max())


def test_one_rows_nan_stays_in_it() -> None:
    for rows in (20, 70):
        layer, x = linear((100, 384), 32), inputs(rows, 384, torch.bfloat16)
        x[3] = torch.nan
        y = layer(x)
        assert bool(torch.isnan(y[3]).all())
        assert bool(torch.isfinite(y[[*range(3), *range(4, rows)]]).all())


def test_cuda_devices_get_triton() -> None:
    assert int4_product(torch.device("cuda")) is triton_int4.int4_product
    assert int4_product(torch.device("cpu")) is dequantized_product
    layer = linear((64, 128), 32)
    delta = pair(128, 64, 32)
    merged = layer.merged(delta, None)
    assert isinstance(merged, Int4GroupLinear)
    assert merged._product is triton_int4.int4_product
    assert (merged.nbytes, layer.merged_bytes(delta)) == (64 * 4 * 4, 64 * 4 * 4)
    again = Int4GroupLinear.restored(layer.tensors(), layer.bias)
    assert again._product is int4_product(DEVICE)
    assert torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.usefixtures("element_by_element")
def test_rows_of_every_mode_share_steps(tiny_model: Callable[[str], Path]) -> None:
    """Base, unmerged and merged rows, by Triton and by torch; and each row alone."""
    programs = []
    for name, group in (("zeros", 32), ("dense", 16)):
        torch.manual_seed(group)
        change = ModuleProgram("model.layers.1.self_attn.q_proj", pair(64, 64, group))
        programs.append(AdapterProgram(name, "qalora", (change,)))
    logits, steps = [], []
    for triton in (True, False):
        rig = Rig(tiny_model("llama"), "int4-group", "fp32", native=False, triton=triton)
        for backend in rig.base.backends.values():
            if triton and isinstance(backend, Int4GroupLinear):
                backend._product = triton_int4.int4_product
        zeros, dense = programs
        adapters = [
            *(None, rig.add(zeros, AdapterMode.MERGED), rig.add(dense, AdapterMode.MERGED)),
            *(rig.add(zeros), rig.add(dense)),
        ]
        rows = [rig.sequence(prompt(9 + 3 * i), a) for i, a in enumerate(adapters)]
        logits.append(rig.prefill(*rows))
        if triton:
            for i, row in enumerate(rows):
                assert torch.equal(rig.prefill(row)[0], logits[0][i])
        for row in rows:
            row.tokens.append(7)
        steps.append(rig.forward(*(Chunk(row, len(row) - 1, 1) for row in rows)))
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert (steps[0] - steps[1]).abs().max() < 1e-4
    assert len({tuple(row.tolist()) for row in logits[0]}) == 5

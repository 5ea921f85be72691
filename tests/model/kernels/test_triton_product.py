"""Triton's products by weights of every format, against torch's. On the GPU, or interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.model.kernels.triton import product as triton_product
from adaplex.model.kernels.triton import weight_formats
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.bitsandbytes_linear import Nf4Linear, quantize_nf4
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.linear.int4_group import Int4GroupLinear
from adaplex.model.weights.int4_group import GROUP_SIZES, Int4Weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CODES = [f"int4-{group}" for group in GROUP_SIZES]
FORMS = ["dense", "nf4", *CODES, "merged int4-16", "merged int4-64"]
SHAPES = [(100, 384), (64, 128), (5, 1408), (321, 256)]
"""Shapes [out, in] that end within a block, and with splits of one and of several blocks."""
ROWS = (1, 15, 17, 70)
"""Rows of one tile, of several tiles, and too many for a program per split."""
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8 + 1e-5}
"""Largest error as a fraction of the largest product: sums are fp32, and bf16 rounds by up to 2^-8.
"""


pytestmark = [pytest.mark.usefixtures("round_to_nearest"), pytest.mark.slow]


def pair(shape: tuple[int, int], group: int) -> LowRank:
    """Returns a low-rank delta that is constant within each group of inputs."""
    a = torch.randn(4, shape[1] // group).mul(0.1).repeat_interleave(group, 1)
    return LowRank(a, torch.randn(shape[0], 4).mul(0.3), group)


def linear(
    form: str,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    biased: bool = True,
) -> LinearBackend:
    """Returns a linear with a random weight that multiplies by Triton."""
    torch.manual_seed(shape[0])
    weight = (torch.randn(shape) * 0.1).to(DEVICE)
    bias = torch.randn(shape[0]).to(DEVICE, dtype) if biased else None
    if form == "dense":
        return DenseLinear(weight.to(dtype), bias, product=weight_formats.dense_product)
    if form == "nf4":
        quantized = quantize_nf4(weight, nested=True)
        return Nf4Linear(*quantized, bias, product=weight_formats.nf4_product)
    group = int(form.partition("-")[2])
    kept = Int4Weight.quantized(weight, group)
    if form.startswith("merged"):
        kept = kept.folded(pair(shape, group))
    return Int4GroupLinear(kept, bias, product=weight_formats.int4_product)


def whole(layer: LinearBackend, dtype: torch.dtype) -> Tensor:
    """Returns the weight as fp64, with the values that products in `dtype` multiply by."""
    if isinstance(layer, Nf4Linear) and layer._weight is not None:
        return layer._weight.dequantized(dtype).double()
    return layer.dequantize().to(dtype).double()


def exactly(layer: LinearBackend, x: Tensor) -> Tensor:
    """Returns the product of x and the weight in fp64."""
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), whole(layer, x.dtype), bias)


def inputs(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_equals_torch_on_the_whole_weight(form: str, dtype: torch.dtype, biased: bool) -> None:
    for shape in SHAPES:
        layer = linear(form, shape, dtype, biased=biased)
        for rows in ROWS:
            x = inputs(rows, shape[1], dtype)
            exact, got = exactly(layer, x), layer(x)
            assert got.dtype == dtype
            assert (got - exact).abs().max() <= ROUNDING[dtype] * float(exact.abs().max())


@pytest.mark.parametrize(("form", "width"), [("dense", 208), ("nf4", 320), ("int4-16", 208)])
def test_a_last_block_may_be_a_part_of_one(form: str, width: int) -> None:
    """Groups divide the width but blocks do not; inputs beyond it must not count."""
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = linear(form, (70, width), dtype), inputs(9, width, dtype)
        expected = exactly(layer, x)
        assert (layer(x) - expected).abs().max() <= ROUNDING[dtype] * float(expected.abs().max())


def test_a_last_split_reads_nothing_behind_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two splits of three blocks each for five blocks, with NaN after the scales."""
    monkeypatch.setattr(triton_product, "PROGRAMS", 4)
    layer, x = linear("nf4", (256, 320), torch.float32), inputs(1, 320, torch.float32)
    assert weight_formats.NF4.split_size(256, 320) == 192
    assert isinstance(layer, Nf4Linear)
    assert layer._weight is not None
    scales = layer._weight.scales
    behind = torch.cat((scales, torch.full_like(scales, torch.nan)))[: len(scales)]
    expected = layer(x)
    layer._weight = replace(layer._weight, scales=behind)
    assert torch.equal(layer(x), expected)
    assert bool(torch.isfinite(expected).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_each_column_is_the_weight_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    """Products by rows of the identity are single weights, which no sum rounds."""
    layer = linear(form, (33, 256), dtype, biased=False)
    one = torch.eye(256, dtype=dtype, device=DEVICE)
    weight = whole(layer, dtype).to(dtype)
    assert torch.equal(layer(one), weight.T)
    assert torch.equal(layer(one[100:113]), weight.T[100:113])


@pytest.mark.usefixtures("element_by_element")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["dense", "nf4", "int4-32"])
def test_a_row_has_the_same_bits_among_any_number(form: str, shape: tuple[int, int]) -> None:
    """Tiles of few and of many rows, with a program per split or for all splits."""
    layer, x = linear(form, shape), inputs(100, shape[1], torch.bfloat16)
    together = layer(x)
    for rows in (*(range(1, 20) if shape == SHAPES[0] else (1, 16, 17)), 40, 64, 65):
        assert torch.equal(layer(x[:rows]), together[:rows])
    for start, stop in ((7, 8), (20, 45), (99, 100), (30, 100)):
        assert torch.equal(layer(x[start:stop]), together[start:stop])


def test_the_shape_alone_decides_how_inputs_are_split() -> None:
    for outs, width in [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (48, 208)]:
        for form in (weight_formats.DENSE, weight_formats.NF4, weight_formats.INT4):
            split = form.split_size(outs, width)
            assert split % form.block_in == 0
            splits = -(-width // split)
            programs = splits * -(-outs // form.block_out)
            blocks = -(-width // form.block_in)
            assert splits == 1 or programs <= triton_product.PROGRAMS
            assert splits == blocks or programs > triton_product.PROGRAMS // 2
    assert weight_formats.INT4.split_size(4096, 4096) == 1024


@pytest.mark.parametrize("form", ["dense", "nf4", "int4-64"])
def test_rows_may_have_gaps_between_them(form: str) -> None:
    layer = linear(form, (100, 384), torch.float32)
    wide = inputs(9, 500, torch.float32)[:, 50:434]
    assert torch.equal(layer(wide), layer(wide.contiguous()))


@pytest.mark.parametrize("form", ["dense", "nf4", "int4-32"])
def test_one_rows_nan_stays_in_it(form: str) -> None:
    for rows in (20, 70):
        layer, x = linear(form, (100, 384)), inputs(rows, 384, torch.bfloat16)
        x[3] = torch.nan
        y = layer(x)
        assert bool(torch.isnan(y[3]).all())
        assert bool(torch.isfinite(y[[*range(3), *range(4, rows)]]).all())

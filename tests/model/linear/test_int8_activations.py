"""Products of 4-bit weights by activations of 8 bits, for every instruction set: those of the
reference, row-invariant, and near the products in float."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.model.base.source import default_cache
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kernels.reference import int8_product, int8_rows
from adaplex.model.linear.native import NativeLinear
from adaplex.model.linear.native_int4 import NativeInt4Linear
from instruction_sets import USABLE, each_instruction_set
from model.linear.row_bits import assert_rows_are_invariant

KINDS = {"nf4": torch.bfloat16, "int4": torch.bfloat16, "int4-fp32": torch.float32}
SHAPES = [(64, 64), (3, 64), (70, 192), (321, 128)]
"""[out, in], some with incomplete panels and groups of panels."""
EachKind = pytest.mark.parametrize("kind", sorted(KINDS))
EachShape = pytest.mark.parametrize("shape", SHAPES)


@cache
def kernels(
    dtype: torch.dtype, instructions: InstructionSet, *, int8: bool = True
) -> NativeKernels:
    return NativeKernels(dtype, default_cache(), instructions, int8_activations=int8)


def layer_of(
    kind: str, shape: tuple[int, int], instructions: InstructionSet, *, int8: bool = True
) -> NativeLinear:
    own, generator = kernels(KINDS[kind], instructions, int8=int8), torch.manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator).mul(0.1).to(KINDS[kind])
    bias = torch.linspace(-1, 1, shape[0]).to(KINDS[kind])
    if kind == "nf4":
        return NativeLinear.nf4(own, weight, bias)
    return NativeInt4Linear.quantized(own, weight, bias, 64 if shape[0] == 321 else 32)


def rows_of(layer: NativeLinear, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, layer.in_features, generator=torch.manual_seed(rows)).to(dtype)


def assert_reference(layer: NativeLinear, x: Tensor) -> None:
    expected, got = int8_product(x, layer.integers(), layer.bias), layer(x)
    assert got.dtype == x.dtype
    # half of the last of the eight bits of bf16 is 1/256 of the value
    relative = 1e-6 if x.dtype == torch.float32 else 1 / 256
    bound = relative * expected.abs() + 1e-6 * max(1, float(expected.abs().max()))
    assert bool(((got.float() - expected).abs() <= bound).all())


@each_instruction_set
@EachKind
@EachShape
def test_is_the_product_of_the_reference(
    kind: str, shape: tuple[int, int], instructions: InstructionSet
) -> None:
    layer = layer_of(kind, shape, instructions)
    for rows in (*range(1, 18), 64):
        assert_reference(layer, rows_of(layer, rows, KINDS[kind]))


@each_instruction_set
@pytest.mark.parametrize("kind", ["int4", "int4-fp32"])
def test_zeros_of_a_folded_delta_are_subtracted(kind: str, instructions: InstructionSet) -> None:
    layer = layer_of(kind, (70, 192), instructions)
    a = torch.randn(2, 6, generator=torch.manual_seed(3)).repeat_interleave(32, -1)
    folded = layer.folded(LowRank(a * 0.01, torch.ones(70, 2), group=32), layer.bias)
    assert isinstance(folded, NativeInt4Linear)
    x = rows_of(layer, 9, KINDS[kind])
    assert_reference(folded, x)
    assert (folded(x) - layer(x)).abs().max() > 0.1


@each_instruction_set
@EachKind
def test_is_near_the_product_in_float(kind: str, instructions: InstructionSet) -> None:
    exact, rounded = (layer_of(kind, (321, 128), instructions, int8=i) for i in (False, True))
    x = rows_of(exact, 64, KINDS[kind])
    expected, got = exact(x).float(), rounded(x).float()
    error = (got - expected).norm() / expected.norm()
    assert 2e-3 < error < 2e-2


@each_instruction_set
@EachKind
@EachShape
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    kind: str, shape: tuple[int, int], instructions: InstructionSet
) -> None:
    layer = layer_of(kind, shape, instructions)
    assert_rows_are_invariant(layer, rows_of(layer, 64, KINDS[kind]))


@each_instruction_set
@EachKind
def test_threads_and_gaps_between_rows_change_no_bit(
    kind: str,
    instructions: InstructionSet,
    use_threads: Callable[[NativeKernels, int], None],
) -> None:
    layer = layer_of(kind, (321, 128), instructions)
    x = torch.randn(13, 150, generator=torch.manual_seed(1)).to(KINDS[kind])[:, 7:135]
    alone = layer(x.contiguous())
    assert torch.equal(layer(x), alone)
    for count in (2, 3):
        use_threads(kernels(KINDS[kind], instructions), count)
        assert torch.equal(layer(x), alone)


@each_instruction_set
@EachKind
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(
    kind: str, value: float, instructions: InstructionSet
) -> None:
    layer = layer_of(kind, (64, 64), instructions)
    x = rows_of(layer, 8, KINDS[kind])
    x[3, 40] = value
    y = layer(x)
    assert not bool(torch.isfinite(y[3]).any())
    assert bool(torch.isfinite(y[[0, 1, 2, 4, 5, 6, 7]]).all())


@each_instruction_set
@EachKind
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
def test_the_smallest_and_largest_rows(
    kind: str, scale: float, instructions: InstructionSet
) -> None:
    layer = layer_of(kind, (64, 64), instructions)
    x = rows_of(layer, 3, torch.float32).mul(scale).to(KINDS[kind])
    assert_reference(layer, x)
    if scale < 1:
        assert layer.bias is not None
        assert torch.equal(layer(x), layer.bias.expand(3, -1))


def test_the_reference_multiplies_what_its_parts_stand_for() -> None:
    for kind in KINDS:
        layer = layer_of(kind, (70, 192), USABLE[0])
        x = rows_of(layer, 5, torch.float32)
        values, scales = int8_rows(x)
        assert values.abs().amax() == 127
        rounded = (values.float() * scales[..., None]).flatten(1)
        assert (rounded - x).abs().max() <= x.abs().max() / 254
        bias = None if layer.bias is None else layer.bias.float()
        expected = F.linear(rounded, layer.integers().dequantized(), bias)
        assert torch.allclose(int8_product(x, layer.integers(), bias), expected, atol=1e-5)
        # nf4 is rounded to integers, int4-group has them already
        error = (layer.integers().dequantized() - layer.dequantize()).norm()
        bound = 0.01 if kind == "nf4" else 1e-6
        assert error <= bound * layer.dequantize().norm()

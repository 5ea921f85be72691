"""NativeLinear for every instruction set: correct, row-invariant, quantized as by bitsandbytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb_functional
from torch import Tensor

from adaplex.model.base.saved_base import LAYOUT
from adaplex.model.base.source import default_cache
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.linear.native import NativeLinear, native_linear
from adaplex.model.linear.native_int4 import NativeInt4Linear
from instruction_sets import USABLE, each_instruction_set
from model.linear.row_bits import assert_rows_are_invariant

KINDS = {
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16},
    **{"int4": torch.bfloat16, "int4-fp32": torch.float32},
}
INT4 = {"int4", "int4-fp32"}
SHAPES = {
    "fp32": [(64, 64), (1, 1), (70, 37), (321, 131)],
    "bf16": [(64, 64), (3, 2), (70, 38), (321, 130)],
    "nf4": [(64, 64), (3, 64), (70, 192), (321, 128)],
    "int4": [(64, 64), (3, 32), (70, 96), (321, 128)],
    "int4-fp32": [(64, 64), (3, 32), (70, 96), (321, 128)],
}
"""Kind -> shapes [out, in], some with incomplete panels and groups of panels."""

EachShape = pytest.mark.parametrize(
    ("kind", "shape"), [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]
)


@cache
def kernels(dtype: torch.dtype, instructions: InstructionSet) -> NativeKernels:
    return NativeKernels(dtype, default_cache(), instructions)


def weight_of(kind: str, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).mul(0.1).to(KINDS[kind])


def layer_of(
    kind: str, shape: tuple[int, int], instructions: InstructionSet, *, biased: bool = True
) -> NativeLinear:
    bias = torch.linspace(-1, 1, shape[0]).to(KINDS[kind]) if biased else None
    return made(kind, weight_of(kind, shape), bias, instructions)


def made(
    kind: str, weight: Tensor, bias: Tensor | None, instructions: InstructionSet
) -> NativeLinear:
    own = kernels(KINDS[kind], instructions)
    if kind in INT4:
        return NativeInt4Linear.quantized(own, weight, bias, 32)
    layer = native_linear(own, weight, bias, nf4=kind == "nf4")
    assert layer is not None
    assert (layer.scales is not None) == (kind == "nf4")
    return layer


def rows_of(layer: NativeLinear, rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, layer.in_features, generator=torch.manual_seed(rows)).to(dtype)


@each_instruction_set
@EachShape
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_multiplies_by_the_weight_it_reports(
    kind: str, shape: tuple[int, int], biased: bool, instructions: InstructionSet
) -> None:
    layer = layer_of(kind, shape, instructions, biased=biased)
    for rows in (*range(1, 18), 64):
        x = rows_of(layer, rows, KINDS[kind])
        bias = None if layer.bias is None else layer.bias.float()
        expected = F.linear(x.float(), layer.dequantize(), bias)
        got = layer(x)
        assert got.dtype == x.dtype
        # bf16 results have eight bits: half of the last one is 1/256 of the value
        bound = 1e-5 if x.dtype == torch.float32 else 5e-3
        assert (got.float() - expected).abs().max() <= bound * max(1, float(expected.abs().max()))


@each_instruction_set
@EachShape
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    kind: str, shape: tuple[int, int], instructions: InstructionSet
) -> None:
    layer = layer_of(kind, shape, instructions)
    assert_rows_are_invariant(layer, rows_of(layer, 64, KINDS[kind]))


@each_instruction_set
@EachShape
def test_threads_change_no_bit(
    kind: str,
    shape: tuple[int, int],
    instructions: InstructionSet,
    use_threads: Callable[[NativeKernels, int], None],
) -> None:
    layer = layer_of(kind, shape, instructions)
    x = rows_of(layer, 13, KINDS[kind])
    alone = layer(x)
    for count in (2, 3):
        use_threads(kernels(KINDS[kind], instructions), count)
        assert torch.equal(layer(x), alone)


@each_instruction_set
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows_may_have_gaps_between_them(kind: str, instructions: InstructionSet) -> None:
    layer = layer_of(kind, SHAPES[kind][2], instructions)
    x = torch.randn(9, layer.in_features + 20).to(KINDS[kind])[:, 7 : 7 + layer.in_features]
    assert not x.is_contiguous()
    assert torch.equal(layer(x), layer(x.contiguous()))


@each_instruction_set
def test_nf4_has_the_values_of_bitsandbytes_in_bf16(instructions: InstructionSet) -> None:
    table = bnb_functional.get_4bit_type("nf4", device="cpu")
    # one block per row, of codes 0 to 15 four times; the largest value is 1
    weight = table.repeat(4).expand(16, 64).bfloat16()
    layer = NativeLinear.nf4(kernels(torch.bfloat16, instructions), weight, None)
    each = layer(torch.eye(64, dtype=torch.bfloat16))
    assert torch.equal(each, weight.T)
    assert torch.equal(layer.dequantize(), weight.float())


@pytest.mark.parametrize("shape", SHAPES["nf4"])
def test_nf4_is_what_bitsandbytes_quantizes_to(shape: tuple[int, int]) -> None:
    weight = weight_of("nf4", shape)
    codes, state = bnb_functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    state.dtype = torch.float32
    exact = bnb_functional.dequantize_4bit(codes, state)
    found = layer_of("nf4", shape, USABLE[0]).dequantize()
    assert found.shape == exact.shape
    # rounding a table value to bf16 changes it by at most 1/256
    assert bool(((found - exact).abs() <= exact.abs() / 256).all())


def test_dense_gives_its_weight_back() -> None:
    for kind in ("fp32", "bf16"):
        for shape in SHAPES[kind]:
            layer = layer_of(kind, shape, USABLE[0])
            assert torch.equal(layer.dequantize(), weight_of(kind, shape).float())


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_four_bits_take_a_third_of_bf16(kind: str) -> None:
    dense, packed = (layer_of(each, (256, 256), USABLE[0]) for each in ("bf16", kind))
    assert packed.nbytes < 0.33 * dense.nbytes


def test_a_width_without_blocks_keeps_nf4_values_dense_and_an_odd_one_has_no_panels() -> None:
    bf16 = kernels(torch.bfloat16, USABLE[0])
    dense = native_linear(bf16, weight_of("bf16", (70, 38)), None, nf4=True)
    assert dense is not None
    assert dense.scales is None
    assert len(dense.dequantize().unique()) < 16 * 70 < 38 * 70
    assert native_linear(bf16, weight_of("bf16", (70, 37)), None, nf4=False) is None


@each_instruction_set
def test_one_rows_nan_stays_in_it(instructions: InstructionSet) -> None:
    for kind in KINDS:
        layer = layer_of(kind, (64, 64), instructions)
        x = rows_of(layer, 8, KINDS[kind])
        x[3] = torch.nan
        y = layer(x)
        assert bool(torch.isnan(y[3]).all())
        assert bool(torch.isfinite(y[[0, 1, 2, 4, 5, 6, 7]]).all())


@EachShape
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_is_restored_from_its_tensors_bit_for_bit(
    kind: str, shape: tuple[int, int], biased: bool
) -> None:
    layer = layer_of(kind, shape, USABLE[0], biased=biased)
    own = kernels(KINDS[kind], USABLE[0])
    again = type(layer).restored(own, layer.tensors(), shape, layer.bias)
    x = rows_of(layer, 9, KINDS[kind])
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert again.nbytes == layer.nbytes


PACKED = {
    "fp32": "aab5855bfc2baed4be0493a3a9da70f8d7af0ba14f1430a80a3d57ac93044b6b",
    "bf16": "44f16acf78164e89c2b63202441bb7ec5476590278b9488ccf47a67ac51702e4",
    "nf4": "395c0c68e429ebf042962f4f43c6d1a15d5e9cbbb30808baf0883fcbd8820875",
    **dict.fromkeys(INT4, "c9acfbaeafce87facc43ccfd5d32e48a341565a947f31fda169b8066dbb02c0f"),
}
"""SHA-256 of the packed tensors of a small weight, codes in the wide lines of AVX512."""
NARROW = {
    **PACKED,
    "nf4": "a48faf8fa1ea24cb96ac2786281fd415e1e9421bddc7f3c310dc117badef0358",
    **dict.fromkeys(INT4, "52da9686df599a21c1b0c2bb88a0658249e3ad2ed078c394e397f07441155d29"),
}
"""SHA-256 of the same tensors, codes in the narrow lines of the other sets."""


@each_instruction_set
@pytest.mark.parametrize("kind", sorted(PACKED))
def test_saved_panels_stay_readable(kind: str, instructions: InstructionSet) -> None:
    """Other panels are a new layout, for which `saved_base.LAYOUT` must be raised."""
    ramp = torch.arange(35 * 128).reshape(35, 128).remainder(251).sub(125) / 8
    layer = made(kind, ramp.to(KINDS[kind]), None, instructions)
    total = hashlib.sha256()
    for tensor in layer.tensors().values():
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    packed = PACKED if "avx512" in instructions.name else NARROW
    assert (LAYOUT, total.hexdigest()) == (5, packed[kind])

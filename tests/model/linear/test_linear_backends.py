"""Linear backends: right, row-invariant, and by the weight that they report."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb_functional
from torch import Tensor

from adaplex.model.kernels import onednn
from adaplex.model.linear import bitsandbytes_linear
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.linear.bitsandbytes_linear import (
    Int8Linear,
    Nf4Linear,
    make_linear,
    quantize_nf4,
)
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.linear.int4_group import Int4GroupLinear
from adaplex.model.linear.native_int4 import int4_linear
from adaplex.model.linear.products import Products
from adaplex.model.weights.nf4 import NF4_VALUES

KINDS = ["nf4", "int8", "int4-group", "bf16", "fp32"]
SHAPES = [(64, 64), (96, 128), (48, 80), (320, 64)]


def backend(shape: tuple[int, int], quantization: str, *, biased: bool) -> LinearBackend:
    generator = torch.Generator().manual_seed(shape[0])
    dtype = torch.float32 if quantization == "fp32" else torch.bfloat16
    weight = torch.randn(shape, generator=generator).mul(0.1).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if biased else None
    if quantization == "int4-group":
        return int4_linear(None, Products(), weight, bias, 32)
    return make_linear(weight, bias, quantization, Products())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("quantization", KINDS)
def test_multiplies_by_the_weight_it_reports(
    shape: tuple[int, int], quantization: str, biased: bool
) -> None:
    layer = backend(shape, quantization, biased=biased)
    x = torch.randn(9, shape[1]).to(torch.float32 if quantization == "fp32" else torch.bfloat16)
    bias = None if layer.bias is None else layer.bias.float()
    expected = F.linear(x.float(), layer.dequantize(), bias)
    bound = {"fp32": 1e-5, "int8": 4e-2}.get(quantization, 2e-2) * float(expected.abs().max())
    assert (layer(x).float() - expected).abs().max() < bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantization", KINDS)
def test_every_row_has_the_same_bits_in_any_batch(
    shape: tuple[int, int], quantization: str
) -> None:
    layer = backend(shape, quantization, biased=True)
    x = torch.randn(67, shape[1]).to(torch.float32 if quantization == "fp32" else torch.bfloat16)
    whole = layer(x)
    for start, stop in ((0, 1), (1, 3), (3, 8), (8, 67)):
        assert torch.equal(layer(x[start:stop]), whole[start:stop])


def test_nf4_takes_a_quarter_of_bf16() -> None:
    weight = torch.randn(256, 256, dtype=torch.bfloat16)
    whole = make_linear(weight, None, "bf16", Products())
    packed = make_linear(weight, None, "nf4", Products())
    if isinstance(packed, Nf4Linear):
        assert packed.nbytes < 0.3 * whole.nbytes
    assert (packed.dequantize() - weight.float()).abs().max() < 0.6


@pytest.mark.parametrize(
    ("shape", "dtype"), [((48, 64), torch.bfloat16), ((64, 80), torch.bfloat16)]
)
def test_shapes_without_a_kernel_keep_nf4_values_dense(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, dtype=dtype)
    layer = make_linear(weight, None, "nf4", Products())
    assert isinstance(layer, DenseLinear)
    assert torch.equal(layer.dequantize(), bitsandbytes_linear.nf4_roundtrip(weight).float())


def test_a_cpu_without_the_kernel_gets_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    fast = make_linear(weight, None, "nf4", Products()).dequantize()
    monkeypatch.setattr(bitsandbytes_linear.bnb_functional, "has_avx512bf16", lambda: False)
    slow = make_linear(weight, None, "nf4", Products())
    assert isinstance(slow, DenseLinear)
    assert (slow.dequantize() - fast).abs().max() < 0.01 * fast.abs().max()


def test_int8_rows_ignore_outliers_of_their_batch_mates() -> None:
    layer = backend((64, 64), "int8", biased=False)
    assert isinstance(layer, Int8Linear)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    alone = layer(x)[0]
    x[3, 5] = 900.0
    assert torch.equal(layer(x)[0], alone)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("quantization", KINDS)
def test_is_restored_from_its_tensors_bit_for_bit(
    shape: tuple[int, int], quantization: str, biased: bool
) -> None:
    layer = backend(shape, quantization, biased=biased)
    assert isinstance(layer, DenseLinear | Nf4Linear | Int8Linear | Int4GroupLinear)
    again = layer.restored(layer.tensors(), layer.bias)
    x = torch.randn(9, shape[1]).to(torch.float32 if quantization == "fp32" else torch.bfloat16)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert (again.nbytes, again.out_features, again.in_features) == (layer.nbytes, *shape)
    for name, tensor in layer.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_nested_maxima_are_restored_bit_for_bit() -> None:
    """As stored on CUDA devices; quantizing and dequantizing run on a CPU too."""
    data, state = quantize_nf4(torch.randn(64, 512, dtype=torch.bfloat16), nested=True)
    packed = state.as_dict(packed=True)
    assert "nested_absmax" in packed
    again = bnb_functional.QuantState.from_dict(dict(packed), data.device)
    assert torch.equal(
        bnb_functional.dequantize_4bit(data, again), bnb_functional.dequantize_4bit(data, state)
    )


def test_nf4_has_the_values_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(NF4_VALUES), bnb_functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_processor_that_cannot_prepack_multiplies_without(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> Tensor:
        raise RuntimeError("bf16 path needs the cpu support avx512bw\nand a long trace")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    onednn._probe.cache_clear()
    try:
        weight, x = torch.randn(48, 80).to(dtype), torch.randn(9, 80).to(dtype)
        layer, other = DenseLinear(weight, None), DenseLinear(weight, None)
        assert torch.equal(layer.dequantize(), weight.float())
        y = layer(x)
        assert (y.float() - x.float() @ weight.float().T).abs().max() < 0.1
        assert torch.equal(y, other(x))
        for row in range(9):
            assert torch.equal(layer(x[row : row + 1])[0], y[row])
    finally:
        onednn._probe.cache_clear()
    (line,) = caplog.messages
    assert line.endswith("needs the cpu support avx512bw")

"""Models whose linears multiply as on a CUDA device: by Triton, here interpreted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.request import AdapterMode
from adaplex.model import select
from adaplex.model.kernels import reference
from adaplex.model.kernels.triton import weight_formats
from adaplex.model.kernels.triton.product import EVERY_TILE
from adaplex.model.linear.bitsandbytes_linear import Nf4Linear
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.linear.int4_group import Int4GroupLinear
from adaplex.model.linear.products import Products
from adaplex.model.weights.nf4 import Nf4Weight
from rig import ModelRig, prompt

pytestmark = pytest.mark.slow

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
KINDS = {"nf4": Nf4Linear, "int4-group": Int4GroupLinear, "fp32": DenseLinear}


def nf4_by_torch(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
    """An Nf4Product in torch, which dequantizes the whole weight."""
    return reference.dense_product(x, weight.dequantized().to(x.dtype), bias)


def delta(name: str, group: int) -> AdapterProgram:
    """Returns an adapter of one delta, the same for all inputs of a group."""
    torch.manual_seed(group)
    a = torch.randn(4, 64 // group).mul(0.1).repeat_interleave(group, 1)
    pair = LowRank(a, torch.randn(64, 4).mul(0.3), group)
    change = ModuleProgram("model.layers.1.self_attn.q_proj", pair)
    return AdapterProgram(name, "qalora", (change,))


def steps(rig: ModelRig, *, alone: bool) -> list[Tensor]:
    """Returns the logits of a prompt and of one more token, of base, unmerged and merged rows.

    With `alone`, asserts that each row has the same bits by itself.
    """
    programs = [delta("zeros", 32), delta("dense", 16)]
    modes = (AdapterMode.MERGED, AdapterMode.UNMERGED)
    adapters = [None, *(rig.add(program, mode) for mode in modes for program in programs)]
    rows = [rig.sequence(prompt(9 + 3 * i), adapter) for i, adapter in enumerate(adapters)]
    prompts = rig.prefill(*rows)
    if alone:
        assert all(torch.equal(rig.prefill(row)[0], prompts[i]) for i, row in enumerate(rows))
    for row in rows:
        row.tokens.append(7)
    tokens = rig.decode(*rows)
    if alone:
        for i, row in enumerate(rows):
            assert torch.equal(rig.decode(row)[0], tokens[i])
    assert len({tuple(row.tolist()) for row in prompts}) == 5
    return [prompts, tokens]


@pytest.mark.usefixtures("element_by_element", "cuda_products")
@pytest.mark.parametrize("quantization", KINDS)
def test_rows_of_every_mode_share_steps(
    quantization: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton and by torch; and each row alone."""
    rig = ModelRig(tiny_model("llama"), quantization, "fp32", triton=True)
    kinds = {type(b) for name, b in rig.base.backends.items() if "layers" in name}
    assert kinds == {KINDS[quantization]}
    got = steps(rig, alone=True)
    monkeypatch.undo()
    monkeypatch.setattr(select, "products", lambda _: Products(nf4=nf4_by_torch))
    expected = steps(ModelRig(tiny_model("llama"), quantization, "fp32", native=False), alone=False)
    for mine, others in zip(got, expected, strict=True):
        assert (mine - others).abs().max() < 1e-4


@pytest.mark.usefixtures("element_by_element", "cuda_products")
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_experts_give_a_row_the_same_bits_in_any_batch(
    architecture: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of gpt_oss are transposed, and have biases."""
    logits = []
    for triton in (True, False):
        rig = ModelRig(tiny_model(architecture), "fp32", native=False, triton=triton)
        rows = [rig.sequence(prompt(5 + 3 * i, seed=i)) for i in range(3)]
        logits.append(rig.prefill(*rows))
        if triton:
            for i, row in enumerate(rows):
                assert torch.equal(rig.prefill(row)[0], logits[0][i])
        monkeypatch.undo()
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_nf4_is_what_bitsandbytes_makes_of_it() -> None:
    torch.manual_seed(3)
    nf4_product = weight_formats.nf4_product
    layer = Nf4Linear.quantized(torch.randn(96, 320), None, nf4_product)
    assert layer._weight is not None
    assert torch.equal(layer._weight.dequantized(), layer.dequantize())
    again = Nf4Linear.restored(layer.tensors(), None, nf4_product)
    assert torch.equal(again.dequantize(), layer.dequantize())


def test_cuda_devices_get_triton() -> None:
    found = select.products(CUDA)
    assert found.int4 is weight_formats.int4_product
    assert found.dense is weight_formats.dense_product
    assert found.nf4 is weight_formats.nf4_product
    assert found.row_counts == EVERY_TILE
    on_cpu = select.products(CPU)
    assert on_cpu.int4 is reference.int4_product
    assert on_cpu.dense is reference.dense_product
    assert on_cpu.nf4 is None
    assert Nf4Linear.serves((5, 128), torch.float32, found.nf4)
    assert not Nf4Linear.serves((128, 96), torch.bfloat16, found.nf4)


def test_folded_codes_keep_their_product() -> None:
    layer = Int4GroupLinear.restored(
        {
            "codes": torch.zeros(64, 32, dtype=torch.uint8),
            "scales": torch.ones(64, 2, dtype=torch.bfloat16),
            "zeros": torch.zeros(64, 2, dtype=torch.bfloat16),
        },
        None,
        weight_formats.int4_product,
    )
    low_rank = delta("zeros", 32).modules[0].low_rank
    assert low_rank is not None
    folded = layer.folded(low_rank, None)
    assert isinstance(folded, Int4GroupLinear)
    assert folded._product is weight_formats.int4_product
    assert (folded.nbytes, layer.folded_bytes(low_rank)) == (64 * 2 * 4, 64 * 2 * 4)

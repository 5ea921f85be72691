"""int4-group: GPTQ's grid, and QA-LoRA folded into its zeros without loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.primitives import LowRank
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.model.linear.int4_group import Int4GroupLinear
from adaplex.model.linear.native_int4 import NativeInt4Linear, int4_linear
from adaplex.model.linear.products import Products
from adaplex.model.weights.int4_group import GROUP_SIZES, Int4Weight, folded_zeros, int4_roundtrip
from rig import ModelRig, prompt

GROUP = 32
MERGED, UNMERGED = AdapterMode.MERGED, AdapterMode.UNMERGED
SITES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
WIDTHS = {"mlp.down_proj": (64, 128), "mlp.up_proj": (128, 64)}
Both = pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])


def weight_of(out: int, width: int, *, offset: float = 0.0) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(width)) * 0.1 + offset


def gptq(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Returns dequantized weight and steps of the asymmetric 4-bit grid of GPTQ's Quantizer."""
    x = weight.view(-1, group)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = ((high - low) / 15)[:, None]
    zero = torch.round(-low[:, None] / scale)
    codes = torch.clamp(torch.round(x / scale) + zero, 0, 15)
    return (scale * (codes - zero)).view_as(weight), scale.expand_as(x).reshape(weight.shape)


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_the_grid_is_gptqs_with_scales_in_bf16(group: int, offset: float) -> None:
    weight = weight_of(24, 256, offset=offset)
    expected, step = gptq(weight, group)
    found = Int4Weight.quantized(weight, group).dequantized()
    assert ((found - weight).abs() <= 0.54 * step).all()  # half a step, and 15 of 1/512 too small
    assert (found - weight).square().mean() < 1.02 * (expected - weight).square().mean()


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_group_of_one_value_is_kept(value: float) -> None:
    weight = torch.full((3, 64), value)
    found = Int4Weight.quantized(weight, 32).dequantized()
    assert torch.allclose(found, weight, rtol=2**-8, atol=0)


def test_a_short_last_group_has_a_grid_of_its_own() -> None:
    weight = weight_of(5, 80)
    found = int4_roundtrip(weight, 32)
    assert torch.equal(found[:, :64], Int4Weight.quantized(weight[:, :64], 32).dequantized())
    assert (found - weight).abs().max() < 0.06 < weight.abs().max()
    layer = int4_linear(None, Products(), weight, None, 32)
    assert torch.equal(layer.dequantize(), found)


@pytest.mark.parametrize("group", [32, 64])
def test_a_grouped_delta_is_another_zero(group: int) -> None:
    made = Int4Weight.quantized(torch.cat((weight_of(24, 128), torch.zeros(1, 128))), 32)
    pair = grouped_pair(25, 128, group, seed=1)
    merged = made.folded(pair)
    expected = made.dequantized().double() + (pair.b.double() @ pair.a.double())
    assert (merged.dequantized() - expected).abs().max() < 1e-6 * expected.abs().max()
    assert merged.codes is made.codes
    assert merged.scales is made.scales
    assert folded_zeros(pair, made.scales, made.zeros).dtype == torch.float32


def grouped_pair(out: int, width: int, group: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, width // group, generator=generator).mul(0.1).repeat_interleave(group, 1)
    return LowRank(a, torch.randn(out, 4, generator=generator).mul(0.3), group)


def qa_lora(digest: str, group: int, seed: int) -> AdapterProgram:
    """Returns an adapter on some linears of the middle layer, one with a bias."""
    modules = [
        ModuleProgram(
            f"model.layers.1.{site}",
            grouped_pair(*WIDTHS.get(site, (64, 64)), group, seed + i),
            bias=torch.linspace(-0.1, 0.1, 64) if site == "self_attn.o_proj" else None,
        )
        for i, site in enumerate(SITES)
    ]
    return AdapterProgram(digest, "qalora", tuple(sorted(modules, key=lambda m: m.module)))


def rows(rig: ModelRig, *refs: AdapterRef | None) -> list[Tensor]:
    return list(rig.prefill(*(rig.sequence(prompt(9 + 7 * i), r) for i, r in enumerate(refs))))


def alone(rig: ModelRig, *refs: AdapterRef | None) -> list[Tensor]:
    return [rig.prefill(rig.sequence(prompt(9 + 7 * i), r))[0] for i, r in enumerate(refs)]


@pytest.fixture(params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Path:
    """One model for the C decoder, and one whose layers run one by one."""
    return tiny_model(request.param)


@Both
@pytest.mark.parametrize("group", [GROUP, 2 * GROUP])
def test_merged_is_unmerged_and_the_base_is_left_alone(
    native: bool, group: int, model: Path
) -> None:
    rig = ModelRig(model, "int4-group", "fp32", native=native, group_size=GROUP)
    program = qa_lora("q", group, seed=3)
    before = alone(rig, None, None, None)
    unmerged = alone(rig, *[rig.add(program, UNMERGED)] * 3)
    merged = alone(rig, *[rig.add(program, MERGED)] * 3)
    between = alone(rig, None, None, None)
    rig.runner.remove_merged("q")
    rig.runner.remove_adapter("q")
    after = alone(rig, None, None, None)
    for i in range(3):
        assert (merged[i] - unmerged[i]).abs().max() < 1e-5
        assert (merged[i] - before[i]).abs().max() > 1e-2
        assert torch.equal(before[i], between[i])
        assert torch.equal(before[i], after[i])


@Both
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_beside_rows_of_every_other_mode(
    native: bool, dtype: str, model: Path
) -> None:
    rig = ModelRig(model, "int4-group", dtype, native=native, group_size=GROUP)
    zeros, dense = qa_lora("zeros", GROUP, seed=3), qa_lora("dense", GROUP // 2, seed=11)
    refs = [
        *(None, rig.add(zeros, MERGED), rig.add(dense, MERGED), rig.add(zeros, UNMERGED)),
        *(None, rig.add(dense, UNMERGED), rig.add(zeros, MERGED), None, rig.add(dense, MERGED)),
    ]
    single = alone(rig, *refs)
    for together, expected in zip(rows(rig, *refs), single, strict=True):
        assert torch.equal(together, expected)
    # merged rows alone, of one adapter and of two
    for mix in ([refs[1]] * 4, [refs[1], refs[1], refs[2], refs[2]]):
        for together, expected in zip(rows(rig, *mix), alone(rig, *mix), strict=True):
            assert torch.equal(together, expected)


@Both
def test_a_merged_copy_is_its_zeros(native: bool, model: Path) -> None:
    rig = ModelRig(model, "int4-group", "fp32", native=native, group_size=GROUP)
    zeros, dense = qa_lora("zeros", GROUP, seed=3), qa_lora("dense", GROUP // 2, seed=11)
    for program in (zeros, dense):
        rig.add(program, MERGED)
    base, merged = rig.base.backends, rig.runner._adapters._folded
    for name, linear in merged["zeros"].linears.items():
        kept = base[name]
        assert isinstance(linear, NativeInt4Linear if native else Int4GroupLinear)
        assert linear.nbytes == kept.out_features * kept.in_features // GROUP * 4
        assert linear.bias is None or linear.bias.shape == (kept.out_features,)
        shared = "panels" if native else "codes"
        assert linear.tensors()[shared].data_ptr() == kept.tensors()[shared].data_ptr()
    assert not merged["zeros"].rest.sites
    made = sum(linear.nbytes for linear in merged["zeros"].linears.values())
    found = rig.runner.measure_merge(zeros)
    assert found.nbytes == made
    sizes = {name: linear.out_features * linear.in_features for name, linear in base.items()}
    inner = sum(size for name, size in sizes.items() if not rig.base.spec.modules[name].is_head)
    part = sum(sizes[m.module] for m in zeros.modules) / inner
    assert 0 < part < 0.5
    assert (found.dense, found.kept) == (0.0, part)
    weights = sum(base[m.module].out_features * base[m.module].in_features for m in dense.modules)
    found = rig.runner.measure_merge(dense)
    assert found.nbytes == weights * 4
    assert (found.dense, found.kept) == (part, 0.0)

"""Triton's kernels for every primitive against the reference in torch, over adapter mixes. On the
GPU, or interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.primitives import Activation, Bottleneck, LowRank, Reads, ReplacedRows
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.model.adapters.packing import Packer
from adaplex.model.adapters.torch_rows import TorchRows, TorchRun
from adaplex.model.adapters.triton_rows import TritonKernels
from adaplex.model.kernels.low_rank import ReferenceLowRank
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.select import products
from adaplex.model.step.step_context import AdapterRows
from adaplex.model.weights.adapter_weights import AdapterRun, AdapterWeights
from mixes import MIXES, ROWS, runs_of_mix

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, OUT, VOCABULARY, EXPERTS = 40, 150, 90, 2
NUMBERS = {"linear": 0, "head": 1, "norm": 2, "embedding": 3, "block": 4, "experts": 5, "no": 6}
MODULES = {
    module.name: module
    for module in (
        BaseModule("linear", "linear", HIDDEN, OUT, has_bias=True),
        BaseModule("head", "linear", HIDDEN, VOCABULARY, is_head=True),
        BaseModule("norm", "norm", HIDDEN, HIDDEN),
        BaseModule("embedding", "embedding", VOCABULARY, HIDDEN),
        BaseModule("block", "block", HIDDEN, HIDDEN, part="mlp", joins=True),
        BaseModule("experts", "experts", HIDDEN, OUT, experts=EXPERTS),
        BaseModule("no", "linear", HIDDEN, OUT),
    )
}
VIRTUAL = 3


def rand(*shape: int, size: float = 0.4) -> Tensor:
    return torch.randn(shape) * size


def bottleneck(width: int, activation: Activation, reads: Reads, *, bias: bool) -> Bottleneck:
    biases = (rand(width), rand(HIDDEN)) if bias else (None, None)
    down, up = rand(width, HIDDEN), rand(HIDDEN, width)
    return Bottleneck(down, up, *biases, activation=activation, reads=reads)


def made() -> list[list[ModuleProgram]]:
    """Six adapters, each with other changes."""
    pair = LowRank(rand(5, HIDDEN), rand(OUT, 5))
    some = ReplacedRows((1, 4, 70, 89), rand(4, HIDDEN))
    many = ReplacedRows(tuple(range(2, 40)), rand(38, HIDDEN))
    table = LowRank(rand(20, VOCABULARY), rand(HIDDEN, 20), lookup=True)
    shapes = [
        bottleneck(17, Activation.RELU, Reads.OUTPUT, bias=True),
        bottleneck(3, Activation.GELU, Reads.SUM, bias=True),
        bottleneck(8, Activation.GELU_TANH, Reads.INPUT, bias=False),
        bottleneck(20, Activation.SILU, Reads.RESIDUAL, bias=True),
        bottleneck(2, Activation.TANH, Reads.SUM, bias=False),
        bottleneck(5, Activation.LEAKY_RELU, Reads.OUTPUT, bias=True),
    ]
    return [
        [ModuleProgram("linear", pair), ModuleProgram("block", bottleneck=shapes[0])],
        [
            ModuleProgram("linear", pair, rand(OUT), 1.0, rand(OUT), rand(HIDDEN)),
            ModuleProgram("head", output_scale=rand(VOCABULARY), rows=some),
            ModuleProgram("embedding", rows=some),
            ModuleProgram("norm", weight=rand(HIDDEN, size=2)),
            ModuleProgram("block", bottleneck=shapes[1]),
        ],
        [
            ModuleProgram("linear", output_scale=rand(OUT)),
            ModuleProgram("embedding", virtual=rand(VIRTUAL, HIDDEN)),
            ModuleProgram("experts", LowRank(rand(6, HIDDEN), rand(OUT, 6))),
            ModuleProgram("block", bottleneck=shapes[2]),
        ],
        [
            ModuleProgram("linear", bias=rand(OUT)),
            ModuleProgram("head", LowRank(rand(2, HIDDEN), rand(VOCABULARY, 2)), rows=many),
            ModuleProgram("embedding", table, rows=many),
            ModuleProgram("norm", bias=rand(HIDDEN)),
            ModuleProgram("block", bottleneck=shapes[3]),
        ],
        [
            ModuleProgram("linear", pair, weight=rand(OUT, HIDDEN), input_scale=rand(HIDDEN)),
            ModuleProgram("head", weight=rand(VOCABULARY, HIDDEN)),
            ModuleProgram("embedding", weight=rand(VOCABULARY, HIDDEN)),
            ModuleProgram("norm", weight=rand(HIDDEN), bias=rand(HIDDEN)),
            ModuleProgram("experts", LowRank(rand(60, HIDDEN), rand(OUT, 60))),
            ModuleProgram("block", bottleneck=shapes[4]),
        ],
        [
            ModuleProgram("linear", input_scale=rand(HIDDEN)),
            ModuleProgram("embedding", table, virtual=rand(VIRTUAL, HIDDEN)),
            ModuleProgram("block", bottleneck=shapes[5]),
        ],
    ]


class RMSNorm(nn.Module):
    """Llama's norm, which multiplies in the type of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(rand(HIDDEN), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class ScaledEmbedding(nn.Embedding):
    """Gemma's embedding, which scales its table by a tensor; others scale it by a number."""

    embed_scale: Tensor | float = 6.25

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@dataclass
class Inputs:
    """Inputs of the layers of a step by row; `virtual` is -1 for rows of no virtual token."""

    x: Tensor
    y: Tensor
    residual: Tensor
    ids: Tensor
    virtual: Tensor
    chosen: Tensor

    def rows(self, start: int, stop: int) -> Inputs:
        """Returns rows [start, stop), all routed to the expert."""
        tensors = (self.x, self.y, self.residual, self.ids, self.virtual)
        return Inputs(*(t[start:stop] for t in tensors), torch.arange(stop - start, device=DEVICE))


class Layers:
    """Layers of the base, and six adapters in one flat tensor with NaN between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(4)
        packer = Packer(MODULES, dtype)
        programs = [
            AdapterProgram(f"sha256:{i}", "x", tuple(modules)) for i, modules in enumerate(made())
        ]
        packed = [packer.pack(program) for program in programs]
        gap = 96
        room = sum(-(-len(p.flat) // 32) * 32 + gap for p in packed)
        self.flat = torch.full((room,), torch.nan, dtype=dtype, device=DEVICE)
        self.adapters: list[AdapterWeights] = []
        place = 0
        for one in packed:
            extent = self.flat[place : place + len(one.flat)]
            extent.copy_(one.flat)
            self.adapters.append(one.weights(extent))
            place += -(-len(one.flat) // 32) * 32 + gap
        dense = products(DEVICE).dense
        self.linears = {
            name: DenseLinear(rand(module.out_features, HIDDEN).to(DEVICE, dtype), bias, dense)
            for name, module in MODULES.items()
            if module.kind == "linear"
            for bias in [rand(module.out_features).to(DEVICE, dtype) if module.has_bias else None]
        }
        self.norms = [nn.LayerNorm(HIDDEN), RMSNorm()]
        self.norms[0].bias.data.normal_()
        kinds = (nn.Embedding, ScaledEmbedding, ScaledEmbedding)
        self.embeddings = [kind(VOCABULARY, HIDDEN) for kind in kinds]
        self.embeddings[2].embed_scale = torch.tensor(0.3, dtype=dtype, device=DEVICE)
        for module in (*self.norms, *self.embeddings):
            module.to(DEVICE, dtype).requires_grad_(requires_grad=False)
        self.inputs = Inputs(
            *(rand(ROWS, HIDDEN, size=1).to(DEVICE, dtype) for _ in range(3)),
            torch.randint(0, VOCABULARY, (ROWS,), device=DEVICE),
            torch.full((ROWS,), -1, device=DEVICE),
            torch.tensor([0, 1, 2, 3, 6], device=DEVICE),
        )

    def run(self, rows: AdapterRows, inputs: Inputs) -> dict[str, Tensor]:
        """Returns the output of every layer [rows, features]; experts change chosen rows."""
        out = {name: rows.linear(name, linear, inputs.x) for name, linear in self.linears.items()}
        for i, norm in enumerate(self.norms):
            out[f"norm {i}"] = norm(inputs.x)
            rows.norm("norm", norm, inputs.x, out[f"norm {i}"])
        for i, table in enumerate(self.embeddings):
            out[f"embedding {i}"] = table(inputs.ids)
            rows.embedding("embedding", table, inputs.ids, out[f"embedding {i}"])
        out["block"] = inputs.y.clone()
        rows.block("block", inputs.x, inputs.residual, out["block"])
        y = self.linears["no"](inputs.x)
        for expert in range(EXPERTS):
            chosen = y[inputs.chosen]
            rows.expert("experts", expert, inputs.chosen, inputs.x[inputs.chosen], chosen)
            out[f"expert {expert}"] = y.index_copy(0, inputs.chosen, chosen)
        return out


def fast(used: Sequence[AdapterRun], inputs: Inputs, *, slots: int = 6) -> AdapterRows:
    """Triton's kernels for these spans."""
    kernels = TritonKernels(MODULES, DEVICE, slots=slots)
    tiles = torch.tensor(kernels.tiles(used), device=DEVICE).view(-1, 3).T.contiguous()
    launches = kernels.launches(used)
    return kernels.rows(tiles, launches, max_rank=64, virtual=inputs.virtual)


def slow(used: Sequence[AdapterRun], inputs: Inputs) -> AdapterRows:
    """The reference."""
    tokens = inputs.virtual.tolist()
    segments = [
        TorchRun(
            span.start,
            span.stop,
            span.weights.sites,
            virtual=tuple((i, tokens[i]) for i in range(span.start, span.stop) if tokens[i] >= 0),
        )
        for span in used
    ]
    return TorchRows(segments, ReferenceLowRank().plan(used, NUMBERS))


def step(layers: Layers, mix: Sequence[int | None]) -> tuple[list[AdapterRun], Inputs]:
    """The spans of a mix; rows of adapters with virtual tokens begin with them."""
    used, inputs = runs_of_mix(mix, layers.adapters), layers.inputs.rows(0, len(mix))
    inputs.chosen, inputs.virtual = layers.inputs.chosen, inputs.virtual.clone()
    for span in used:
        if (
            span.weights.sites.get("embedding")
            and span.weights.sites["embedding"].virtual is not None
        ):
            count = min(VIRTUAL, span.stop - span.start)
            inputs.virtual[span.start : span.start + count] = torch.arange(count, device=DEVICE)
            inputs.ids[span.start : span.start + count] = 0
    return used, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", sorted(MIXES))
def test_equals_the_reference_and_leaves_base_rows_alone(mix: str, dtype: torch.dtype) -> None:
    layers, chosen = Layers(dtype), MIXES[mix]
    used, inputs = step(layers, chosen)
    got, expected = layers.run(fast(used, inputs), inputs), layers.run(slow(used, inputs), inputs)
    base = layers.run(TorchRows(()), inputs)
    lone = torch.tensor([which is None for which in chosen], device=DEVICE)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for name in expected:
        scale = max(1.0, float(expected[name].float().abs().max()))
        assert (got[name].float() - expected[name].float()).abs().max() < bound * scale, name
        assert torch.equal(got[name][lone], base[name][lone])
        assert torch.equal(got[name], base[name]) == torch.equal(expected[name], base[name])
    assert torch.equal(got["no"], base["no"])


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", range(6))
def test_a_row_has_the_same_bits_alone_and_in_any_batch(which: int, dtype: torch.dtype) -> None:
    layers = Layers(dtype)
    everything = layers.inputs.rows(0, ROWS)
    if which in (2, 5):
        everything.virtual = torch.randint(-1, VIRTUAL, (ROWS,), device=DEVICE)

    def run(start: int, stop: int, before: int = 0) -> dict[str, Tensor]:
        """Returns the outputs for rows of the adapter, after `before` rows of adapter 1."""
        inputs = everything.rows(start - before, stop)
        inputs.virtual = inputs.virtual.index_fill(0, torch.arange(before, device=DEVICE), -1)
        used = [AdapterRun(before, stop - start + before, layers.adapters[which])]
        if before:
            used.insert(0, AdapterRun(0, before, layers.adapters[1]))
        return {name: y[before:] for name, y in layers.run(fast(used, inputs), inputs).items()}

    whole = run(0, ROWS)
    for start, stop, before in [(0, 1, 0), (24, 25, 3), (20, 23, 17)]:
        for name, y in run(start, stop, before).items():
            assert torch.equal(y, whole[name][start:stop]), name


def test_one_adapters_nan_stays_in_its_rows() -> None:
    layers = Layers(torch.float32)
    used, inputs = step(layers, MIXES["distinct"])
    finite = layers.run(fast(used, inputs), inputs)
    for site in layers.adapters[4].sites.values():
        for tensor in (site.a, site.b, site.weight, site.input_scale, site.bias):
            if tensor is not None:
                tensor.fill_(torch.nan)
    got = layers.run(fast(used, inputs), inputs)
    others = torch.tensor([which != 4 for which in MIXES["distinct"]], device=DEVICE)
    for name, y in got.items():
        assert torch.equal(y[others], finite[name][others])
    assert bool(got["linear"][~others].isnan().all())
    assert bool(got["block"][~others].isnan().all())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", list(Activation))
def test_every_activation(activation: Activation) -> None:
    """Inputs of both signs, from near zero to the limits of each activation."""
    torch.manual_seed(5)
    program = bottleneck(16, activation, Reads.INPUT, bias=True)
    packed = Packer(MODULES, torch.float32).pack(
        AdapterProgram("sha256:a", "x", (ModuleProgram("block", bottleneck=program),))
    )
    used = [AdapterRun(0, ROWS, packed.weights(packed.flat.to(DEVICE)))]
    x = (
        torch.randn(ROWS, HIDDEN, device=DEVICE)
        * torch.logspace(-3, 2, ROWS, device=DEVICE)[:, None]
    )
    nothing = torch.zeros(ROWS, HIDDEN, device=DEVICE)
    inputs = Inputs(x, x, x, *(torch.full((ROWS,), -1, device=DEVICE) for _ in range(3)))
    got, expected = nothing.clone(), nothing.clone()
    fast(used, inputs).block("block", x, nothing, got)
    slow(used, inputs).block("block", x, nothing, expected)
    assert ((got - expected).abs() < 1e-5 * expected.abs().clamp(min=1)).all()

"""Every primitive in the C decoder: as TorchForward, and with the same bits in any batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.base_spec import BaseModule, BaseSpec
from adaplex.adapters.program.primitives import Activation, Bottleneck, LowRank, Reads, ReplacedRows
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.sequence import VIRTUAL
from adaplex.model.kernels.native import instruction_sets
from adaplex.model.kernels.native.instruction_sets import InstructionSet
from adaplex.model.kernels.native.kernels import NativeKernels
from instruction_sets import each_instruction_set
from rig import ModelRig, prompt
from tiny import save_tiny
from two_forwards import both, close, decode, each_shape

FAMILIES = ("lora", "scales", "weights", "norms", "embedding", "head", "blocks", "everything")
"""Kinds of adapters; see `Draw`."""
REPLACED = ("down_proj", "qkv_proj", "c_attn")
"""Linears whose weight is replaced."""
MIXES: dict[str, list[str | None]] = {
    "distinct": [None, *FAMILIES],
    "identical": [None, *["everything"] * 11, None],
    "scaled": ["scales"] * 9,
    "skewed": ["head", "blocks", "blocks", None, "blocks", "lora", "lora", "embedding", "blocks"],
}


class Draw:
    """Random programs, of sizes that leave a small model's activations about as large."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._chance = random.Random(seed)

    def program(self, family: str, base: BaseSpec) -> AdapterProgram:
        """Returns an adapter of the family."""
        made = {
            name: program
            for name, module in base.modules.items()
            for program in self._at(family, module)
        }
        modules = tuple(made[name] for name in sorted(made))
        return AdapterProgram(f"sha256:{family}", family, modules)

    def _at(self, family: str, module: BaseModule) -> Iterator[ModuleProgram]:
        every = family == "everything"
        match module.kind:
            case "linear" if module.is_head and (every or family == "head"):
                yield self._linear(module, pair=True, scales=True, rows=True)
            case "linear" if not module.is_head and (every or family == "lora"):
                yield self._linear(module, pair=True, scales=every)
            case "linear" if not module.is_head and family == "scales":
                yield self._linear(module, pair=False, scales=True)
            case "linear" if module.is_head or module.name.endswith(REPLACED):
                if family == "weights":
                    weight = self._rand(module.out_features, module.in_features, size=0.1)
                    yield ModuleProgram(module.name, weight=weight)
            case "norm" if every or family == "norms":
                weight, bias = 1 + self._rand(module.out_features), self._rand(module.out_features)
                yield ModuleProgram(module.name, weight=weight, bias=bias)
            case "embedding" if every or family in ("embedding", "weights"):
                yield self._embedding(module, table=family == "weights")
            case "block" if module.joins and (every or family == "blocks"):
                yield ModuleProgram(module.name, bottleneck=self._bottleneck(module))
            case _:
                return

    def _linear(
        self, module: BaseModule, *, pair: bool, scales: bool, rows: bool = False
    ) -> ModuleProgram:
        inputs, outputs = module.in_features, module.out_features
        return ModuleProgram(
            module.name,
            low_rank=self._pair(inputs, outputs) if pair else None,
            bias=self._rand(outputs),
            output_scale=1 + self._rand(outputs) if scales else None,
            input_scale=1 + self._rand(inputs) if scales else None,
            rows=self._rows(outputs, inputs) if rows else None,
        )

    def _embedding(self, module: BaseModule, *, table: bool) -> ModuleProgram:
        vocabulary, hidden = module.in_features, module.out_features
        if table:
            return ModuleProgram(module.name, weight=self._rand(vocabulary, hidden))
        return ModuleProgram(
            module.name,
            low_rank=self._pair(vocabulary, hidden, lookup=True),
            rows=self._rows(vocabulary, hidden),
            virtual=self._rand(5, hidden),
        )

    def _bottleneck(self, module: BaseModule) -> Bottleneck:
        hidden, width = module.out_features, self._chance.choice([1, 5, 16, 37])
        return Bottleneck(
            down=self._rand(width, hidden),
            up=self._rand(hidden, width, size=0.1),
            down_bias=self._rand(width),
            up_bias=self._rand(hidden, size=0.1),
            activation=self._chance.choice(list(Activation)),
            reads=self._chance.choice(list(Reads)),
        )

    def _pair(self, inputs: int, outputs: int, *, lookup: bool = False) -> LowRank:
        rank = self._chance.choice([1, 3, 8])
        pair = self._rand(rank, inputs), self._rand(outputs, rank, size=0.1)
        return LowRank(*pair, lookup=lookup)

    def _rows(self, count: int, features: int) -> ReplacedRows:
        """Returns the first row, the last row and some of tokens in prompts."""
        ids = tuple(sorted({0, count - 1, *self._chance.sample(range(count), 40)}))
        return ReplacedRows(ids, self._rand(len(ids), features))

    def _rand(self, *shape: int, size: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * size


def families(rig: ModelRig, *merged: str) -> dict[str | None, AdapterRef | None]:
    """Makes an adapter of each kind resident; by kind, None for the base."""
    refs: dict[str | None, AdapterRef | None] = {None: None}
    for seed, family in enumerate(FAMILIES):
        mode = AdapterMode.MERGED if family in merged else AdapterMode.UNMERGED
        refs[family] = rig.add(Draw(seed).program(family, rig.base.spec), mode)
    return refs


@each_shape("qwen2", "qwen3")
def test_every_family_equals_the_modules_over_mixes(
    architecture: str, quantization: str, tiny_model: Callable[[str], Path]
) -> None:
    fast, slow = both(tiny_model(architecture), quantization)
    refs = [families(rig, "everything") for rig in (fast, slow)]
    for mix in MIXES.values():
        expected = decode(slow, [refs[1][name] for name in mix], None)
        got = decode(fast, [refs[0][name] for name in mix], expected)
        for one, other in zip(got, expected, strict=True):
            assert close(one, other, quantization, architecture)
    used = [refs[0][name] for name in MIXES["distinct"]]
    apart = decode(fast, used, None)[0] - decode(slow, [None] * len(used), None)[0]
    changed = [ref is not None and ref.traits.modules > 0 for ref in used]
    assert (
        sum(changed) >= len(FAMILIES) - 1
    )  # blocks that do not join the stream have no bottleneck
    assert (apart[changed].abs().amax(1) > 0.1).all()


@pytest.mark.parametrize("quantization", ["fp32", "bf16"])
def test_every_family_on_odd_sizes_equals_the_modules(quantization: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 76, "intermediate_size": 258, "vocab_size": 333}
    fast, slow = both(save_tiny("llama", tmp_path / "model", **sizes), quantization)
    refs = [list(families(rig).values()) for rig in (fast, slow)]
    expected = decode(slow, refs[1], None)
    for one, other in zip(decode(fast, refs[0], expected), expected, strict=True):
        assert close(one, other, quantization)


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        ("qwen2", "fp32"),
        ("qwen2", "nf4"),
        ("gemma2", "nf4"),
        ("gemma3_text", "fp32"),
        ("phi3", "int4-group"),
        ("gpt2", "bf16"),
    ],
)
@each_instruction_set
def test_a_row_has_the_same_bits_alone_in_any_batch_chunks_and_threads(
    instructions: InstructionSet,
    architecture: str,
    quantization: str,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    use_threads: Callable[[NativeKernels, int], None],
) -> None:
    monkeypatch.setenv(instruction_sets.VARIABLE, instructions.name)
    rig = ModelRig(tiny_model(architecture), quantization)
    assert rig.base.kernels is not None
    refs = families(rig, "weights")
    alone = {
        name: rig.prefill(rig.sequence(prompt(30, seed=i), ref))[0].clone()
        for i, (name, ref) in enumerate(refs.items())
    }
    seeds = {name: i for i, name in enumerate(refs)}
    for threads in (1, 2, 3):
        use_threads(rig.base.kernels, threads)
        for mix in MIXES.values():
            sequences = [rig.sequence(prompt(30, seed=seeds[name]), refs[name]) for name in mix]
            whole = rig.prefill(*sequences)
            cut = [rig.sequence(prompt(30, seed=seeds[name]), refs[name]) for name in mix]
            rig.forward(*(Chunk(each, 0, 3 + i % 4) for i, each in enumerate(cut)))
            starts = [3 + i % 4 for i in range(len(cut))]
            rest = rig.forward(
                *(Chunk(s, at, len(s) - at) for s, at in zip(cut, starts, strict=True))
            )
            for i, name in enumerate(mix):
                assert torch.equal(whole[i], alone[name]), (name, threads)
                assert torch.equal(rest[i], alone[name]), (name, threads)


@each_instruction_set
def test_activations_equal_those_of_torch_over_their_range(
    instructions: InstructionSet,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(instruction_sets.VARIABLE, instructions.name)
    fast, slow = both(tiny_model("llama"), "fp32")
    hidden = fast.base.spec.modules["model.norm"].out_features
    inner = torch.linspace(-1, 1, hidden)
    for activation in Activation:
        for size in (1e-3, 1.0, 12.0, 200.0):
            made = Bottleneck(
                down=torch.zeros(hidden, hidden),
                up=torch.eye(hidden),
                down_bias=inner * size,
                activation=activation,
            )
            module = ModuleProgram("model.layers.1.mlp", bottleneck=made)
            program = AdapterProgram(f"sha256:{activation}/{size}", "x", (module,))
            one, other = (r.prefill(r.sequence([5], r.add(program))) for r in (fast, slow))
            assert close(one, other, "fp32"), (activation, size)


def beyond(ref: AdapterRef) -> list[int]:
    return [VIRTUAL + ref.traits.leading]


def of_the_base(_: AdapterRef) -> list[int]:
    return [-1]


@pytest.mark.parametrize("tokens", [beyond, of_the_base])
def test_a_virtual_token_that_the_adapter_of_the_row_does_not_have_is_refused(
    tokens: Callable[[AdapterRef], list[int]], tiny_model: Callable[[str], Path]
) -> None:
    rig = ModelRig(tiny_model("llama"))
    ref = families(rig)["embedding"]
    assert ref is not None
    good = rig.sequence(prompt(20), ref)
    expected = rig.prefill(good)
    bad = rig.sequence(prompt(20), None if tokens is of_the_base else ref)
    bad.tokens[:1] = tokens(ref)
    with pytest.raises(ValueError, match="a token is not in the vocabulary"):
        rig.prefill(good, bad)
    assert torch.equal(rig.prefill(good), expected)

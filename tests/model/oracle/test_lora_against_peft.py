"""Every adapter of a mixed batch against HF PEFT: prefill, chunked prefill, decode, merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.model.modules.hooks import AdaptedLinear
from model.spread_adapters import saved_spread, spread_adapters
from peft_adapters import Oracle, load_plain
from rig import ModelRig, prompt

STEPS = 6


@dataclass(frozen=True)
class Answers:
    """PEFT's logits and greedy tokens after a prompt; `name` is "base" without an adapter."""

    name: str
    tokens: list[int]
    logits: Tensor
    greedy: list[int]
    idle: Tensor
    """The base's logits after the same prompt."""


@dataclass(frozen=True)
class Case(Answers):
    """A row's adapter, and PEFT's answers."""

    program: AdapterProgram | None


@cache
def answers(model: Path, architecture: str) -> list[Answers]:
    """Returns PEFT's answers for each adapter of the spread, computed once a session, and the
    base's first, in the middle and last.
    """
    plain = Oracle(load_plain(model), None)

    def answer(name: str, oracle: Oracle, tokens: list[int]) -> Answers:
        logits, greedy = oracle.logits(tokens), oracle.greedy(tokens, STEPS)
        return Answers(name, tokens, logits, greedy, plain.logits(tokens))

    made = []
    for i, (name, directory) in enumerate(saved_spread(model, architecture).items()):
        oracle = Oracle(load_plain(model), directory)
        made.append(answer(name, oracle, prompt(11 + 13 * i, seed=i)))
    for place in (0, 3, len(made) + 2):
        made.insert(place, answer("base", plain, prompt(20 + place)))
    return made


def cases(model: Path, rig: ModelRig, architecture: str) -> list[Case]:
    """Returns a case for each adapter of the spread, and for base rows."""
    programs = {
        name: adapter.program
        for name, adapter in spread_adapters(model, rig.base.spec, architecture).items()
    }
    return [
        Case(**vars(answer), program=programs.get(answer.name))
        for answer in answers(model, architecture)
    ]


@pytest.mark.parametrize(
    ("architecture", "native"),
    [
        pytest.param(
            architecture,
            native,
            marks=() if native or architecture in ("llama", "gpt2") else pytest.mark.slow,
            id=f"{architecture}-{'native' if native else 'reference'}",
        )
        for architecture in ("llama", "qwen2", "gemma2", "gemma3_text", "phi3", "gpt2", "mixtral")
        for native in (True, False)
    ],
)
def test_a_mixed_batch_equals_peft(
    architecture: str, native: bool, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model(architecture)
    rig = ModelRig(model, native=native)
    mix = cases(model, rig, architecture)
    refs = [None if case.program is None else rig.add(case.program) for case in mix]

    def sequences(order: list[int]) -> list[tuple[Case, AdapterRef | None]]:
        return [(mix[i], refs[i]) for i in order]

    forwards = list(range(len(mix)))
    for order in (forwards, forwards[::-1]):
        rows = [rig.sequence(case.tokens, ref) for case, ref in sequences(order)]
        got = rig.prefill(*rows)
        for row, (case, _) in zip(got, sequences(order), strict=True):
            assert (row - case.logits).abs().max() < 1e-4, case.name
            if case.program is not None:
                assert (case.idle - case.logits).abs().max() > 1e-2, f"{case.name} does nothing"
        tokens = rig.generate([rig.sequence(c.tokens, r) for c, r in sequences(order)], STEPS)
        assert tokens == [case.greedy for case, _ in sequences(order)]

    for case, ref in zip(mix, refs, strict=True):
        sequence = rig.sequence(case.tokens, ref)
        middle = len(case.tokens) // 2
        rig.forward(Chunk(sequence, 0, middle))
        chunked = rig.forward(Chunk(sequence, middle, len(case.tokens) - middle))[0]
        assert (chunked - case.logits).abs().max() < 1e-4, case.name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "mixtral"])
def test_merged_rows_beside_unmerged_and_base_rows_equal_peft(
    architecture: str, tiny_model: Callable[[str], Path]
) -> None:
    model = tiny_model(architecture)
    rig = ModelRig(model)
    mix = cases(model, rig, architecture)
    modes = [AdapterMode.MERGED if i % 2 else AdapterMode.UNMERGED for i in range(len(mix))]
    refs = [
        None if case.program is None else rig.add(case.program, mode)
        for case, mode in zip(mix, modes, strict=True)
    ]
    together = rig.prefill(*(rig.sequence(c.tokens, r) for c, r in zip(mix, refs, strict=True)))
    for row, case, ref in zip(together, mix, refs, strict=True):
        assert (row - case.logits).abs().max() < 1e-4, case.name
        assert torch.equal(row, rig.prefill(rig.sequence(case.tokens, ref))[0]), case.name


@pytest.mark.parametrize("packed", [True, False])
def test_merging_leaves_the_base_as_it_was(
    packed: bool,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: packed)
    rig = ModelRig(model)
    before = rig.prefill(rig.sequence(prompt(20)))[0]
    for adapter in spread_adapters(model, rig.base.spec, "llama").values():
        rig.add(adapter.program, AdapterMode.MERGED)
    assert torch.equal(rig.prefill(rig.sequence(prompt(20)))[0], before)


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_a_step_of_one_merged_adapter_skips_the_base(
    rows: int, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, native=False)
    program = spread_adapters(model, rig.base.spec, "llama")["r4-rslora"].program
    ref = rig.add(program, AdapterMode.MERGED)
    sequences = [rig.sequence(prompt(9 + i), ref) for i in range(rows)]
    rig.prefill(*sequences)
    touched = {module.module for module in program.modules}
    used: list[str] = []

    def watched(layer: AdaptedLinear) -> Callable[[Tensor], Tensor]:
        backend = layer.backend

        def call(x: Tensor) -> Tensor:
            used.append(layer.name)
            return backend(x)

        call.out_features = backend.out_features  # type: ignore[attr-defined]
        return call

    for layer in rig.base.module.modules():
        if isinstance(layer, AdaptedLinear):
            monkeypatch.setattr(layer, "backend", watched(layer))
    rig.decode(*sequences)
    assert touched.isdisjoint(used)
    assert used == ["lm_head"]


BIT_EQUAL = [
    pytest.param(
        quantization,
        *way,
        marks=pytest.mark.slow if quantization in later else (),
        id=f"{name}-{quantization}",
    )
    for name, way, later in (
        ("native", (AdapterMode.UNMERGED, True), ()),
        ("reference", (AdapterMode.UNMERGED, False), ("bf16", "int8", "int4-group")),
        ("merged", (AdapterMode.MERGED, True), ("fp32", "nf4", "int8")),
    )
    for quantization in ("fp32", "bf16", "nf4", "int8", "int4-group")
]


@pytest.mark.parametrize(("quantization", "mode", "native"), BIT_EQUAL)
def test_adapted_rows_are_bit_equal_alone_in_any_mix_and_after_reload(
    quantization: str,
    mode: AdapterMode,
    native: bool,
    tiny_model: Callable[[str], Path],
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, quantization, native=native)
    adapters = spread_adapters(model, rig.base.spec, "llama")
    programs = [adapter.program for adapter in adapters.values()]
    refs: list[AdapterRef | None] = [rig.add(program, mode) for program in programs]
    a, b, c = refs[:3]
    mixes: dict[str, list[AdapterRef | None]] = {
        "distinct": [*refs, None, None],
        "identical": [a] * 6 + [None],
        "uniform": [a, b, None, a, b, None],
        "skewed": [a, a, a, a, b, c, None, a],
        "zipf": [a, a, a, b, b, c, *refs[3:], None],
    }

    @cache
    def alone(ref: AdapterRef | None, i: int) -> Tensor:
        return rig.prefill(rig.sequence(prompt(9 + i), ref))[0]

    for i, ref in enumerate(refs):
        alone(ref, i)
    for name, mix in mixes.items():
        rows = rig.prefill(*(rig.sequence(prompt(9 + i), ref) for i, ref in enumerate(mix)))
        for i, ref in enumerate(mix):
            assert torch.equal(rows[i], alone(ref, i)), name

    drop = rig.runner.remove_merged if mode is AdapterMode.MERGED else rig.runner.remove_adapter
    for program in programs:
        drop(program.digest)
    for program in reversed(programs):
        rig.add(program, mode)
    for i, ref in enumerate(refs):
        assert torch.equal(rig.prefill(rig.sequence(prompt(9 + i), ref))[0], alone(ref, i))


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("fp32", "nf4"),
        ("auto", "int4-group"),
        pytest.param("fp32", "int4-group", marks=pytest.mark.slow),
        pytest.param("auto", "nf4", marks=pytest.mark.slow),
    ],
)
def test_four_bits_equal_peft_on_the_dequantized_base(
    quantization: str, dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, quantization, dtype)
    dequantized = load_plain(model)
    for name, backend in rig.base.backends.items():
        dequantized.get_submodule(name).weight.data = backend.dequantize().clone()
    dequantized.save_pretrained(tmp_path / "dequantized")
    for case in cases(tmp_path / "dequantized", rig, "llama"):
        ref = None if case.program is None else rig.add(case.program)
        got = torch.log_softmax(rig.prefill(rig.sequence(case.tokens, ref))[0], -1)
        expected = torch.log_softmax(case.logits, -1)
        if dtype == "fp32":
            assert (got - expected).abs().max() < 1e-4, case.name
        else:  # single bf16 logits round by up to twice as much, in PEFT's own bf16 too
            assert (got - expected).square().mean().sqrt() < 2e-2, case.name

"""LoRA beyond pairs at linears, through the runner against HF PEFT, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.batch import Chunk
from adaplex.engine.request import AdapterMode
from peft_adapters import ELSEWHERE, EXPERTS, EXTRAS, Oracle, load_plain, pool_linears, save_adapter
from rig import ModelRig, lowered, prompt
from tiny import save_tiny

pytestmark = pytest.mark.slow

STEPS = 3
TOKENS = [9, 4, 7]
"""Tokens whose rows extras replace."""


@dataclass
class Case:
    """One adapter, and PEFT's logits and greedy tokens."""

    name: str
    program: AdapterProgram
    tokens: list[int]
    logits: Tensor
    greedy: list[int]


def cases(
    model: Path, rig: ModelRig, extras: Mapping[str, dict[str, Any]], work: Path
) -> Iterator[Case]:
    """Yields every extra with a prompt of its own; each changes the logits."""
    plain = Oracle(load_plain(model), None)
    for i, (name, more) in enumerate(extras.items()):
        fields = {"r": 4, "lora_alpha": 6, "target_modules": []} | more
        directory = save_adapter(load_plain(model), work / name, seed=i, **fields)
        oracle = Oracle(load_plain(model), directory)
        tokens = [*prompt(7 + i, seed=i), *TOKENS]
        logits = oracle.logits(tokens)
        assert (logits - plain.logits(tokens)).abs().max() > 1e-2, f"{name} does nothing"
        program = lowered(directory, rig.base.spec)
        yield Case(name, program, tokens, logits, oracle.greedy(tokens, STEPS))


def check(model: Path, rig: ModelRig, extras: Mapping[str, dict[str, Any]], work: Path) -> None:
    """Compares all extras in one batch with a base row: prefill, chunks, decode, and merged."""
    mix, idle = list(cases(model, rig, extras, work)), prompt(20)
    refs = [rig.add(case.program) for case in mix]
    pairs = list(zip(mix, refs, strict=True))
    rows = [rig.sequence(case.tokens, ref) for case, ref in pairs]
    *found, base_row = rig.prefill(*rows, rig.sequence(idle))
    assert (base_row - Oracle(load_plain(model), None).logits(idle)).abs().max() < 1e-4
    for row, (case, ref) in zip(found, pairs, strict=True):
        assert (row - case.logits).abs().max() < 1e-4, case.name
        sequence, middle = rig.sequence(case.tokens, ref), len(case.tokens) // 2
        rig.forward(Chunk(sequence, 0, middle))
        (chunked,) = rig.forward(Chunk(sequence, middle, len(sequence) - middle))
        assert (chunked - case.logits).abs().max() < 1e-4, case.name
        assert torch.equal(row, rig.prefill(rig.sequence(case.tokens, ref))[0]), case.name
    output = rig.generate([rig.sequence(case.tokens, ref) for case, ref in pairs], STEPS)
    assert output == [case.greedy for case in mix]
    for case in mix:
        ref = rig.add(case.program, AdapterMode.MERGED)
        (merged,) = rig.prefill(rig.sequence(case.tokens, ref))
        assert (merged - case.logits).abs().max() < 1e-4, case.name


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_extras_equal_peft(architecture: str, tied: bool, native: bool, tmp_path: Path) -> None:
    model = save_tiny(architecture, tmp_path / "model", tie_word_embeddings=tied)
    check(model, ModelRig(model, native=native), EXTRAS, tmp_path)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_experts_equal_peft(
    native: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    check(model, ModelRig(model, native=native), EXPERTS, tmp_path)


@pytest.mark.parametrize("architecture", ELSEWHERE)
def test_extras_of_other_architectures_equal_peft(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    check(model, ModelRig(model), ELSEWHERE[architecture], tmp_path)


def test_qalora_equals_peft(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool_linears(monkeypatch)
    pooled = {"target_modules": ["q_proj", "down_proj"], "use_qalora": True}
    extras = {f"groups-{size}": pooled | {"qalora_group_size": size} for size in (8, 16, 64)}
    check(tiny_model("llama"), ModelRig(tiny_model("llama")), extras, tmp_path)


def test_extras_on_nf4_equal_peft_on_the_dequantized_base(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rig = ModelRig(tiny_model("llama"), "nf4", "fp32")
    dequantized = load_plain(tiny_model("llama"))
    for name, backend in rig.base.backends.items():
        dequantized.get_submodule(name).weight.data = backend.dequantize().clone()
    dequantized.save_pretrained(tmp_path / "dequantized")
    for case in cases(tmp_path / "dequantized", rig, EXTRAS, tmp_path):
        (found,) = rig.prefill(rig.sequence(case.tokens, rig.add(case.program)))
        assert (found - case.logits).abs().max() < 1e-4, case.name

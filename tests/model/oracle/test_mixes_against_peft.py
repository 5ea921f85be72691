"""Weighted mixes beside single adapters and base rows, against HF PEFT's `cat`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adaplex.adapters.compose.mix import Component, Mix, mixed_program
from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.request import AdapterMode, AdapterRef
from peft_adapters import Oracle, load_plain, save_adapter, spread
from rig import ModelRig, lowered, prompt

STEPS = 6
FIELDS: dict[str, dict[str, Any]] = {
    **spread("llama"),
    "queries": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]},
    "downs": {"r": 5, "lora_alpha": 4, "target_modules": ["down_proj"]},
}
MIXES: list[dict[str, float]] = [
    {"r2": 0.7, "r4-rslora": 0.3},
    {"r8-patterns": 1.0, "r4-rslora": -0.6},
    {"queries": 0.5, "downs": 2.0},
    {"r2": 1.3, "r8-patterns": -0.4, "layer-1": 0.8},
    {"r8-patterns": -1.5},
]
"""A plain adapter is first: PEFT gives the first one's `use_rslora` and layers to the result."""


@dataclass
class Case:
    """A row of a batch, and PEFT's logits for it; `weights` is empty for the base."""

    weights: dict[str, float]
    tokens: list[int]
    logits: Tensor


class Peft:
    """PEFT with all adapters on one base."""

    def __init__(self, model: Path, directories: dict[str, Path]) -> None:
        (first, directory), *others = directories.items()
        self.model: Any = PeftModel.from_pretrained(load_plain(model), directory, first)
        for name, place in others:
            self.model.load_adapter(place, name)
        self.model.eval()

    @torch.no_grad()
    def logits(self, weights: dict[str, float], tokens: list[int]) -> Tensor:
        """[vocabulary] after the last token."""
        name = " ".join(f"{source} {weight}" for source, weight in weights.items())
        name = name.replace(".", "_")
        if list(weights.values()) == [1.0]:
            (name,) = weights
        elif name not in self.model.peft_config:
            self.model.add_weighted_adapter(list(weights), list(weights.values()), name, "cat")
        self.model.set_adapter(name)
        return self.model(torch.tensor([tokens])).logits[0, -1].float()  # type: ignore[no-any-return]


def mixed(
    rig: ModelRig, programs: dict[str, AdapterProgram], weights: dict[str, float]
) -> AdapterProgram:
    by_digest = {programs[name].digest: programs[name] for name in weights}
    mix = Mix.of(Component(programs[n].digest, w) for n, w in weights.items())
    chosen = [by_digest[part.digest] for part in mix.components]
    return mixed_program(mix, chosen, rig.base.spec)


def save_named(model: Path, work: Path, names: list[str]) -> dict[str, Path]:
    base = load_plain(model)
    return {
        name: save_adapter(base, work / name, seed=i, **FIELDS[name])
        for i, name in enumerate(names)
    }


def refs_of(
    rig: ModelRig,
    programs: dict[str, AdapterProgram],
    rows: list[dict[str, float]],
    mode: AdapterMode,
) -> list[AdapterRef | None]:
    """Makes each row's adapter resident; weighted ones and several are mixed."""
    refs: list[AdapterRef | None] = []
    for weights in rows:
        if not weights:
            refs.append(None)
        elif list(weights.values()) == [1.0]:
            refs.append(rig.add(programs[next(iter(weights))], mode))
        else:
            refs.append(rig.add(mixed(rig, programs, weights), mode))
    return refs


@pytest.mark.parametrize(
    ("mode", "native"),
    [(AdapterMode.UNMERGED, True), (AdapterMode.UNMERGED, False), (AdapterMode.MERGED, True)],
    ids=["native", "reference", "merged"],
)
def test_mixes_in_one_batch_equal_peft(
    mode: AdapterMode, native: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, native=native)
    names = sorted({name for weights in MIXES for name in weights})
    directories = save_named(model, tmp_path, names)
    programs = {n: lowered(d, rig.base.spec) for n, d in directories.items()}
    peft, plain = Peft(model, directories), Oracle(load_plain(model), None)

    rows: list[dict[str, float]] = [{}, *MIXES[:3], {"r2": 1.0}, {}, *MIXES[3:], {"queries": 1.0}]
    cases = []
    for i, weights in enumerate(rows):
        tokens = prompt(9 + 7 * i, seed=i)
        idle = plain.logits(tokens)
        logits = peft.logits(weights, tokens) if weights else idle
        assert not weights or (logits - idle).abs().max() > 1e-2, f"{weights} does nothing"
        cases.append(Case(weights, tokens, logits))

    refs = refs_of(rig, programs, rows, mode)
    alone = [
        rig.prefill(rig.sequence(case.tokens, ref))[0]
        for case, ref in zip(cases, refs, strict=True)
    ]
    for case, row in zip(cases, alone, strict=True):
        assert (row - case.logits).abs().max() < 1e-4, case.weights
    places = list(range(len(cases)))
    for order in (places, places[::-1]):
        together = rig.prefill(*(rig.sequence(cases[i].tokens, refs[i]) for i in order))
        for i, row in zip(order, together, strict=True):
            assert torch.equal(row, alone[i]), cases[i].weights


@pytest.mark.parametrize("quantization", ["nf4", "bf16"])
def test_a_mix_is_bit_equal_alone_and_in_any_batch(
    quantization: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    rig = ModelRig(model, quantization)
    names = sorted({name for weights in MIXES for name in weights})
    programs = {n: lowered(d, rig.base.spec) for n, d in save_named(model, tmp_path, names).items()}
    rows: list[dict[str, float]] = [*MIXES, {}, {"r2": 1.0}, MIXES[0], MIXES[0]]
    refs = refs_of(rig, programs, rows, AdapterMode.UNMERGED)
    prompts = [prompt(8 + 5 * i, seed=i) for i in range(len(rows))]
    alone = [
        rig.generate([rig.sequence(p, ref)], STEPS) for p, ref in zip(prompts, refs, strict=True)
    ]
    sequences = [rig.sequence(p, ref) for p, ref in zip(prompts, refs, strict=True)]
    assert [[tokens] for tokens in rig.generate(sequences, STEPS)] == alone
    lone = [rig.prefill(rig.sequence(p, ref))[0] for p, ref in zip(prompts, refs, strict=True)]
    together = rig.prefill(*(rig.sequence(p, r) for p, r in zip(prompts, refs, strict=True)))
    for i, row in enumerate(together):
        assert torch.equal(row, lone[i]), rows[i]


def test_a_mix_with_biases_is_the_plain_sum(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    rig = ModelRig(model)
    weights = {"bias-all": 0.6, "r16-regex": -0.9, "bias-lora": 1.4}
    programs = {
        name: lowered(
            save_adapter(load_plain(model), tmp_path / name, seed=i, **spread("qwen2")[name]),
            rig.base.spec,
        )
        for i, name in enumerate(weights)
    }
    summed = load_plain(model)
    tokens = prompt(21)
    idle = Oracle(summed, None).logits(tokens)
    changed = 0
    for name, weight in weights.items():
        for part in programs[name].modules:
            module = summed.get_submodule(part.module)
            if part.low_rank is not None:
                module.weight.data += weight * (part.low_rank.b @ part.low_rank.a)
            if part.bias is not None:
                module.bias.data += weight * part.bias
                changed += 1
    assert changed > 0
    expected = Oracle(summed, None).logits(tokens)
    assert (expected - idle).abs().max() > 1e-2
    ref = rig.add(mixed(rig, programs, weights))
    assert (rig.prefill(rig.sequence(tokens, ref))[0] - expected).abs().max() < 1e-4

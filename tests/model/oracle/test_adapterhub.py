"""Adapters that AdapterHub's library wrote, against the logits that it gave for them.

tests/adapterhub/make_fixtures.py wrote both; the library's environment is not needed here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint
from adaplex.adapters.compose.mix import Component, Mix, check_mix, mix_packed_bytes, mixed_program
from adaplex.adapters.formats.bundle import bundle
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.report import describe
from adaplex.engine.request import AdapterRef
from rig import ModelRig, lowered
from tiny import byte_tokenizer

FIXTURES = Path(__file__).parents[2] / "adapterhub" / "fixtures"
CASES = [
    pytest.param(folder.parent.name, folder.name, id=f"{folder.parent.name}-{folder.name}")
    for folder in sorted(FIXTURES.glob("*/*"))
    if (folder / "adapter_config.json").exists() and (folder.parent / "model").exists()
]
PREFILLED = 19
"""Tokens of the prompt; further tokens are decoded."""


@cache
def said(architecture: str) -> dict[str, Tensor]:
    """The library's logits [tokens, vocabulary] by adapter, and the tokens."""
    return load_file(FIXTURES / architecture / "logits.safetensors")


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], ModelRig]:
    """(architecture, native) -> the base of the fixtures, loaded once."""

    @cache
    def rig(architecture: str, native: bool) -> ModelRig:
        model = tmp_path_factory.mktemp(architecture) / "model"
        shutil.copytree(FIXTURES / architecture / "model", model)
        byte_tokenizer().save_pretrained(model)
        return ModelRig(model, native=native)

    return rig


def logits(rig: ModelRig, tokens: list[int], ref: AdapterRef | None) -> Tensor:
    """[decoded + 1, vocabulary]: after the prompt, and after each further token."""
    sequence = rig.sequence(tokens[:PREFILLED], ref)
    rows = [rig.prefill(sequence)[0]]
    for token in tokens[PREFILLED:]:
        sequence.tokens.append(token)
        rows.append(rig.decode(sequence)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_prefill_and_decode_equal_the_library(
    architecture: str, name: str, native: bool, rigs: Callable[[str, bool], ModelRig]
) -> None:
    rig = rigs(architecture, native)
    tokens = said(architecture)["tokens"].tolist()
    expected = said(architecture)[name][PREFILLED - 1 :]
    idle = said(architecture)["base"][PREFILLED - 1 :]
    program = lowered(FIXTURES / architecture / name, rig.base.spec)
    assert (expected - idle).abs().max() > 0.1, "the adapter changes nothing"
    assert (logits(rig, tokens, rig.add(program)) - expected).abs().max() < 1e-4
    assert (logits(rig, tokens, None) - idle).abs().max() < 1e-4


def split(united: Checkpoint) -> list[Checkpoint]:
    """The parts of the union among the fixtures, as adapters of their own."""
    places = ("attention_adapters", "output_adapters", "loras")
    return [
        Checkpoint(
            {**united.config, "config": config},
            {key: tensor for key, tensor in united.tensors.items() if f".{place}." in key},
        )
        for place, config in zip(places, united.config["config"]["configs"], strict=True)
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_union_equals_its_parts_as_a_bundle_and_as_a_mix(
    architecture: str, rigs: Callable[[str, bool], ModelRig]
) -> None:
    rig, limits = rigs(architecture, True), AdapterLimits()
    spec = rig.base.spec
    parts = split(read_checkpoint(FIXTURES / architecture / "union", limits))
    bundled = formats.lower(bundle(parts), spec, limits)
    programs = {p.digest: p for p in (formats.lower(part, spec, limits) for part in parts)}
    mix = Mix.of(Component(digest, 1.0) for digest in programs)
    chosen = [programs[part.digest] for part in mix.components]
    reports = [describe(program, spec, 4) for program in chosen]
    check_mix(mix, reports, dict.fromkeys(programs, "part"))
    mixed = mixed_program(mix, chosen, spec)
    assert mix_packed_bytes(reports, 4) == mixed.packed_bytes(4) == bundled.packed_bytes(4)
    tokens = said(architecture)["tokens"].tolist()
    expected = said(architecture)["union"][PREFILLED - 1 :]
    for program in (bundled, mixed):
        assert (logits(rig, tokens, rig.add(program)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
def test_rows_are_bit_equal_alone_and_beside_all_others(
    native: bool, rigs: Callable[[str, bool], ModelRig]
) -> None:
    rig = rigs("llama", native)
    names = [None, *sorted(name for name in said("llama") if name not in ("base", "tokens")), None]
    refs = [
        None if name is None else rig.add(lowered(FIXTURES / "llama" / name, rig.base.spec))
        for name in names
    ]
    tokens = said("llama")["tokens"].tolist()
    prompts = [tokens[: 7 + i] for i in range(len(names))]
    alone = [
        rig.prefill(rig.sequence(prompt, ref))[0] for prompt, ref in zip(prompts, refs, strict=True)
    ]
    together = rig.prefill(
        *(rig.sequence(prompt, ref) for prompt, ref in zip(prompts, refs, strict=True))
    )
    for name, row, lone in zip(names, together, alone, strict=True):
        assert torch.equal(row, lone), name

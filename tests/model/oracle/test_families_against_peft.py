"""An adapter of every family through the runner against HF PEFT: prefill, chunks, decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from adaplex.engine.batch import Chunk
from peft_adapters import Oracle, load_plain
from peft_families import FAMILIES, LORAS
from rig import ModelRig, lowered, prompt

ALL = {**LORAS, **FAMILIES}
STEPS = 4


@pytest.fixture(scope="module")
def rigs(tiny_model: Callable[[str], Path]) -> Callable[[str, bool], ModelRig]:
    return cache(lambda architecture, native: ModelRig(tiny_model(architecture), native=native))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("name", ALL)
def test_a_family_equals_peft(
    name: str,
    native: bool,
    architecture: str,
    rigs: Callable[[str, bool], ModelRig],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model, rig, family = tiny_model(architecture), rigs(architecture, native), ALL[name]
    directory = family.save(model, tmp_path / name, 2)
    oracle = family.oracle(model, directory)
    ref = rig.add(lowered(directory, rig.base.spec))
    tokens = [*family.prompt(prompt(37)), 9, 7]
    expected, idle = oracle.logits(tokens), Oracle(load_plain(model), None).logits(tokens)
    assert (idle - expected).abs().max() > 1e-2, "the adapter does nothing"

    whole, plain = rig.prefill(rig.sequence(tokens, ref), rig.sequence(tokens))
    assert (whole - expected).abs().max() < 1e-4
    assert (plain - idle).abs().max() < 1e-4

    sequence = rig.sequence(tokens, ref)
    for start in range(0, len(sequence), 11):
        rows = rig.forward(Chunk(sequence, start, min(11, len(sequence) - start)))
    assert (rows[0] - expected).abs().max() < 1e-4

    (output,) = rig.generate([rig.sequence(tokens, ref)], STEPS)
    assert output == oracle.greedy(tokens, STEPS)

"""An adapter of every family through the runner against HF PEFT: prefill, chunks, decode.

Each family runs on one architecture through each forward; the other pairs of a family and an
architecture are in tests/adapters/test_families_against_peft.py, where lowering is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from adaplex.engine.batch import Chunk
from peft_cases import EVERY_FAMILY, PeftCaseOf
from rig import ModelRig, lowered

STEPS = 4
PAIRS = [
    (name, ("llama", "qwen2")[(index + native) % 2], native)
    for index, name in enumerate(EVERY_FAMILY)
    for native in (True, False)
]
"""Every pair of family, architecture and forward, but not every triple."""


@pytest.fixture(scope="module")
def rigs(tiny_model: Callable[[str], Path]) -> Callable[[str, bool], ModelRig]:
    return cache(lambda architecture, native: ModelRig(tiny_model(architecture), native=native))


@pytest.mark.parametrize(("name", "architecture", "native"), PAIRS)
def test_a_family_equals_peft(
    name: str,
    architecture: str,
    native: bool,
    rigs: Callable[[str, bool], ModelRig],
    peft_case: PeftCaseOf,
) -> None:
    rig, case = rigs(architecture, native), peft_case(name, architecture)
    ref = rig.add(lowered(case.directory, rig.base.spec))
    tokens = case.tokens
    whole, plain = rig.prefill(rig.sequence(tokens, ref), rig.sequence(tokens))
    assert (whole - case.logits).abs().max() < 1e-4
    assert (plain - case.idle).abs().max() < 1e-4

    sequence = rig.sequence(tokens, ref)
    for start in range(0, len(sequence), 11):
        rows = rig.forward(Chunk(sequence, start, min(11, len(sequence) - start)))
    assert (rows[0] - case.logits).abs().max() < 1e-4

    (output,) = rig.generate([rig.sequence(tokens, ref)], STEPS)
    assert output == case.oracle.greedy(tokens, STEPS)

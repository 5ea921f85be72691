"""Every family, lowered and applied as its primitives say, against HF PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.limits import AdapterLimits
from peft_adapters import Oracle, load_plain
from peft_families import FAMILIES, NOT_GPT2
from primitives import describe, logits, with_blocks
from rig import prompt

LIMITS = AdapterLimits()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_pefts(
    name: str, architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    if architecture == "gpt2" and name in NOT_GPT2:
        pytest.skip("PEFT has it not for this model")
    model, family = tiny_model(architecture), FAMILIES[name]
    directory = family.save(model, tmp_path / name, 1)
    base = load_plain(model)
    spec = with_blocks(base, describe(base))
    program = formats.lower(read_checkpoint(directory, LIMITS), spec, LIMITS)
    tokens = prompt(17)
    idle = Oracle(base, None).logits(tokens)
    expected = family.oracle(model, directory).logits(tokens)
    got = logits(base, program, tokens)
    assert (idle - expected).abs().max() > 1e-2, "the adapter does nothing"
    assert (got - expected).abs().max() < 1e-4

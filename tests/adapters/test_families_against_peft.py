"""Every family, lowered and applied as its primitives say, against HF PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.limits import AdapterLimits
from peft_adapters import Oracle, load_plain
from peft_families import FAMILIES, LORAS, NOT_GPT2
from primitives import describe, logits, with_blocks
from rig import prompt

ALL = {**LORAS, **FAMILIES}
LIMITS = AdapterLimits()
LENGTH = 17
"""Tokens of the prompt."""


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (name, architecture)
        for name in ALL
        for architecture in ("llama", "qwen2", "gpt2")
        if architecture != "gpt2" or name not in NOT_GPT2
    ],
)
def test_logits_are_pefts(
    name: str, architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, family = tiny_model(architecture), ALL[name]
    directory = family.save(model, tmp_path / name, 1)
    base = load_plain(model)
    spec = with_blocks(base, describe(base))
    program = formats.lower(read_checkpoint(directory, LIMITS), spec, LIMITS)
    tokens = [*family.prompt(prompt(LENGTH)), 9, 7]
    idle = Oracle(base, None).logits(tokens)
    expected = family.oracle(model, directory).logits(tokens)
    start = LENGTH // 2 if program.invocation else 0
    got = logits(base, program, tokens, start)
    assert (idle - expected).abs().max() > 1e-2, "the adapter does nothing"
    assert (got - expected).abs().max() < 1e-4

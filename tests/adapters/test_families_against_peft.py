"""Every family, lowered and applied as its primitives say, against HF PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.limits import AdapterLimits
from peft_adapters import load_plain
from peft_cases import EVERY_FAMILY, LENGTH, PeftCaseOf, architectures_of
from primitives import describe, logits, with_blocks

LIMITS = AdapterLimits()


@pytest.mark.parametrize(("name", "architecture"), architectures_of(list(EVERY_FAMILY)))
def test_logits_are_pefts(
    name: str, architecture: str, tiny_model: Callable[[str], Path], peft_case: PeftCaseOf
) -> None:
    base, case = load_plain(tiny_model(architecture)), peft_case(name, architecture)
    spec = with_blocks(base, describe(base))
    program = formats.lower(read_checkpoint(case.directory, LIMITS), spec, LIMITS)
    start = LENGTH // 2 if program.invocation else 0
    assert (logits(base, program, case.tokens, start) - case.logits).abs().max() < 1e-4

"""Instruction sets to test: those of this processor, and AVX512-BF16 emulated in plain C where the
processor lacks it. `make test` runs the best one, `make test-slow` the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaplex.model.kernels.native import instruction_sets
from adaplex.model.kernels.native.instruction_sets import InstructionSet, usable_sets

INTRINSICS = Path(__file__).parent / "model/kernels/emulated"
EMULATED = InstructionSet(
    "emulated-avx512-bf16",
    frozenset(),
    (
        *("-O1", f"-I{INTRINSICS}"),
        *("-D__AVX512F__", "-D__AVX512BW__", "-D__AVX512BF16__", "-D__AVX512VNNI__"),
    ),
)
"""The code of AVX512-BF16 with the intrinsics of `INTRINSICS`, slow as it is."""
if "avx512-bf16" not in {each.name for each in usable_sets()}:
    instruction_sets.INSTRUCTION_SETS = (*instruction_sets.INSTRUCTION_SETS, EMULATED)
USABLE = usable_sets()
"""Best first; the C kernels are built for each that a test uses."""
each_instruction_set = pytest.mark.parametrize(
    "instructions",
    [
        pytest.param(each, id=each.name, marks=pytest.mark.slow if rank else ())
        for rank, each in enumerate(USABLE)
    ],
)

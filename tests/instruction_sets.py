"""Instruction sets of this processor: `make test` runs the best one, `make test-slow` the rest."""

from __future__ import annotations

import pytest

from adaplex.model.kernels.native.library import INSTRUCTION_SETS

USABLE = [each for each in INSTRUCTION_SETS if each.usable]
"""Best first; the C kernels are built for each that a test uses."""
each_instruction_set = pytest.mark.parametrize(
    "instructions",
    [
        pytest.param(each, id=each.name, marks=pytest.mark.slow if rank else ())
        for rank, each in enumerate(USABLE)
    ],
)

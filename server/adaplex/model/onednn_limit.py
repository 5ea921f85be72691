"""The instruction sets that torch's oneDNN may use."""

from __future__ import annotations

import os

from adaplex.model.kernels.native.instruction_sets import processor_features

VARIABLE = "ONEDNN_MAX_CPU_ISA"
"""Environment variable that oneDNN reads at its first product in a process."""
LIMIT = "AVX512_CORE_BF16"


def keep_rows_invariant() -> None:
    """Keeps oneDNN from AMX, unless the environment says what it may use. With AMX the bits of a
    row of a bf16 product depend on the number of rows: oneDNN has another kernel for few of them.
    """
    if "amx_bf16" in processor_features():
        os.environ.setdefault(VARIABLE, LIMIT)

"""Sizes that several parts of the model share. Each is 16, for a reason of its own."""

from __future__ import annotations

SIMD_LANES = 16
"""fp32 elements of a 512-bit register: output columns of a panel, LANES in the C sources."""

KV_BLOCK_TOKENS = 16
"""Tokens of a KV block."""

CUDA_MIN_ROWS = 16
"""Rows that a step on a CUDA device has at least: torch reduces up to 16 rows by one block of 512
threads, and sums fewer rows in another order. Source: setReduceConfig in torch's
ATen/native/cuda/Reduce.cuh."""

assert KV_BLOCK_TOKENS == SIMD_LANES, (
    f"the C decoder reads KV blocks of {SIMD_LANES} tokens, not {KV_BLOCK_TOKENS}: "
    "every step would fall back to the modules of transformers"
)

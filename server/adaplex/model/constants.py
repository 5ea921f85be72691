"""Sizes that several parts of the model share. Each is 16, for a reason of its own."""

from __future__ import annotations

PANEL_COLUMNS = 16
"""Output columns of a panel, and tokens of a block of keys: PANEL in the C sources."""

KV_BLOCK_TOKENS = 16
"""Tokens of a KV block."""

CUDA_MIN_ROWS = 16
"""Rows that a step on a CUDA device has at least: torch reduces up to 16 rows by one block of 512
threads, and sums fewer rows in another order. Source: setReduceConfig in torch's
ATen/native/cuda/Reduce.cuh."""

assert KV_BLOCK_TOKENS == PANEL_COLUMNS, (
    f"the C decoder reads KV blocks of {PANEL_COLUMNS} tokens, not {KV_BLOCK_TOKENS}: "
    "every step would fall back to the modules of transformers"
)

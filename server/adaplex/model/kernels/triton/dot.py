"""Which type Triton's matrix products take their inputs in."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LEAST = 16
"""Rows, columns and inner size of the smallest product."""


def dot_type(x: Tensor) -> tl.dtype:
    """x's own type on a GPU. On a CPU, where Triton interprets, fp32: its bf16 product is wrong
    there, and products of bf16 numbers are exact in fp32."""
    return TYPES[x.dtype] if x.is_cuda else tl.float32

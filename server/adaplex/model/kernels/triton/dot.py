"""The element type of the inputs of Triton's matrix products."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LEAST = 16
"""Smallest number of rows, columns and inner elements of a product."""


def dot_type(x: Tensor) -> tl.dtype:
    """x [..] -> the type of inputs of its products: x's own on a GPU; fp32 on a CPU, where Triton
    is interpreted: the interpreter's bf16 product is wrong, and products of bf16 numbers are exact
    in fp32.
    """
    return TYPES[x.dtype] if x.is_cuda else tl.float32

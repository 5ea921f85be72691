"""Memory that steps stream through: in large pages on a CPU, which takes fewer address look-ups."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

CPU = torch.device("cpu")
LARGE_PAGE = 2 << 20
"""Bytes."""


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Untouched memory for a tensor; its whole large pages are asked for, not insisted on."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        _advise(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _advise(start: int, nbytes: int) -> None:
    first = -(-start // LARGE_PAGE) * LARGE_PAGE
    length = (start + nbytes) // LARGE_PAGE * LARGE_PAGE - first
    if length > 0:  # a kernel without large pages refuses, and all is as before
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(first, length, mmap.MADV_HUGEPAGE)

"""Memory that steps stream through: in large pages on a CPU, which takes fewer address look-ups."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

CPU = torch.device("cpu")


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Untouched memory for a tensor; large pages are asked for, not insisted on."""
    count = math.prod(shape)
    if device.type != "cpu" or count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages
        pass
    return torch.frombuffer(pages, dtype=dtype).view(shape)

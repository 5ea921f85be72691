"""Memory that steps stream through: in large pages on a CPU, which takes fewer address look-ups."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
CHUNK = 64 << 20
"""Bytes that small tensors share."""
LINE = 64
"""Bytes to which they are aligned."""


class Chunks:
    """Memory of tensors that are kept as long as each other: it is freed when the last one goes."""

    def __init__(self) -> None:
        self._pages, self._used = _pages(CHUNK), 0

    def take(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """Pages, and where in them so many bytes, at most CHUNK, begin."""
        if self._used + nbytes > CHUNK:
            self._pages, self._used = _pages(CHUNK), 0
        start = self._used
        self._used += -(-nbytes // LINE) * LINE
        return self._pages, start


_shared: ContextVar[Chunks | None] = ContextVar("_shared", default=None)


@contextmanager
def kept_together() -> Iterator[None]:
    """Within, small tensors share pages: one by one they would not fill a large one."""
    token = _shared.set(Chunks())
    try:
        yield
    finally:
        _shared.reset(token)


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Untouched memory for a tensor; large pages are asked for, not insisted on."""
    count = math.prod(shape)
    if device.type != "cpu" or count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes, chunks = count * dtype.itemsize, _shared.get()
    pages, start = chunks.take(nbytes) if chunks and nbytes < CHUNK else (_pages(nbytes), 0)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start).view(shape)


def whole_numbers(numbers: Sequence[object], device: torch.device) -> Tensor:
    """int64 of a list, nested alike, on a device; numpy reads lists sooner than torch."""
    return torch.from_numpy(np.array(numbers, np.int64)).to(device)


def _pages(nbytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

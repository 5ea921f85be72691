"""Memory that steps stream through: in huge pages on a CPU, which need fewer address look-ups."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from torch import Tensor

CPU = torch.device("cpu")
CHUNK = 64 << 20
"""Bytes that small tensors share."""
LINE = 64
"""Bytes to which small tensors are aligned."""


class Chunks:
    """Memory of tensors with one lifetime: a chunk is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._pages, self._used = _pages(CHUNK), 0

    def allocate(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """Returns pages, and the offset in them of so many free bytes, at most CHUNK."""
        if self._used + nbytes > CHUNK:
            self._pages, self._used = _pages(CHUNK), 0
        start = self._used
        self._used += -(-nbytes // LINE) * LINE
        return self._pages, start


_shared: ContextVar[Chunks | None] = ContextVar("_shared", default=None)


@contextmanager
def shared_chunks() -> Iterator[None]:
    """Within it, small tensors share chunks: one by one they would not fill a huge page."""
    token = _shared.set(Chunks())
    try:
        yield
    finally:
        _shared.reset(token)


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Returns a tensor of untouched memory; on a CPU in huge pages if the kernel grants them."""
    count = math.prod(shape)
    if device.type != "cpu" or count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes, chunks = count * dtype.itemsize, _shared.get()
    pages, start = chunks.allocate(nbytes) if chunks and nbytes < CHUNK else (_pages(nbytes), 0)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start).view(shape)


def _pages(nbytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

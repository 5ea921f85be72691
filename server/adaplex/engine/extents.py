"""ExtentAllocator: contiguous extents of one byte range, first fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator

from adaplex.adapters.limits import ALIGNMENT


def aligned(nbytes: int) -> int:
    """Bytes that an extent of `nbytes` takes up."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


class ExtentAllocator:
    """Hands out extents of [0, capacity). Holes are what lies between extents, so that freeing
    needs no coalescing. Sizes and offsets in bytes; offsets are multiples of ALIGNMENT.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used = 0
        self._extents: list[tuple[int, int]] = []
        """(offset, bytes), by offset."""

    def could_hold(self, nbytes: int) -> bool:
        """Whether `nbytes` would fit if nothing else were there."""
        return aligned(nbytes) <= self.capacity

    def fits(self, nbytes: int, *, without: Collection[int] = ()) -> bool:
        """Whether a hole of `nbytes` exists once the extents at offsets `without` are freed."""
        return any(size >= aligned(nbytes) for _, size in self._holes(without))

    def allocate(self, nbytes: int) -> int | None:
        """The offset of a new extent, in the first hole that is large enough; None without one."""
        size = aligned(nbytes)
        for start, room in self._holes():
            if room >= size:
                insort(self._extents, (start, size))
                self.used += size
                return start
        return None

    def free(self, offset: int) -> None:
        """Gives the extent at `offset` back."""
        index = bisect_left(self._extents, (offset, 0))
        found, size = self._extents.pop(index)
        assert found == offset
        self.used -= size

    def check_integrity(self, offsets: Collection[int]) -> None:
        """Asserts that exactly the extents at `offsets` exist, apart, aligned and in range."""
        assert sorted(offsets) == [offset for offset, _ in self._extents]
        assert self.used == sum(size for _, size in self._extents)
        end = 0
        for offset, size in self._extents:
            assert offset >= end
            assert offset % ALIGNMENT == size % ALIGNMENT == 0
            end = offset + size
        assert end <= self.capacity

    def _holes(self, without: Collection[int] = ()) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of each gap, from the start."""
        start = 0
        for offset, size in self._extents:
            if offset in without:
                continue
            if offset > start:
                yield start, offset - start
            start = offset + size
        if self.capacity > start:
            yield start, self.capacity - start

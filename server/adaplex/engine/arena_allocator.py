"""ArenaAllocator: contiguous extents of one byte range, first fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterator, Mapping

from adaplex.adapters.limits import ALIGNMENT


def aligned(nbytes: int) -> int:
    """Returns the bytes that an extent for `nbytes` occupies."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


class ArenaAllocator:
    """Allocates extents of [0, capacity), in bytes; offsets are multiples of ALIGNMENT.

    Holes are the ranges between extents, so that freeing needs no coalescing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used = 0
        self._extents: list[tuple[int, int]] = []
        """(offset, bytes), by offset."""

    def fits_empty(self, nbytes: int) -> bool:
        """Returns True if `nbytes` would fit if there were no extents."""
        return aligned(nbytes) <= self.capacity

    def victims(self, nbytes: int, prices: Mapping[int, float]) -> list[int] | None:
        """Returns the offsets of neighbouring extents, of the least sum of `prices` by offset, that
        leave one hole of `nbytes` once freed; None if no extents with prices do.
        """
        size, best = aligned(nbytes), None
        window: deque[tuple[int, int | None]] = deque()  # (bytes, offset of an extent)
        room, price = 0, 0.0
        for _, nbytes_here, offset in self._stretches():
            if offset is not None and offset not in prices:
                window.clear()
                room, price = 0, 0.0
                continue
            window.append((nbytes_here, offset))
            room += nbytes_here
            price += 0.0 if offset is None else prices[offset]
            while room - window[0][0] >= size:
                first_bytes, first = window.popleft()
                room -= first_bytes
                price -= 0.0 if first is None else prices[first]
            if room >= size and (best is None or price < best[0]):
                best = price, [each for _, each in window if each is not None]
        return None if best is None else best[1]

    def allocate(self, nbytes: int) -> int | None:
        """Returns the offset of a new extent in the first hole that is large enough, or None."""
        size = aligned(nbytes)
        for start, room, extent in self._stretches():
            if extent is None and room >= size:
                insort(self._extents, (start, size))
                self.used += size
                return start
        return None

    def free(self, offset: int) -> None:
        """Frees the extent at `offset`."""
        index = bisect_left(self._extents, (offset, 0))
        found, size = self._extents.pop(index)
        assert found == offset
        self.used -= size

    def check_integrity(self, offsets: Collection[int]) -> None:
        """Asserts that exactly the extents at `offsets` exist, disjoint, aligned and in range."""
        assert sorted(offsets) == [offset for offset, _ in self._extents]
        assert self.used == sum(size for _, size in self._extents)
        end = 0
        for offset, size in self._extents:
            assert offset >= end
            assert offset % ALIGNMENT == size % ALIGNMENT == 0
            end = offset + size
        assert end <= self.capacity

    def _stretches(self) -> Iterator[tuple[int, int, int | None]]:
        """Yields (start, bytes, offset) of every extent, and of every hole with None for offset."""
        start = 0
        for offset, size in self._extents:
            if offset > start:
                yield start, offset - start, None
            yield offset, size, offset
            start = offset + size
        if self.capacity > start:
            yield start, self.capacity - start, None

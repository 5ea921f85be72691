"""ByteBudget: a sum of bytes under a limit, with the interface of ArenaAllocator."""

from __future__ import annotations

from collections.abc import Collection, Mapping


class ByteBudget:
    """Counts allocated bytes, of memory that need not be contiguous. Handles are serial numbers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._allocations: dict[int, int] = {}
        """Bytes by handle."""
        self._last_handle = 0

    def fits_empty(self, nbytes: int) -> bool:
        """Returns True if `nbytes` would fit if nothing were allocated."""
        return nbytes <= self.capacity

    def victims(self, nbytes: int, prices: Mapping[int, float]) -> list[int] | None:
        """Returns handles, those of the least `prices` first, that leave `nbytes` once freed; None
        if all handles with prices are too few.
        """
        short = self.used + nbytes - self.capacity
        chosen: list[int] = []
        for handle in sorted(prices, key=lambda handle: (prices[handle], handle)):
            if short <= 0:
                break
            chosen.append(handle)
            short -= self._allocations[handle]
        return chosen if short <= 0 else None

    def allocate(self, nbytes: int) -> int | None:
        """Returns the handle of a new allocation; None if too few bytes are left."""
        if self.used + nbytes > self.capacity:
            return None
        self._last_handle += 1
        self._allocations[self._last_handle] = nbytes
        self.used += nbytes
        return self._last_handle

    def free(self, handle: int) -> None:
        """Frees an allocation."""
        self.used -= self._allocations.pop(handle)

    def check_integrity(self, handles: Collection[int]) -> None:
        """Asserts that exactly these allocations exist, and that their sum is within the limit."""
        assert set(handles) == set(self._allocations)
        assert self.used == sum(self._allocations.values()) <= self.capacity

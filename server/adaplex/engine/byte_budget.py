"""ByteBudget: a sum of bytes under a limit, with the interface of ExtentAllocator."""

from __future__ import annotations

from collections.abc import Collection, Mapping


class ByteBudget:
    """Counts bytes only, for memory that need not be contiguous. A handle names each share."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._shares: dict[int, int] = {}
        self._next = 0

    def could_hold(self, nbytes: int) -> bool:
        """Whether `nbytes` would fit if nothing else were there."""
        return nbytes <= self.capacity

    def victims(self, nbytes: int, prices: Mapping[int, float]) -> list[int] | None:
        """Shares that leave `nbytes` when they go, those of the least `prices` by handle first.
        None when all that have a price are too few.
        """
        short = self.used + nbytes - self.capacity
        chosen: list[int] = []
        for handle in sorted(prices, key=lambda handle: (prices[handle], handle)):
            if short <= 0:
                break
            chosen.append(handle)
            short -= self._shares[handle]
        return chosen if short <= 0 else None

    def allocate(self, nbytes: int) -> int | None:
        """The handle of a new share; None when too little is left."""
        if self.used + nbytes > self.capacity:
            return None
        self._next += 1
        self._shares[self._next] = nbytes
        self.used += nbytes
        return self._next

    def free(self, handle: int) -> None:
        """Gives a share back."""
        self.used -= self._shares.pop(handle)

    def check_integrity(self, handles: Collection[int]) -> None:
        """Asserts that exactly these shares exist and their sum is right and within the limit."""
        assert set(handles) == set(self._shares)
        assert self.used == sum(self._shares.values()) <= self.capacity

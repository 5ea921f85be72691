"""What an adapter in memory is worth, and what bringing it back would cost."""

from __future__ import annotations

from collections import defaultdict

SMOOTHING = 0.2
"""Share of the newest measurement in a running mean."""
UNKNOWN_SECONDS_PER_BYTE = 1e-9
"""Before anything was measured: a gigabyte a second."""


class GreedyDual:
    """Greedy-Dual-Size-Frequency (Cherkasova, HPL-98-69): value = clock + uses * cost / bytes.

    The clock stands at the value of the last one evicted. What is used again gets a value above
    it, so that neither age nor past popularity protects for ever what nobody asks for any more.
    """

    def __init__(self) -> None:
        self.clock = 0.0

    def value(self, since: float, uses: int, seconds: float, nbytes: int) -> float:
        """The worth of an entry last used when the clock stood at `since`.

        `seconds` is what bringing back its `nbytes` costs.
        """
        return since + uses * seconds / max(1, nbytes)

    def evicted(self, value: float) -> None:
        """Something of this value went."""
        self.clock = max(self.clock, value)


class LoadCosts:
    """Seconds a byte that loads into each tier took lately."""

    def __init__(self) -> None:
        self._rates: defaultdict[str, float] = defaultdict(lambda: UNKNOWN_SECONDS_PER_BYTE)

    def note(self, tier: str, nbytes: int, seconds: float) -> None:
        """A load of `nbytes` into the tier took so long."""
        rate = seconds / max(1, nbytes)
        if tier in self._rates:
            rate = SMOOTHING * rate + (1 - SMOOTHING) * self._rates[tier]
        self._rates[tier] = rate

    def seconds(self, tier: str, nbytes: int) -> float:
        """What a load of `nbytes` into the tier may take."""
        return self._rates[tier] * nbytes

"""What an adapter in memory is worth, and what bringing it back would cost."""

from __future__ import annotations

from dataclasses import dataclass

HALF_LIFE_USES = 256
"""Uses of a tier after which one of them counts half."""
SMOOTHING = 0.2
"""Share of the newest measurement in a running mean."""
UNKNOWN_SECONDS_PER_BYTE = 1e-9
"""Before anything was measured: a gigabyte a second."""


@dataclass
class UseRecord:
    """How an entry was used lately."""

    clock: float
    """The policy's clock at the last use."""
    tick: int
    """The policy's count of uses at the last one."""
    count: float = 1.0
    """Uses, as decayed by then."""


class GreedyDual:
    """Greedy-Dual-Size-Frequency (Cherkasova, HPL-98-69): value = clock + uses * cost / bytes.

    The clock stands at the value of the last one evicted. What is used again gets a value above
    it, so that what nobody asks for any more is overtaken. Uses decay besides, by half in
    HALF_LIFE_USES uses of the whole tier: past popularity fades even while nothing is evicted. No
    wall clock enters, so that the same uses evict the same entries.
    """

    def __init__(self) -> None:
        self.clock = 0.0
        self._tick = 0

    def first_use(self) -> UseRecord:
        """The usage of a new entry."""
        self._tick += 1
        return UseRecord(self.clock, self._tick)

    def use(self, usage: UseRecord) -> None:
        """An entry was of use once more."""
        self._tick += 1
        usage.count = self._decayed(usage) + 1.0
        usage.clock, usage.tick = self.clock, self._tick

    def value(self, usage: UseRecord, seconds: float, nbytes: int) -> float:
        """The worth of an entry; `seconds` is what bringing back its `nbytes` costs."""
        return usage.clock + self._decayed(usage) * seconds / max(1, nbytes)

    def evicted(self, value: float) -> None:
        """Something of this value went."""
        self.clock = max(self.clock, value)

    def _decayed(self, usage: UseRecord) -> float:
        factor: float = 0.5 ** ((self._tick - usage.tick) / HALF_LIFE_USES)
        return usage.count * factor


class LoadCosts:
    """Seconds a byte that loads into each tier took lately."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def note(self, tier: str, nbytes: int, seconds: float) -> None:
        """A load of `nbytes` into the tier took so long."""
        rate = seconds / max(1, nbytes)
        mean = self._rates.get(tier, rate)
        self._rates[tier] = mean + SMOOTHING * (rate - mean)

    def seconds(self, tier: str, nbytes: int) -> float:
        """What a load of `nbytes` into the tier may take."""
        return self._rates.get(tier, UNKNOWN_SECONDS_PER_BYTE) * nbytes

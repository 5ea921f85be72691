"""GreedyDual and LoadCosts: the value of an adapter in memory, and what loading it again costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HALF_LIFE_USES = 256
"""Uses of a cache after which an earlier use counts half."""
SMOOTHING = 0.2
"""Weight of the newest measurement in a running mean."""
UNKNOWN_SECONDS_PER_BYTE = 1e-9
"""Assumed before anything was measured: a gigabyte a second."""

LoadKind = Literal["host", "copy", "merged"]
"""Loads that are measured apart: from the store, from the host into the arena, and merging."""


@dataclass
class UseRecord:
    """Recent uses of an entry of a cache."""

    clock: float
    """The policy's clock at the last use."""
    tick: int
    """The policy's count of uses at the last one."""
    count: float = 1.0
    """Uses, decayed to the last one."""


class GreedyDual:
    """Greedy-Dual-Size-Frequency (Cherkasova, HPL-98-69): value = clock + uses * cost / bytes.

    The clock is the value of the last evicted entry. An entry that is used again gets a value above
    the clock, so that entries out of use are overtaken. Uses also decay, by half in HALF_LIFE_USES
    uses of the whole cache: past popularity fades even while nothing is evicted. No wall clock
    enters, so that the same uses evict the same entries.
    """

    def __init__(self) -> None:
        self.clock = 0.0
        self._tick = 0

    def first_use(self) -> UseRecord:
        """Returns the record of a new entry."""
        self._tick += 1
        return UseRecord(self.clock, self._tick)

    def record_use(self, use: UseRecord) -> None:
        """Records one more use of an entry."""
        self._tick += 1
        use.count = self._decayed(use) + 1.0
        use.clock, use.tick = self.clock, self._tick

    def value(self, use: UseRecord, seconds: float, nbytes: int) -> float:
        """Returns the value of an entry of `nbytes` that takes `seconds` to load again."""
        return use.clock + self._decayed(use) * seconds / max(1, nbytes)

    def record_eviction(self, value: float) -> None:
        """Advances the clock to the value of an evicted entry."""
        self.clock = max(self.clock, value)

    def _decayed(self, use: UseRecord) -> float:
        factor: float = 0.5 ** ((self._tick - use.tick) / HALF_LIFE_USES)
        return use.count * factor


class LoadCosts:
    """Running means of the seconds a byte that each kind of load takes."""

    def __init__(self) -> None:
        self._rates: dict[LoadKind, float] = {}

    def record(self, kind: LoadKind, nbytes: int, seconds: float) -> None:
        """Records a load of `nbytes` that took `seconds`."""
        rate = seconds / max(1, nbytes)
        mean = self._rates.get(kind, rate)
        self._rates[kind] = mean + SMOOTHING * (rate - mean)

    def seconds(self, kind: LoadKind, nbytes: int) -> float:
        """Returns the seconds that a load of `nbytes` is expected to take."""
        return self._rates.get(kind, UNKNOWN_SECONDS_PER_BYTE) * nbytes

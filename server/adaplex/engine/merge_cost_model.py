"""StepCosts: what the products of a step take on this machine, with adapters merged or not."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from adaplex.engine.batch import Batch
from adaplex.engine.request import AdapterMode


@dataclass(frozen=True)
class StepRows:
    """Rows of a step: of the base, and by adapter, unmerged and merged."""

    base: int = 0
    unmerged: Mapping[str, int] = field(default_factory=dict)
    merged: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> StepRows:
        """That of a batch."""
        base, rows = 0, {mode: Counter[str]() for mode in AdapterMode}
        for chunk in batch.chunks:
            adapter = chunk.sequence.adapter
            own = chunk.count - chunk.base if adapter else 0
            base += chunk.count - own
            if adapter and own:
                rows[adapter.mode][adapter.digest] += own
        return cls(base, rows[AdapterMode.UNMERGED], rows[AdapterMode.MERGED])

    def rows(self, digest: str) -> int:
        """Those of an adapter."""
        return self.unmerged.get(digest, 0) + self.merged.get(digest, 0)

    def applied(self, digest: str, mode: AdapterMode) -> StepRows:
        """The same rows, were all of an adapter in this mode."""
        unmerged = {key: count for key, count in self.unmerged.items() if key != digest}
        merged = {key: count for key, count in self.merged.items() if key != digest}
        if rows := self.rows(digest):
            (merged if mode is AdapterMode.MERGED else unmerged)[digest] = rows
        return StepRows(self.base, unmerged, merged)


@dataclass(frozen=True)
class FoldedShare:
    """What merging makes of an adapter. The parts are those of all linears but the output layer, by
    the size of their weights.
    """

    nbytes: int = 0
    dense: float = 1.0
    """Part that is dense then."""
    kept: float = 0.0
    """Part that has a weight of its own too, and of the base's kind."""

    @property
    def changed(self) -> float:
        """Part that the adapter changes, merged or not; the rest stays the base's."""
        return self.dense + self.kept


FoldedShares = Mapping[str, FoldedShare]
"""By digest; of an adapter that is missing all is dense."""
WHOLE = FoldedShare()
UNKNOWN: FoldedShares = MappingProxyType({})


@dataclass(frozen=True)
class StepCosts:
    """Seconds of all linears of the model but the output layer, at some numbers of rows."""

    rows: tuple[int, ...]
    """Ascending."""
    base: tuple[float, ...]
    """As they are kept."""
    merged: tuple[float, ...]
    """Dense."""
    low_rank: tuple[float, ...]
    """The deltas of one adapter."""
    another_adapter: float
    """What each further adapter adds to the deltas of the same rows."""
    base_takes_merged: bool = True
    """Whether rows of merged adapters go through the base too, unless one of these has all rows."""

    def __post_init__(self) -> None:
        """Asserts that there is a figure for each number of rows."""
        assert list(self.rows) == sorted(set(self.rows))
        assert len(self.rows) == len(self.base) == len(self.merged) == len(self.low_rank) > 1

    def step_seconds(self, mix: StepRows, merges: FoldedShares = UNKNOWN) -> float:
        """A merged adapter is a pass of its own over its weights; all others share one over the
        base, and so do its rows at linears that it leaves alone.
        """
        seconds = self._shared(mix, 1 - _changed(mix.merged, merges))
        for digest, rows in mix.merged.items():
            merge = merges.get(digest, WHOLE)
            seconds += merge.dense * self._at(self.merged, rows)
            seconds += merge.kept * self._at(self.base, rows)
        if mix.unmerged:
            deltas = self._at(self.low_rank, sum(mix.unmerged.values()))
            deltas += self.another_adapter * (len(mix.unmerged) - 1)
            seconds += _changed(mix.unmerged, merges) * deltas
        return seconds

    def saved(self, digest: str, mix: StepRows, merges: FoldedShares = UNKNOWN) -> float:
        """Seconds that merging an adapter would save; below 0 when it would cost some."""
        unmerged, merged = (
            self.step_seconds(mix.applied(digest, mode), merges)
            for mode in (AdapterMode.UNMERGED, AdapterMode.MERGED)
        )
        return unmerged - merged

    def _shared(self, mix: StepRows, alone: float) -> float:
        """The pass over the base; at a part `alone` of the linears merged rows have no other."""
        shared = mix.base + sum(mix.unmerged.values())
        every = shared + sum(mix.merged.values())
        if self.base_takes_merged and (shared or len(mix.merged) > 1):
            alone = 1.0
        seconds = alone * self._at(self.base, every) if every else 0.0
        return seconds + ((1 - alone) * self._at(self.base, shared) if shared else 0.0)

    def _at(self, seconds: Sequence[float], rows: int) -> float:
        """Between measured numbers of rows in proportion; beyond them as the last two go on."""
        if rows <= self.rows[0]:
            return seconds[0]
        index = min(bisect_left(self.rows, rows), len(self.rows) - 1)
        left, right = self.rows[index - 1], self.rows[index]
        slope = (seconds[index] - seconds[index - 1]) / (right - left)
        return max(0.0, seconds[index - 1] + slope * (rows - left))


def _changed(rows: Mapping[str, int], merges: FoldedShares) -> float:
    """Part of the linears that adapters change, on the average of their rows; 1 without any."""
    changed = sum(count * merges.get(digest, WHOLE).changed for digest, count in rows.items())
    return changed / sum(rows.values()) if rows else 1.0

"""StepCosts: the modelled seconds of a step on this machine, with adapters merged or not."""

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
    """Numbers of rows in a step: of the base, and of adapters by digest and mode."""

    base: int = 0
    unmerged: Mapping[str, int] = field(default_factory=dict)
    merged: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> StepRows:
        """Counts the rows of a batch; those before an invocation are the base's."""
        base, counts = 0, {mode: Counter[str]() for mode in AdapterMode}
        for chunk in batch.chunks:
            adapter = chunk.sequence.adapter
            own = chunk.count - chunk.base if adapter else 0
            base += chunk.count - own
            if adapter and own:
                counts[adapter.mode][adapter.digest] += own
        return cls(base, counts[AdapterMode.UNMERGED], counts[AdapterMode.MERGED])

    def count(self, digest: str) -> int:
        """Returns the rows of an adapter, in either mode."""
        return self.unmerged.get(digest, 0) + self.merged.get(digest, 0)

    def with_mode(self, digest: str, mode: AdapterMode) -> StepRows:
        """Returns the same rows with all rows of an adapter in one mode."""
        unmerged = {key: count for key, count in self.unmerged.items() if key != digest}
        merged = {key: count for key, count in self.merged.items() if key != digest}
        if count := self.count(digest):
            (merged if mode is AdapterMode.MERGED else unmerged)[digest] = count
        return StepRows(self.base, unmerged, merged)


@dataclass(frozen=True)
class FoldedShare:
    """The effect of merging an adapter, as fractions of all linears but the output layer, by the
    size of their weights.
    """

    nbytes: int = 0
    """Bytes of the merged weights."""
    dense: float = 1.0
    """Fraction of weights that become dense after merging."""
    kept: float = 0.0
    """Fraction of weights that become another weight of the base's own kind."""

    @property
    def changed(self) -> float:
        """Fraction that the adapter changes, merged or not; the rest is the base's."""
        return self.dense + self.kept


FoldedShares = Mapping[str, FoldedShare]
"""Shares by digest; of a missing adapter all weights become dense."""
WHOLE = FoldedShare()
UNKNOWN: FoldedShares = MappingProxyType({})


@dataclass(frozen=True)
class StepCosts:
    """Seconds of all linears of the model but the output layer, measured at some row counts."""

    rows: tuple[int, ...]
    """The row counts, ascending."""
    base: tuple[float, ...]
    """Seconds with the base's weights as stored."""
    merged: tuple[float, ...]
    """Seconds with dense weights."""
    low_rank: tuple[float, ...]
    """Seconds of the deltas of one adapter."""
    another_adapter: float
    """Seconds that each further adapter adds to the deltas of the same rows."""
    base_takes_merged: bool = True
    """True if rows of merged adapters also go through the base, unless all rows are of one."""

    def __post_init__(self) -> None:
        """Asserts that there is a figure for each row count."""
        assert list(self.rows) == sorted(set(self.rows))
        assert len(self.rows) == len(self.base) == len(self.merged) == len(self.low_rank) > 1

    def step_seconds(self, rows: StepRows, shares: FoldedShares = UNKNOWN) -> float:
        """Returns the seconds of a step.

        A merged adapter is one pass over its own weights. All other rows share one pass over the
        base, together with merged rows at the linears that their adapters leave unchanged.
        """
        seconds = self._shared(rows, 1 - _changed(rows.merged, shares))
        for digest, count in rows.merged.items():
            share = shares.get(digest, WHOLE)
            seconds += share.dense * self._at(self.merged, count)
            seconds += share.kept * self._at(self.base, count)
        if rows.unmerged:
            deltas = self._at(self.low_rank, sum(rows.unmerged.values()))
            deltas += self.another_adapter * (len(rows.unmerged) - 1)
            seconds += _changed(rows.unmerged, shares) * deltas
        return seconds

    def saved(self, digest: str, rows: StepRows, shares: FoldedShares = UNKNOWN) -> float:
        """Returns the seconds that merging an adapter would save, negative if it would cost."""
        unmerged, merged = (
            self.step_seconds(rows.with_mode(digest, mode), shares)
            for mode in (AdapterMode.UNMERGED, AdapterMode.MERGED)
        )
        return unmerged - merged

    def _shared(self, rows: StepRows, unchanged: float) -> float:
        """Returns the seconds of the pass over the base; at a fraction `unchanged` of the linears
        merged rows have no other pass.
        """
        shared = rows.base + sum(rows.unmerged.values())
        every = shared + sum(rows.merged.values())
        if self.base_takes_merged and (shared or len(rows.merged) > 1):
            unchanged = 1.0
        seconds = unchanged * self._at(self.base, every) if every else 0.0
        return seconds + ((1 - unchanged) * self._at(self.base, shared) if shared else 0.0)

    def _at(self, seconds: Sequence[float], count: int) -> float:
        """Interpolates between measured row counts; extrapolates from the last two."""
        if count <= self.rows[0]:
            return seconds[0]
        index = min(bisect_left(self.rows, count), len(self.rows) - 1)
        left, right = self.rows[index - 1], self.rows[index]
        slope = (seconds[index] - seconds[index - 1]) / (right - left)
        return max(0.0, seconds[index - 1] + slope * (count - left))


def _changed(rows: Mapping[str, int], shares: FoldedShares) -> float:
    """Returns the fraction of linears that adapters change, averaged over rows; 1 without any."""
    changed = sum(count * shares.get(digest, WHOLE).changed for digest, count in rows.items())
    return changed / sum(rows.values()) if rows else 1.0

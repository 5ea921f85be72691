"""AutoMerge: what recent steps were made of, and for which adapters merging would have paid."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from adaplex.engine.batch import Batch
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts, StepRows

STRIDE = 16
"""One step in so many is remembered: neighbours are alike."""
REMEMBERED = 128
ENOUGH = 8
"""Remembered steps with rows of an adapter before it is judged."""
PARTS = 4
"""Parts of the remembered steps in each of which merging must save something: traffic that is near
the point where it pays swings to both sides of it.
"""
MARGIN = 0.02
"""Share of the time that merging must save to begin with it. It ends when it saves nothing, or
costs as much in the last part. While the mode of an adapter changes, its rows are of both, which is
worse than either.
"""


class AutoMerge:
    """The last steps, and a verdict on each adapter that was asked about since the newest."""

    def __init__(self, costs: StepCosts | None) -> None:
        """Without `costs`, merging never pays."""
        self._costs = costs
        self._mixes: deque[StepRows] = deque(maxlen=REMEMBERED)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        """What they took, by the costs."""
        self._merges: dict[str, FoldedShare] = {}
        self._steps = 0
        self._verdicts: dict[str, bool] = {}
        self._paid: set[str] = set()
        """Adapters of which the last verdict was that merging pays."""
        self._resting: dict[str, int] = {}
        """Until which step an adapter is not judged."""

    def note(self, batch: Batch) -> None:
        """A step ran."""
        self._steps += 1
        if self._costs is not None and self._steps % STRIDE == 0:
            mix = StepRows.of(batch)
            self._mixes.append(mix)
            self._seconds.append(self._costs.step_seconds(mix, self._merges))
            self._verdicts.clear()
            if self._steps % (STRIDE * REMEMBERED) == 0:
                self._paid = {d for d in self._paid if any(mix.rows(d) for mix in self._mixes)}
            self._resting = {d: end for d, end in self._resting.items() if end > self._steps}

    def judges(self, digest: str) -> bool:
        """Whether enough of those steps have rows of the adapter."""
        return self._costs is not None and len(self._mixes_with(digest)) >= ENOUGH

    def share(self, digest: str) -> FoldedShare | None:
        """Returns what merging makes of an adapter, as recorded; None if nothing is."""
        return self._merges.get(digest)

    def record_share(self, digest: str, merge: FoldedShare | None) -> None:
        """Records what merging makes of an adapter, None to forget it; judges the adapter anew."""
        if merge is None:
            self._merges.pop(digest, None)
        else:
            self._merges[digest] = merge
        self._verdicts.pop(digest, None)
        self._paid.discard(digest)

    def pays(self, digest: str) -> bool:
        """Whether those steps would have been faster with all rows of the adapter merged."""
        if digest not in self._verdicts:
            verdict = self._verdicts[digest] = self._judge(digest)
            if verdict:
                self._paid.add(digest)
            elif digest in self._paid:
                self.forget(digest)
        return self._verdicts[digest]

    def paying(self, digests: Iterable[str]) -> frozenset[str]:
        """Those of them for which it does."""
        return frozenset(filter(self.pays, digests))

    def forget(self, digest: str) -> None:
        """The adapter has to earn it again, by steps that are all yet to come."""
        self._resting[digest] = self._steps + STRIDE * REMEMBERED
        self._verdicts[digest] = False
        self._paid.discard(digest)

    def _judge(self, digest: str) -> bool:
        mixes = self._mixes_with(digest)
        if self._costs is None or len(mixes) < ENOUGH:
            return False
        saved = [self._costs.saved(digest, mix, self._merges) for mix in mixes]
        part = len(saved) // PARTS
        parts = [sum(saved[i * part : (i + 1) * part]) for i in range(PARTS)]
        least = MARGIN * sum(self._seconds)
        if digest in self._paid:
            return sum(saved) > 0.0 and parts[-1] > -least / PARTS
        return sum(saved) > least and min(parts) > 0.0

    def _mixes_with(self, digest: str) -> list[StepRows]:
        """The remembered steps with rows of an adapter; none while it rests."""
        if digest in self._resting:
            return []
        return [mix for mix in self._mixes if mix.rows(digest)]

"""AutoMerge: the adapters that recent steps would have run faster with merged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from adaplex.engine.batch import Batch
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts, StepRows

STRIDE = 16
"""One step in STRIDE is sampled: neighbouring steps are alike."""
WINDOW = 128
"""Sampled steps that are remembered."""
MIN_STEPS = 8
"""Sampled steps with rows of an adapter before it is judged."""
PARTS = 4
"""Parts of the sampled steps in each of which merging must save time: traffic near the break-even
point swings to both sides of it.
"""
MARGIN = 0.02
"""Fraction of the time that merging must save to begin. It ends if it saves nothing, or costs as
much in the last part. While the mode of an adapter changes, its rows are of both modes, which is
slower than either.
"""


class AutoMerge:
    """Samples steps, records what merging makes of adapters, and judges by both what pays.

    Verdicts last until the next sampled step.
    """

    def __init__(self, costs: StepCosts | None) -> None:
        """Without `costs`, merging never pays."""
        self._costs = costs
        self._sampled: deque[StepRows] = deque(maxlen=WINDOW)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        """Modelled seconds of the sampled steps."""
        self._shares: dict[str, FoldedShare] = {}
        """Measured shares by digest."""
        self._steps = 0
        self._verdicts: dict[str, bool] = {}
        self._paying: set[str] = set()
        """Digests whose last verdict was that merging pays."""
        self._suspended: dict[str, int] = {}
        """Steps until which adapters are not judged, by digest."""

    def record_step(self, batch: Batch) -> None:
        """Records a step that ran."""
        self._steps += 1
        if self._costs is not None and self._steps % STRIDE == 0:
            rows = StepRows.of(batch)
            self._sampled.append(rows)
            self._seconds.append(self._costs.step_seconds(rows, self._shares))
            self._verdicts.clear()
            if self._steps % (STRIDE * WINDOW) == 0:
                self._paying = {d for d in self._paying if any(r.count(d) for r in self._sampled)}
            self._suspended = {d: end for d, end in self._suspended.items() if end > self._steps}

    def has_enough_steps(self, digest: str) -> bool:
        """Returns True if enough sampled steps have rows of the adapter to judge it."""
        return self._costs is not None and len(self._steps_with(digest)) >= MIN_STEPS

    def share(self, digest: str) -> FoldedShare | None:
        """Returns what merging makes of an adapter, as recorded; None if nothing is."""
        return self._shares.get(digest)

    def record_share(self, digest: str, share: FoldedShare | None) -> None:
        """Records what merging makes of an adapter, or None to forget it; judges it anew."""
        if share is None:
            self._shares.pop(digest, None)
        else:
            self._shares[digest] = share
        self._verdicts.pop(digest, None)
        self._paying.discard(digest)

    def pays(self, digest: str) -> bool:
        """Returns True if the sampled steps would have been faster with the adapter merged."""
        if digest not in self._verdicts:
            verdict = self._verdicts[digest] = self._judge(digest)
            if verdict:
                self._paying.add(digest)
            elif digest in self._paying:
                self.suspend(digest)
        return self._verdicts[digest]

    def paying(self, digests: Iterable[str]) -> frozenset[str]:
        """Returns the digests for which `pays` returns True."""
        return frozenset(filter(self.pays, digests))

    def suspend(self, digest: str) -> None:
        """Makes merging an adapter not pay until a whole window of new steps was sampled."""
        self._suspended[digest] = self._steps + STRIDE * WINDOW
        self._verdicts[digest] = False
        self._paying.discard(digest)

    def _judge(self, digest: str) -> bool:
        steps = self._steps_with(digest)
        if self._costs is None or len(steps) < MIN_STEPS:
            return False
        saved = [self._costs.saved(digest, rows, self._shares) for rows in steps]
        length = len(saved) // PARTS
        parts = [sum(saved[i * length : (i + 1) * length]) for i in range(PARTS)]
        least = MARGIN * sum(self._seconds)
        if digest in self._paying:
            return sum(saved) > 0.0 and parts[-1] > -least / PARTS
        return sum(saved) > least and min(parts) > 0.0

    def _steps_with(self, digest: str) -> list[StepRows]:
        """Returns the sampled steps with rows of an adapter; none while it is suspended."""
        if digest in self._suspended:
            return []
        return [rows for rows in self._sampled if rows.count(digest)]

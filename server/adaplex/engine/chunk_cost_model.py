"""ChunkCostModel: the seconds that prompt chunks add to a step, learned from measured steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

from adaplex.engine.batch import Chunk
from adaplex.engine.small_chunks import RECENT, SmallChunkCosts

NEAR = 256
"""Tokens of context up to which all costs the same; beyond it, each octave is measured apart."""


class ChunkCostModel:
    """Seconds a token by the context it attends to, as medians of what was measured lately.

    What a chunk of a block or more costs by itself counts as its tokens'; `small` knows of less.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block = block_tokens
        self.small = SmallChunkCosts()
        self._tokens: dict[int, deque[tuple[float, float]]] = {}
        """(context, seconds a token) by octave of the context."""
        self._curve: list[tuple[float, float]] = []
        """Their medians, by context."""

    def note(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """These chunks added so many seconds to a step."""
        rows = sum(chunk.count for chunk in chunks)
        if len(chunks) == 1 and rows <= self._block:
            self.small.note(rows, seconds)
            if rows < self._block and self._curve:
                return
        context = sum(chunk.count * (chunk.start + chunk.end) / 2 for chunk in chunks) / rows
        octave = int(context // NEAR).bit_length()
        self._tokens.setdefault(octave, deque(maxlen=RECENT)).append((context, seconds / rows))
        self._curve = [_medians(kept) for _, kept in sorted(self._tokens.items())]

    def seconds(self, start: int, count: int) -> float:
        """What a chunk would add; 0 while nothing is known."""
        return count * self._token(start + count / 2)

    def tokens(self, start: int, seconds: float) -> float:
        """How many tokens from `start` would add so many seconds."""
        count = 0.0
        for _ in range(2):  # the context they attend to grows with their number
            cost = self._token(start + count / 2)
            if not cost or math.isinf(seconds):
                return math.inf
            count = seconds / cost
        return count

    def _token(self, context: float) -> float:
        """Seconds of a token that attends to so many: between measured contexts in proportion,
        beyond them as far as they went up.
        """
        if not self._curve:
            return 0.0
        if len(self._curve) == 1 or context <= self._curve[0][0]:
            return self._curve[0][1]
        last = len(self._curve) - 1
        index = next((i for i, (at, _) in enumerate(self._curve) if at >= context), last)
        (left, low), (right, high) = self._curve[index - 1 : index + 1]
        slope = (high - low) / (right - left)
        if context > right:
            return high + max(0.0, slope) * (context - right)
        return low + slope * (context - left)


def _medians(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return median(first), median(second)

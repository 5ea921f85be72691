"""ChunkCosts: the seconds that prompt chunks add to a step, learned from the steps themselves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

from adaplex.engine.batch import Chunk

RECENT = 5
"""Measurements of a kind that are kept: their median takes no notice of two that are far out, and
follows a lasting change within three."""
NEAR = 256
"""Tokens of context up to which all costs the same; beyond it, each octave is measured apart."""
LEAST = 2
"""Tokens of the smallest chunk; one token is a row that decodes."""
WORTHWHILE = 0.75
"""Of the seconds of a chunk, at most, that half of it must take for chunks to be made so small."""


class ChunkCosts:
    """Seconds a token by the context it attends to, as medians of what was measured lately.

    What a chunk costs by itself counts as its tokens'. Where it costs so much that a smaller one
    is hardly faster, `smallest` says so.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block = block_tokens
        self._tokens: dict[int, deque[tuple[float, float]]] = {}
        """(context, seconds a token) by octave of the context."""
        self._curve: list[tuple[float, float]] = []
        """Their medians, by context."""
        self._small: dict[int, deque[tuple[float, float]]] = {}
        """(context, seconds) of a single chunk, by its tokens: a block, half of one, and so on."""

    def note(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """These chunks added so many seconds to a step."""
        rows = sum(chunk.count for chunk in chunks)
        context = sum(chunk.count * (chunk.start + chunk.end) / 2 for chunk in chunks) / rows
        if len(chunks) == 1 and rows in self._sizes():
            self._small.setdefault(rows, deque(maxlen=RECENT)).append((context, seconds))
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

    @property
    def smallest(self) -> int:
        """Tokens below which a chunk is hardly faster for being smaller."""
        size = self._block
        for half in self._sizes()[1:]:
            if not self._pays(size, half):
                break
            size = half
        return size

    def _pays(self, size: int, half: int) -> bool:
        """Whether half a chunk is much faster, as far as is known, were both at one context."""
        if size not in self._small or half not in self._small:
            return True
        (there, whole), (here, part) = _medians(self._small[size]), _medians(self._small[half])
        return part * self._token(there) <= WORTHWHILE * whole * self._token(here)

    def _sizes(self) -> list[int]:
        """A block and its halves, down to LEAST."""
        sizes = [self._block]
        while sizes[-1] >= 2 * LEAST:
            sizes.append(sizes[-1] // 2)
        return sizes

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

"""ChunkCostModel: the seconds that prompt chunks add to a step, learned from measured steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from heapq import nlargest
from statistics import median

from adaplex.engine.batch import Chunk

RECENT = 5
"""Measurements of a kind whose median is used: it ignores two outliers, and follows a lasting
change after three.
"""
MIN_CHUNK = 2
"""Tokens of the smallest chunk; one token is a row that decodes."""
WORTHWHILE = 2 / 3
"""Halve a chunk only if the half takes at most this fraction of the whole's time."""
TOLERANCE = 1.5
"""Factor over the seconds to be spent up to which a chunk need not be made smaller to fit."""
NEAR = 256
"""Tokens of context up to which all tokens cost the same; above, each octave is measured apart."""


class ChunkCostModel:
    """Seconds a token by the context it attends to, as medians of recent measurements.

    The fixed cost of a chunk of a block or more counts as its tokens'; SmallChunkCosts separates
    the two for chunks below a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block = block_tokens
        self._small = SmallChunkCosts()
        self._tokens: dict[int, deque[tuple[float, float]]] = {}
        """(context, seconds a token) by octave of the context."""
        self._curve: list[tuple[float, float]] = []
        """Their medians, by context."""

    def record(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Records that chunks together added `seconds` to a step."""
        rows = sum(chunk.count for chunk in chunks)
        if len(chunks) == 1 and rows <= self._block:
            self._small.record(rows, seconds)
            if rows < self._block and self._curve:
                return
        context = sum(chunk.count * (chunk.start + chunk.end) / 2 for chunk in chunks) / rows
        octave = int(context // NEAR).bit_length()
        self._tokens.setdefault(octave, deque(maxlen=RECENT)).append((context, seconds / rows))
        self._curve = [_medians(pairs) for _, pairs in sorted(self._tokens.items())]

    def seconds(self, start: int, count: int) -> float:
        """Returns the seconds that `count` tokens from `start` would add; 0 before any record."""
        return count * self._token(start + count / 2)

    def tokens(self, start: int, seconds: float) -> float:
        """Returns the number of tokens from `start` that would add `seconds`."""
        count = 0.0
        for _ in range(2):  # the context that they attend to grows with their number
            cost = self._token(start + count / 2)
            if not cost or math.isinf(seconds):
                return math.inf
            count = seconds / cost
        return count

    def small_chunk(self, seconds: float, *, trial: bool = False) -> int:
        """Returns the tokens of a chunk of at most a block; see SmallChunkCosts.size."""
        return self._small.size(self._block, seconds, trial)

    def _token(self, context: float) -> float:
        """Returns the seconds of a token by its context: interpolated between measured contexts;
        beyond them extrapolated, but never downwards.
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


class SmallChunkCosts:
    """Separates the fixed seconds of a chunk from those of each token, for chunks below a block.

    The two differ where a chunk of another size runs among chunks of the usual size, at nearly the
    same context.
    """

    def __init__(self) -> None:
        self._size = 0
        """Tokens of a usual chunk."""
        self._seconds: deque[float] = deque(maxlen=RECENT)
        """Seconds of chunks of that size."""
        self._other = 0
        """Tokens of the last chunk, if it was of another size."""
        self._tokens: deque[float] = deque(maxlen=RECENT)
        """Seconds a token, each from two sizes."""

    def record(self, size: int, seconds: float) -> None:
        """Records that a chunk of `size` tokens added `seconds` to a step."""
        if size != self._size:
            if self._seconds and size != self._other:
                more = seconds - median(self._seconds)
                self._tokens.append(max(0.0, more / (size - self._size)))
                self._other = size
                return
            self._size = size
            self._seconds.clear()
        self._other = 0
        self._seconds.append(seconds)

    def seconds(self, size: int) -> float:
        """Returns the seconds that a chunk would add; proportional to its size while only one size
        was measured.
        """
        usual = median(self._seconds)
        token = usual / self._size
        if self._tokens:  # too high rather than too low: chunks too large would exceed the limit
            token = min(token, nlargest(2, self._tokens)[-1])
        return usual + (size - self._size) * token

    def size(self, block: int, seconds: float, trial: bool = False) -> int:
        """Returns the tokens of a chunk for which `seconds` may be spent: a block, halved while
        that pays, down to MIN_CHUNK.

        At most twice the usual size, so that the model is never extrapolated beyond twice a
        measured size. `trial` returns half or twice that size, to measure another one.
        """
        size = block
        if not self._seconds:
            return size
        bearable = TOLERANCE * seconds
        while size >= 2 * MIN_CHUNK and (cost := self.seconds(size)) > seconds:
            helps = cost > bearable >= self.seconds(MIN_CHUNK) or size > 2 * self._size
            if not helps and self.seconds(size // 2) > WORTHWHILE * cost:
                break
            size //= 2
        if trial and size > MIN_CHUNK:
            return size // 2
        return 2 * size if trial and self.seconds(2 * size) <= bearable else size


def _medians(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return median(first), median(second)

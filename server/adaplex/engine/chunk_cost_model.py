"""ChunkCostModel: the seconds that prompt chunks add to a step, learned from measured steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from heapq import nlargest
from statistics import median

from adaplex.engine.batch import Chunk

RECENT = 5
"""Measurements of a kind that are kept: their median takes no notice of two that are far out, and
follows a lasting change within three."""
LEAST = 2
"""Tokens of the smallest chunk; one token is a row that decodes."""
WORTHWHILE = 2 / 3
"""Of the seconds of a chunk, at most, that half of it must take to be chosen for spending less."""
TOO_MUCH = 1.5
"""Times the seconds to be spent beyond which any smaller chunk is chosen that stays within."""
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


class SmallChunkCosts:
    """A chunk takes some seconds for itself and some for each token. Which is which is seen
    where one of another size comes among those of the usual size, so at nearly the same context.
    """

    def __init__(self) -> None:
        self._size = 0
        """Tokens of a usual chunk."""
        self._seconds: deque[float] = deque(maxlen=RECENT)
        """Of chunks of that size."""
        self._other = 0
        """Tokens of the last chunk, where it was of another size."""
        self._tokens: deque[float] = deque(maxlen=RECENT)
        """Seconds a token, each from two sizes."""

    def note(self, size: int, seconds: float) -> None:
        """A chunk of so many tokens added so many seconds to a step."""
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
        """What a chunk would add; while one size is known only, in proportion."""
        usual = median(self._seconds)
        token = usual / self._size
        if self._tokens:  # rather too dear: chunks too large would break the bound
            token = min(token, nlargest(2, self._tokens)[-1])
        return usual + (size - self._size) * token

    def size(self, block: int, seconds: float, trial: bool = False) -> int:
        """Tokens of the chunk to take where so many seconds may be spent: a block, or half of one,
        and so on down to LEAST, and at most twice a usual one, so that nothing is believed far
        from where it was measured. `trial`: half or twice of that, to see what another size takes.
        """
        size = block
        if not self._seconds:
            return size
        bearable = TOO_MUCH * seconds
        while size >= 2 * LEAST and (cost := self.seconds(size)) > seconds:
            helps = cost > bearable >= self.seconds(LEAST) or size > 2 * self._size
            if not helps and self.seconds(size // 2) > WORTHWHILE * cost:
                break
            size //= 2
        if trial and size > LEAST:
            return size // 2
        return 2 * size if trial and self.seconds(2 * size) <= bearable else size


def _medians(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return median(first), median(second)

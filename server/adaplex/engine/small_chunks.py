"""SmallChunkCosts: what chunks below a block add to a step, and how small they are worth making."""

from __future__ import annotations

from collections import deque
from heapq import nlargest
from statistics import median

RECENT = 5
"""Measurements of a kind that are kept: their median takes no notice of two that are far out, and
follows a lasting change within three."""
LEAST = 2
"""Tokens of the smallest chunk; one token is a row that decodes."""
WORTHWHILE = 2 / 3
"""Of the seconds of a chunk, at most, that half of it must take to be chosen for spending less."""
TOO_MUCH = 1.5
"""Times the seconds to be spent beyond which any smaller chunk is chosen that stays within."""


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

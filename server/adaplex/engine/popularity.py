"""Popularity: which adapters recent requests ask for."""

from __future__ import annotations

from collections import Counter, deque

WINDOW = 16
"""Requests looked back on, in units of the threshold: hot is a sixteenth of the traffic."""


class Popularity:
    """Counts digests over the last WINDOW * threshold requests; `threshold` of them is hot."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._recent: deque[str] = deque()
        self._counts: Counter[str] = Counter()

    def note(self, digest: str) -> None:
        """A request asks for this adapter."""
        self._recent.append(digest)
        self._counts[digest] += 1
        if len(self._recent) > WINDOW * self._threshold:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def is_hot(self, digest: str) -> bool:
        """Whether the adapter has earned merged weights."""
        return self._counts[digest] >= self._threshold

    def hot(self) -> frozenset[str]:
        """All that have."""
        return frozenset(d for d, count in self._counts.items() if count >= self._threshold)

    def forget(self, digest: str) -> None:
        """The adapter has to earn it again."""
        self._recent = deque(d for d in self._recent if d != digest)
        del self._counts[digest]

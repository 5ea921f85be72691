"""VirtualTokenCounter: shares the engine between adapters by the tokens they were served.

After Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588).
"""

from __future__ import annotations

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""A token that is generated costs more than one of a prompt."""


class VirtualTokenCounter:
    """A counter for each key that has been served; the queue goes on with the least one.

    A key that comes to wait is lifted to the least counter of those that wait, so that nobody saves
    up service while away. Of two keys that always wait, neither gets more than the other by much
    more than its largest request.
    """

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        """Sequences that wait, by key."""
        self._left_at = 0.0
        """The counter of the key that last ceased to wait."""

    def counter(self, key: str) -> float:
        """Weighted tokens that a key was served, as lifted."""
        return self._counters.get(key, 0.0)

    def joined(self, key: str) -> None:
        """A sequence of the key has come to wait."""
        if not self._waiting:
            self._prune()
        if key not in self._waiting:
            others = [self.counter(other) for other in self._waiting]
            floor = min(others, default=self._left_at)
            self._counters[key] = max(self.counter(key), floor)
        self._waiting[key] = self._waiting.get(key, 0) + 1

    def left(self, key: str) -> None:
        """A sequence of the key waits no more."""
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            self._left_at = max(self._left_at, self.counter(key))

    def served(self, key: str, *, prompt: int = 0, output: int = 0) -> None:
        """Tokens of the key were taken in, or generated."""
        cost = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        self._counters[key] = self.counter(key) + cost

    def _prune(self) -> None:
        """Forgets keys that a lift would give the same counter: the table stays as small as what is
        in use.
        """
        self._counters = {
            key: value for key, value in self._counters.items() if value > self._left_at
        }

"""VirtualTokenCounter: shares the engine between adapters by the tokens they were served.

After Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588).
"""

from __future__ import annotations

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""A token that is generated costs more than one of a prompt."""
MAX_IDLE = 1024
"""Keys that do not wait and are remembered, roughly."""


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
        self._forgotten_at = 0.0
        """No counter that was forgotten stood higher; whoever comes to wait is lifted above it."""

    def counter(self, key: str) -> float:
        """Weighted tokens that a key was served, as lifted."""
        return self._counters.get(key, self._forgotten_at)

    def joined(self, key: str) -> None:
        """A sequence of the key has come to wait."""
        if key not in self._waiting:
            floor = min(map(self.counter, self._waiting), default=self._left_at)
            if not self._waiting or len(self._counters) > MAX_IDLE + 2 * len(self._waiting):
                self._forget(floor)
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

    def _forget(self, floor: float) -> None:
        """Forgets keys that a lift to `floor` would leave there, so that the table stays small.
        What they are charged before they come to wait again counts from there.
        """
        self._forgotten_at = max(self._forgotten_at, floor)
        self._counters = {key: value for key, value in self._counters.items() if value > floor}

"""VirtualTokenCounter: shares the engine between adapters by the tokens computed for them.

After Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588).
"""

from __future__ import annotations

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""A generated token costs more than a prompt token."""
MAX_IDLE = 1024
"""Keys without waiting sequences whose counters are remembered, roughly."""


class VirtualTokenCounter:
    """Weighted tokens by key; of the keys with waiting sequences, the least is served next.

    A key whose first sequence begins to wait is lifted to the least counter of the waiting keys, so
    that no key saves up service while it is away. Of two keys that always wait, neither gets more
    than the other by much more than its largest request.
    """

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        """Waiting sequences by key."""
        self._left_at = 0.0
        """Counter of the key that last ceased to wait."""
        self._forgotten_at = 0.0
        """The highest counter that may have been forgotten; a key that is not known starts here."""

    def counter(self, key: str) -> float:
        """Returns the weighted tokens charged to a key, lifts included."""
        return self._counters.get(key, self._forgotten_at)

    def add_waiting(self, key: str) -> None:
        """Counts a sequence of the key that begins to wait."""
        if key not in self._waiting:
            floor = min(map(self.counter, self._waiting), default=self._left_at)
            if not self._waiting or len(self._counters) > MAX_IDLE + 2 * len(self._waiting):
                self._forget(floor)
            self._counters[key] = max(self.counter(key), floor)
        self._waiting[key] = self._waiting.get(key, 0) + 1

    def remove_waiting(self, key: str) -> None:
        """Counts a sequence of the key that no longer waits."""
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            self._left_at = max(self._left_at, self.counter(key))

    def charge(self, key: str, *, prompt: int = 0, output: int = 0) -> None:
        """Charges tokens to the key: of prompts, and generated."""
        cost = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        self._counters[key] = self.counter(key) + cost

    def _forget(self, floor: float) -> None:
        """Forgets counters that a lift to `floor` would replace, so that the table stays small.

        Tokens charged to a forgotten key before it waits again count from `floor`.
        """
        self._forgotten_at = max(self._forgotten_at, floor)
        self._counters = {key: value for key, value in self._counters.items() if value > floor}

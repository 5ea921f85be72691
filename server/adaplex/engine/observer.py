"""Observer: where the engine reports what it does. Metrics implement it; the default is silent."""

from __future__ import annotations

from typing import Literal, Protocol

CacheName = Literal["arena", "host", "merged"]
Outcome = Literal["ok", "error"]


class Observer(Protocol):
    """Called on the engine thread (`adapter_loaded` too); must be quick and never raise."""

    def stepped(self, *, rows: int) -> None:
        """One step ran `rows` tokens."""

    def preempted(self) -> None:
        """A running sequence gave up its blocks and will be recomputed."""

    def prefix_looked_up(self, *, tokens: int, hits: int) -> None:
        """A prompt of `tokens` was looked up; KV of `hits` of them was reused."""

    def adapter_loaded(self, *, tier: CacheName, outcome: Outcome, seconds: float) -> None:
        """An adapter was brought into a tier, or failed to be."""

    def adapter_evicted(self, *, tier: CacheName) -> None:
        """An adapter was dropped from a tier to make room."""

    def merged_looked_up(self, *, hit: bool) -> None:
        """A request for merged weights found them made, or not."""


class SilentObserver:
    """Drops every report."""

    def stepped(self, *, rows: int) -> None:
        """Drops the report."""

    def preempted(self) -> None:
        """Drops the report."""

    def prefix_looked_up(self, *, tokens: int, hits: int) -> None:
        """Drops the report."""

    def adapter_loaded(self, *, tier: CacheName, outcome: Outcome, seconds: float) -> None:
        """Drops the report."""

    def adapter_evicted(self, *, tier: CacheName) -> None:
        """Drops the report."""

    def merged_looked_up(self, *, hit: bool) -> None:
        """Drops the report."""

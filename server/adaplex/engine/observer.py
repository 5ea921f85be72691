"""Observer: receives reports of what the engine does. Metrics implement it."""

from __future__ import annotations

from typing import Literal, Protocol

CacheName = Literal["arena", "host", "merged"]
Outcome = Literal["ok", "error"]


class Observer(Protocol):
    """Called on the engine thread; must be quick and never raise."""

    def stepped(self, *, rows: int) -> None:
        """One step ran `rows` tokens."""

    def preempted(self) -> None:
        """A running sequence lost its blocks to another and will be recomputed."""

    def prefix_looked_up(self, *, tokens: int, hits: int) -> None:
        """A prompt of `tokens` was looked up; keys and values of `hits` of them were reused."""

    def adapter_loaded(self, *, cache: CacheName, outcome: Outcome, seconds: float) -> None:
        """An adapter was loaded into a cache, or failed to be."""

    def adapter_evicted(self, *, cache: CacheName) -> None:
        """An adapter was evicted from a cache to make room."""

    def merged_looked_up(self, *, hit: bool) -> None:
        """A request that may be served merged found the merged weights in memory, or not."""


class SilentObserver:
    """Ignores every report."""

    def stepped(self, *, rows: int) -> None:
        """Ignores the report."""

    def preempted(self) -> None:
        """Ignores the report."""

    def prefix_looked_up(self, *, tokens: int, hits: int) -> None:
        """Ignores the report."""

    def adapter_loaded(self, *, cache: CacheName, outcome: Outcome, seconds: float) -> None:
        """Ignores the report."""

    def adapter_evicted(self, *, cache: CacheName) -> None:
        """Ignores the report."""

    def merged_looked_up(self, *, hit: bool) -> None:
        """Ignores the report."""

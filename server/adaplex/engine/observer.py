"""Observer: where the engine reports what it does. Metrics implement it; the default is silent."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class EngineStats:
    """How full the engine is now. Safe to read from any thread."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    arena_bytes_total: int = 0
    arena_bytes_used: int = 0
    host_bytes_total: int = 0
    host_bytes_used: int = 0
    merged_bytes_total: int = 0
    merged_bytes_used: int = 0
    pinned_bytes_total: int = 0
    """Bytes of the arena that pins may take."""
    pinned_bytes_used: int = 0
    resident: frozenset[str] = frozenset()
    """Digests in the arena."""
    host: frozenset[str] = frozenset()
    """Digests in host memory."""
    pinned: frozenset[str] = frozenset()
    """Digests that are kept in the arena, or on their way there."""
    merged: frozenset[str] = frozenset()
    """Digests with merged weights."""
    running_adapters: tuple[str, ...] = ()
    """Names of adapters that running sequences use."""
    waiting_adapters: tuple[str, ...] = ()

    @property
    def in_memory(self) -> frozenset[str]:
        """Digests in the arena, or with merged weights, or both."""
        return self.resident | self.merged

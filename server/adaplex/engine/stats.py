"""EngineStats: the load and the memory of the engine at one moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adaplex.engine.block_manager import BlockManager
from adaplex.engine.config import EngineConfig
from adaplex.engine.residency import Residency
from adaplex.engine.scheduler import Scheduler
from adaplex.engine.sequence import Sequence


@dataclass(frozen=True)
class EngineStats:
    """Load and memory of the engine. Immutable, so that any thread may read it."""

    running: int = 0
    """Running sequences."""
    waiting: int = 0
    """Waiting sequences."""
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
    """Digests of pinned adapters, in the arena or not yet."""
    merged: frozenset[str] = frozenset()
    """Digests with merged weights."""
    running_adapters: tuple[str, ...] = ()
    """Names of adapters that running sequences use."""
    waiting_adapters: tuple[str, ...] = ()
    """Names of adapters that waiting sequences need."""

    @property
    def in_memory(self) -> frozenset[str]:
        """Digests in the arena or with merged weights."""
        return self.resident | self.merged


def collect_stats(
    config: EngineConfig, blocks: BlockManager, residency: Residency, scheduler: Scheduler
) -> EngineStats:
    """Returns how full the engine is now. Called on the engine thread."""
    running, waiting, adapters = scheduler.running, scheduler.waiting, residency.stats()
    return EngineStats(
        running=len(running),
        waiting=len(waiting),
        kv_blocks_total=config.usable_blocks,
        kv_blocks_used=blocks.in_use,
        arena_bytes_total=adapters.arena.capacity,
        arena_bytes_used=adapters.arena.used,
        host_bytes_total=adapters.host.capacity,
        host_bytes_used=adapters.host.used,
        merged_bytes_total=adapters.merged.capacity,
        merged_bytes_used=adapters.merged.used,
        pinned_bytes_total=adapters.max_pinned_bytes,
        pinned_bytes_used=adapters.pinned_bytes,
        resident=adapters.arena.resident,
        host=adapters.host.resident,
        pinned=adapters.pinned,
        merged=adapters.merged.resident,
        running_adapters=_adapter_names(running),
        waiting_adapters=_adapter_names(waiting),
    )


def _adapter_names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({s.adapter.name for s in sequences if s.adapter is not None}))

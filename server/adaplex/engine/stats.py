"""The engine's statistics, counted from its parts."""

from __future__ import annotations

from collections.abc import Iterable

from adaplex.engine.block_manager import BlockManager
from adaplex.engine.config import EngineConfig
from adaplex.engine.observer import EngineStats
from adaplex.engine.residency import Residency
from adaplex.engine.scheduler import Scheduler
from adaplex.engine.sequence import Sequence


def count_engine(
    config: EngineConfig, blocks: BlockManager, residency: Residency, scheduler: Scheduler
) -> EngineStats:
    """How full each part is now; on the engine thread."""
    running, waiting = scheduler.running, scheduler.waiting
    unmerged, merged = residency.unmerged, residency.merged.tier
    arena, host = unmerged.arena, unmerged.host
    return EngineStats(
        running=len(running),
        waiting=len(waiting),
        kv_blocks_total=config.usable_blocks,
        kv_blocks_used=blocks.held,
        arena_bytes_total=arena.space.capacity,
        arena_bytes_used=arena.space.used,
        host_bytes_total=host.space.capacity,
        host_bytes_used=host.space.used,
        merged_bytes_total=merged.space.capacity,
        merged_bytes_used=merged.space.used,
        pinned_bytes_total=unmerged.max_pinned_bytes,
        pinned_bytes_used=unmerged.pinned_bytes,
        resident=arena.resident,
        host=host.resident,
        pinned=unmerged.pinned,
        merged=merged.resident,
        running_adapters=_adapter_names(running),
        waiting_adapters=_adapter_names(waiting),
    )


def _adapter_names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({s.adapter.name for s in sequences if s.adapter is not None}))

"""EngineConfig: the limits that policy works under."""

from __future__ import annotations

from dataclasses import dataclass

from adaplex.engine.errors import RequestInvalid


@dataclass(frozen=True)
class EngineConfig:
    """Frozen limits. Derived values are properties."""

    num_blocks: int
    """KV blocks in all; block 0 is scratch space for padding rows and never allocated."""
    arena_bytes: int
    """Bytes of the arena, the memory of the adapters that steps use unmerged."""
    host_bytes: int = 0
    """Bytes of packed adapters in host memory, one copy away from the arena."""
    max_pinned_share: float = 0.5
    """Largest fraction of the arena that pins may take, 0 to 1."""
    prefetch_ahead: int = 64
    """Waiting requests whose adapters are fetched into the host, behind those whose adapters may be
    loaded into the arena now."""
    merged_bytes: int = 0
    """Bytes of merged weights; 0 refuses merged mode."""
    max_bypass: int = 32
    """Later requests that may lease resident adapters past one that waits for room for its own."""
    block_tokens: int = 16
    max_model_len: int = 2048
    max_running: int = 64
    """Most sequences in one step."""
    max_waiting: int = 1024
    max_step_tokens: int = 512
    """Most rows of one step: one per decoding sequence, the rest for prompt chunks."""
    max_chunk_tokens: int = 512
    """Most prompt tokens of one sequence in one step."""
    max_stretch: float = 2.0
    """Factor, above 1, by which prompt chunks may lengthen a step in which other sequences decode,
    roughly; infinity lets them fill every step.
    """
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        """Raises RequestInvalid for limits that could not serve a single request."""
        if self.usable_blocks * self.block_tokens < self.max_model_len:
            raise RequestInvalid(
                "kv_cache_bytes",
                f"{self.usable_blocks} blocks of {self.block_tokens} tokens cannot hold one "
                f"sequence of max_model_len={self.max_model_len}",
            )
        if self.max_step_tokens < self.max_running:
            raise RequestInvalid(
                "max_step_tokens", f"must be at least max_running={self.max_running}"
            )
        if not 1 <= self.max_chunk_tokens <= self.max_step_tokens:
            raise RequestInvalid("max_chunk_tokens", f"must be 1 to {self.max_step_tokens}")
        for name in ("block_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise RequestInvalid(name, "must be at least 1")
        for name in ("host_bytes", "prefetch_ahead"):
            if getattr(self, name) < 0:
                raise RequestInvalid(name, "must not be negative")
        if not self.max_stretch > 1.0:
            raise RequestInvalid("max_stretch", "must be above 1")
        if not 0.0 <= self.max_pinned_share <= 1.0:
            raise RequestInvalid("max_pinned_share", "must be 0 to 1")

    @property
    def usable_blocks(self) -> int:
        """Number of blocks that sequences may use."""
        return self.num_blocks - 1

"""AdapterLimits: size limits that are checked before memory is allocated."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Self

MIB = 1024**2
ALIGNMENT = 64
"""Bytes. Packed adapters, and the tensors in them, start at multiples of this."""


@dataclass(frozen=True)
class AdapterLimits:
    """Byte, rank and count limits of one adapter and of the store."""

    max_adapter_bytes: int = 512 * MIB
    """Bytes of all files of one adapter."""
    max_rank: int = 256
    max_virtual_tokens: int = 2048
    """Positions that an adapter may add before the prompt."""
    max_config_bytes: int = MIB
    """Bytes of adapter_config.json."""
    max_header_bytes: int = 8 * MIB
    """Bytes of the header of a safetensors or GGUF file."""
    max_tensors: int = 100_000
    max_adapters: int = 10_000
    """Names in the catalog."""
    max_versions: int = 1000
    """Versions of one name."""
    max_store_bytes: int = 1024 * 1024 * MIB
    """Bytes of all stored files."""

    def for_stored(self) -> Self:
        """Returns the limits for stored content: without those of size and rank, because lowering
        the limits of uploads must not make stored adapters unreadable.
        """
        return replace(
            self,
            max_adapter_bytes=sys.maxsize,
            max_rank=sys.maxsize,
            max_virtual_tokens=sys.maxsize,
        )

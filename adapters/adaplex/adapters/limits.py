"""AdapterLimits: what an adapter may take, checked before memory is."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Self

MIB = 1024**2
ALIGNMENT = 64
"""Bytes: adapters, and the tensors in a packed one, start at multiples of it."""


@dataclass(frozen=True)
class AdapterLimits:
    """Byte, count and rank limits of one adapter and of the store."""

    max_adapter_bytes: int = 512 * MIB
    """Of all files of one adapter."""
    max_rank: int = 256
    max_virtual_tokens: int = 2048
    """Positions that an adapter puts before the prompt."""
    max_config_bytes: int = MIB
    max_header_bytes: int = 8 * MIB
    max_tensors: int = 100_000
    max_adapters: int = 10_000
    """Names in the catalog."""
    max_versions: int = 1000
    """Under one name."""
    max_store_bytes: int = 1024 * 1024 * MIB
    """Of all stored files."""

    def for_stored(self) -> Self:
        """The limits that hold for stored content: those of an upload may have been lowered since,
        and must not make it unreadable.
        """
        return replace(
            self,
            max_adapter_bytes=sys.maxsize,
            max_rank=sys.maxsize,
            max_virtual_tokens=sys.maxsize,
        )

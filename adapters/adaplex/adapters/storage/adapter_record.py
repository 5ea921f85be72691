"""AdapterRecord: the version of a name that a request is bound to."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from adaplex.adapters.program.traits import AdapterTraits


@dataclass(frozen=True)
class AdapterRecord:
    """One version of one name, or a mix of several as version 0. Never changes."""

    name: str
    version: int
    digest: str
    family: str
    traits: AdapterTraits
    stored_bytes: int
    packed_bytes: int
    """Bytes in the arena, in the compute dtype of this server."""
    created: datetime
    actor: str = ""
    source: str = ""
    base: str = ""
    """Fingerprint of the base that the version was checked against."""
    signer: str = ""
    warnings: tuple[str, ...] = ()
    """Doubts about the adapter, found when it was stored."""
    alias: str = field(default="", compare=False)
    """Alias that led to this version; empty if none did."""

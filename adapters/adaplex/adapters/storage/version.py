"""Version: one content under a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.storage.adapter_record import AdapterRecord


@dataclass(frozen=True)
class Version:
    """One content under a name. Never changes."""

    number: int
    digest: str
    family: str
    traits: AdapterTraits
    stored_bytes: int
    packed_bytes: Mapping[int, int]
    """Bytes in the arena by bytes per element of the compute dtype, which a restart may change."""
    created: datetime
    actor: str = ""
    source: str = ""
    base: str = ""
    """Fingerprint of the base that the version was checked against."""
    signer: str = ""
    warnings: tuple[str, ...] = ()
    """Doubts about the adapter, found when it was stored."""

    def record(self, name: str, element_bytes: int, alias: str = "") -> AdapterRecord:
        """Returns the record of this version of `name`, for a compute dtype of `element_bytes`."""
        return AdapterRecord(
            name=name,
            version=self.number,
            digest=self.digest,
            family=self.family,
            traits=self.traits,
            stored_bytes=self.stored_bytes,
            packed_bytes=self.packed_bytes[element_bytes],
            created=self.created,
            actor=self.actor,
            source=self.source,
            base=self.base,
            signer=self.signer,
            warnings=self.warnings,
            alias=alias,
        )

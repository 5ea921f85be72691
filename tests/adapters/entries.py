"""Catalog entries and versions for tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.storage.event import Origin
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.version import Version

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def digest(seed: int) -> str:
    return f"sha256:{seed:064x}"


def origin(minute: int = 0, actor: str = "ada") -> Origin:
    return Origin(EPOCH + timedelta(minutes=minute), actor=actor)


def version(seed: int = 0, **fields: Any) -> Version:
    known: dict[str, Any] = {
        "number": 0,
        "digest": digest(seed),
        "family": "lora",
        "traits": AdapterTraits(modules=4, max_rank=8),
        "stored_bytes": 1000,
        "packed_bytes": {2: 640, 4: 1280},
        "created": EPOCH + timedelta(minutes=seed),
        "actor": "ada",
        "source": "upload",
    }
    return Version(**known | fields)


def entry(name: str = "a", versions: int = 1, *, first: int = 0) -> NameRecord:
    """Returns an entry whose versions have contents `first`, `first` + 1, ..."""
    made = NameRecord(name)
    for seed in range(first, first + versions):
        made = made.add(version(seed), max_versions=1000)
    return made

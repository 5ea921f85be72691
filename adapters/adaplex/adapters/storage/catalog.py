"""Catalog: the interface of catalogs, which have one entry, a NameRecord, for each name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.version import Version

Order = Literal["name", "create_time", "update_time", "stored_bytes"]
RESTORE = "stop the servers of the store and run adaplex adapters restore"
"""Remedy of a catalog that is damaged, new or older than the contents."""


@dataclass(frozen=True)
class Query:
    """A filter and an order of entries. Entries with equal values are ordered by name."""

    limit: int
    order: Order = "name"
    descending: bool = False
    after: tuple[str | int, str] | None = None
    """Order value and name of the last entry on the previous page."""
    prefix: str = ""
    """Prefix of names."""
    labels: Mapping[str, str] = field(default_factory=dict)
    family: str = ""


@dataclass(frozen=True)
class StoreUsage:
    """Number of names that have a version, and bytes of their content, each content once."""

    names: int
    stored_bytes: int


class Catalog(Protocol):
    """Entries by name. Thread-safe.

    Reads see every change of this process, and those of other processes after a refresh interval
    at most.
    """

    def get(self, name: str) -> NameRecord | None:
        """Returns the entry of a name, which may be a tombstone; None for an unknown name."""
        ...

    def update(self, name: str, change: Callable[[NameRecord | None], NameRecord]) -> NameRecord:
        """Replaces the entry of a name by `change(entry)`, durably and atomically. Returns it.

        `change` is called again if another process changed the entry meanwhile. If it raises, the
        entry stays as it is.
        """
        ...

    def query(self, query: Query) -> list[NameRecord]:
        """Returns the matching entries that have a version."""
        ...

    def order_value(self, entry: NameRecord, order: Order) -> str | int:
        """Returns the value that `query` orders an entry by, for Query.after."""
        ...

    def by_digest(self, digest: str) -> tuple[NameRecord, Version] | None:
        """Returns the newest version, of any name, that has the content."""
        ...

    def is_referenced(self, digest: str) -> bool:
        """Returns True if a version has the content."""
        ...

    def is_referenced_locally(self, digest: str) -> bool:
        """Returns what `is_referenced` would, from this machine's copy of the catalog."""
        ...

    def digests(self) -> frozenset[str]:
        """Returns the digests of all versions."""
        ...

    def is_empty(self) -> bool:
        """Returns True if there is no entry, not even a tombstone."""
        ...

    def protects(self, digest: str) -> bool:
        """Returns True if a copy of a name, which the catalog has lost, has the content."""
        ...

    def doubt(self) -> str:
        """Returns why the catalog is taken to be new or older than the contents; empty if not."""
        ...

    def damage(self) -> str:
        """Returns what was found to be damaged or gone; empty if nothing."""
        ...

    def pinned(self) -> list[NameRecord]:
        """Returns the pinned entries that have a version."""
        ...

    def usage(self) -> StoreUsage:
        """Returns the number of names and the stored bytes."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Returns a context in which no process changes an entry of the store."""
        ...

    def check_integrity(self) -> None:
        """Asserts that every entry can be read and the index matches the entries."""
        ...

    def close(self) -> None:
        """Closes files and connections."""
        ...

"""Catalog: names and what each stands for; the interface of what keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.version import Version

Order = Literal["name", "create_time", "update_time", "stored_bytes"]


@dataclass(frozen=True)
class Query:
    """Which entries to list, and in which order. Equal values are ordered by name."""

    limit: int
    order: Order = "name"
    descending: bool = False
    after: tuple[str | int, str] | None = None
    """The value ordered by, and the name, of the last entry of the page before."""
    prefix: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    family: str = ""


@dataclass(frozen=True)
class StoreUsage:
    """What the entries that are alive take up; content that several share counts once."""

    names: int
    stored_bytes: int


class Catalog(Protocol):
    """Thread-safe. Entries that are read are never older than the last change of this process, and
    at most a refresh interval older than that of another one.
    """

    def get(self, name: str) -> NameRecord | None:
        """The entry of a name, a tombstone too; None for a name that never was."""
        ...

    def update(self, name: str, change: Callable[[NameRecord | None], NameRecord]) -> NameRecord:
        """Puts `change(entry)` in the place of the entry, durably, whole or not at all.

        No other change of the name comes between. `change` may be called again when another
        process was faster; what it raises leaves everything as it was.
        """
        ...

    def query(self, query: Query) -> list[NameRecord]:
        """Entries that are alive."""
        ...

    def order_value(self, entry: NameRecord, order: Order) -> str | int:
        """What `query` orders an entry by; for Query.after."""
        ...

    def by_digest(self, digest: str) -> tuple[NameRecord, Version] | None:
        """The newest version of any name that points to the content."""
        ...

    def is_referenced(self, digest: str) -> bool:
        """Whether a version points to the content."""
        ...

    def is_referenced_locally(self, digest: str) -> bool:
        """As `holds`, as far as is known here: asks nobody."""
        ...

    def digests(self) -> frozenset[str]:
        """Every content that a version points to."""
        ...

    def pinned(self) -> list[NameRecord]:
        """Entries that are alive and pinned."""
        ...

    def usage(self) -> StoreUsage:
        """How full the catalog is."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """While it lasts, no process on this store changes an entry."""
        ...

    def check_integrity(self) -> None:
        """Asserts that what is kept is whole."""
        ...

    def close(self) -> None:
        """Gives connections back."""
        ...

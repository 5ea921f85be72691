"""CopiedCatalog: the catalog of a local store, with a copy of every name beside the contents.

A change is copied once it is committed, before it is acknowledged. So a copy never has a change
that the catalog lacks, unless the catalog was lost, damaged or replaced by an older one: then the
content that only copies name is not removed, and their names are not changed, until `restore`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from adaplex.adapters.errors import AdapterError, CatalogCorrupt, CatalogOutdated
from adaplex.adapters.storage.catalog import RESTORE
from adaplex.adapters.storage.name_copies import NameCopies
from adaplex.adapters.storage.name_document import from_json, to_json
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.sqlite_catalog import SqliteCatalog

log = logging.getLogger(__name__)

CATALOG, COPIES = "catalog.sqlite3", "names"


class CopiedCatalog(SqliteCatalog):
    """See Catalog."""

    def __init__(self, root: Path) -> None:
        """Opens or makes the catalog in the folder of a store, and writes copies that are missing
        or older. Raises CatalogCorrupt.
        """
        super().__init__(root / CATALOG)
        self._copies = NameCopies(root / COPIES)
        self._lost = self._compare()
        self._protected = frozenset(v.digest for copy in self._lost.values() for v in copy.versions)
        if self._lost:
            log.warning("%s: %s; %s; nothing is removed meanwhile", root, self.doubt(), RESTORE)

    def update(self, name: str, change: Callable[[NameRecord | None], NameRecord]) -> NameRecord:
        """See Catalog. Raises CatalogOutdated for a name that the copies know better."""
        if name in self._lost:
            raise CatalogOutdated(
                f"{name}: the catalog is new or older than the copy of this name; {RESTORE}",
                field="name",
            )
        self._check_there()
        with self._writing, self._copies.locked():
            after = super().update(name, change)
            try:
                self._copies.write(name, to_json(after))
            except OSError as error:  # the change is durable; the next opener copies it
                log.warning("%s has no copy beside the contents yet: %s", name, error)
        return after

    def protects(self, digest: str) -> bool:
        """See Catalog."""
        return digest in self._protected

    def doubt(self) -> str:
        """See Catalog."""
        if not self._lost:
            return ""
        return (
            f"{self.path.name} is new or older than its copies: {COPIES}/ has changes of "
            f"{len(self._lost)} names that it lacks"
        )

    def restore(self) -> list[str]:
        """Writes the names that the copies know better. Returns them, sorted."""
        restored = sorted(self._lost)
        for name in restored:
            self.put(self._lost[name], tag="")
        self._lost, self._protected = {}, frozenset()
        return restored

    def _compare(self) -> dict[str, NameRecord]:
        """Writes copies that the catalog knows better, and returns those that it does not."""
        with self._writing, self._copies.locked():
            documents = self.documents()
            copies = {name: self._copies.read(name) for name in self._copies.names()}
            lost: dict[str, NameRecord] = {}
            for name, copy in copies.items():
                if copy is None or copy == documents.get(name):
                    continue
                with suppress(AdapterError):  # a copy of a later version of adaplex
                    record = from_json(copy)
                    if record.name == name and _is_ahead(record, documents.get(name)):
                        lost[name] = record
            older = {
                name: document
                for name, document in documents.items()
                if name not in lost and copies.get(name) != document
            }
            with suppress(OSError):  # a full disk; the next opener tries again
                self._copies.write_all(older)
        return lost


@dataclass(frozen=True)
class Restored:
    """Result of `restore`."""

    names: tuple[str, ...]
    """Names that were written from their copies."""
    moved: Path | None
    """Where a damaged catalog was moved to."""


def restore(root: Path) -> Restored:
    """Makes the catalog of a store whole again from the copies of its names. A damaged catalog is
    moved aside. No server may use the store.
    """
    moved = None
    try:
        catalog = CopiedCatalog(root)
    except CatalogCorrupt:
        moved = _move_aside(root / CATALOG)
        catalog = CopiedCatalog(root)
    try:
        return Restored(tuple(catalog.restore()), moved)
    finally:
        catalog.close()


def _is_ahead(copy: NameRecord, document: bytes | None) -> bool:
    """True if the catalog's document lacks the last change of a copy."""
    if document is None:
        return True
    return bool(copy.history) and copy.history[-1] not in from_json(document).history


def _move_aside(catalog: Path) -> Path:
    """Renames a catalog and SQLite's files beside it; returns the new path."""
    target = catalog.with_name(f"{catalog.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            catalog.with_name(catalog.name + suffix).rename(target.with_name(target.name + suffix))
    return catalog.rename(target)

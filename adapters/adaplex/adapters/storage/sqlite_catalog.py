"""SqliteCatalog: a Catalog in one SQLite file, durable at commit, shared by local processes.

The file is in WAL mode, so that readers never wait for a writer.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adaplex.adapters.errors import AdapterError, CatalogCorrupt
from adaplex.adapters.storage import sqlite_index
from adaplex.adapters.storage.catalog import RESTORE, Order, Query, StoreUsage
from adaplex.adapters.storage.name_document import from_json
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.version import Version

BUSY_SECONDS = 30
"""Longest time that a change waits for those of other processes."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""SQLite's errors of a file whose pages are not what was written."""
MAX_PARSED = 4096
"""Parsed entries that are cached."""


class SqliteCatalog:
    """See Catalog. One connection writes, one reads."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises CatalogCorrupt if it is damaged, AdapterError if it has
        another schema.
        """
        self.path = path
        self._damage = ""
        self._writing = threading.RLock()
        self._reading = threading.Lock()
        self._parsed: OrderedDict[str, tuple[int, NameRecord]] = OrderedDict()
        """Revision and entry by name, least recently parsed first."""
        with self._naming_damage():
            self._writer = self._connect()
            _quick_check(self._writer)
        self._status = os.stat(path)
        with self._transaction() as db:
            schema = sqlite_index.create_tables(db)
        if schema != sqlite_index.SCHEMA:
            self._writer.close()
            reason = f"this version of adaplex reads {sqlite_index.SCHEMA}"
            raise AdapterError(f"{path} has schema {schema}, {reason}", field="store_dir")
        self._reader = self._connect()

    def get(self, name: str) -> NameRecord | None:
        """See Catalog."""
        with self._reading, self._naming_damage():
            return self._get(self._reader, name)

    def update(self, name: str, change: Callable[[NameRecord | None], NameRecord]) -> NameRecord:
        """See Catalog. `change` is called once."""
        with self._transaction() as db:
            before = self._get(db, name)
            after = change(before)
            if after != before:
                sqlite_index.write(db, before, after, tag="")
        return after

    def put(self, entry: NameRecord, tag: str) -> None:
        """Writes an entry of another catalog; `tag` identifies its state there."""
        with self._transaction() as db:
            sqlite_index.write(db, self._get(db, entry.name), entry, tag)

    def drop(self, name: str) -> None:
        """Removes an entry, leaving no tombstone."""
        with self._transaction() as db:
            sqlite_index.drop(db, name)

    def tags(self) -> dict[str, str]:
        """Returns the tag of each entry by name."""
        return dict(self._rows("SELECT name, tag FROM entries"))

    def tag(self, name: str) -> str:
        """Returns the tag of an entry, empty for an absent one."""
        rows = self._rows("SELECT tag FROM entries WHERE name = ?", name)
        return str(rows[0][0]) if rows else ""

    def query(self, query: Query) -> list[NameRecord]:
        """See Catalog."""
        statement, values = sqlite_index.select(query)
        return [from_json(document) for (document,) in self._rows(statement, *values)]

    def order_value(self, entry: NameRecord, order: Order) -> str | int:
        """See Catalog."""
        return sqlite_index.columns(entry)[order]

    def by_digest(self, digest: str) -> tuple[NameRecord, Version] | None:
        """See Catalog."""
        rows = self._rows(
            "SELECT name, version FROM versions WHERE digest = ? ORDER BY created DESC LIMIT 1",
            digest,
        )
        for name, number in rows:
            entry = self.get(name)
            for version in entry.versions if entry else ():
                if entry and version.number == number:
                    return entry, version
        return None

    def is_referenced(self, digest: str) -> bool:
        """See Catalog."""
        return bool(self._rows("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", digest))

    def is_referenced_locally(self, digest: str) -> bool:
        """See Catalog."""
        return self.is_referenced(digest)

    def digests(self) -> frozenset[str]:
        """See Catalog."""
        return frozenset(digest for (digest,) in self._rows("SELECT digest FROM versions"))

    def documents(self) -> dict[str, bytes]:
        """Returns the document of each entry by name."""
        return dict(self._rows("SELECT name, document FROM entries"))

    def is_empty(self) -> bool:
        """See Catalog."""
        return not self._rows("SELECT 1 FROM entries LIMIT 1")

    def protects(self, digest: str) -> bool:
        """See Catalog. Without copies of names nothing is protected."""
        return False

    def doubt(self) -> str:
        """See Catalog."""
        return ""

    def damage(self) -> str:
        """See Catalog. Compares the file at the path with the one that was opened."""
        with suppress(AdapterError):
            self._check_there()
        return self._damage

    def pinned(self) -> list[NameRecord]:
        """See Catalog."""
        rows = self._rows("SELECT document FROM entries WHERE alive AND pinned ORDER BY name")
        return [from_json(document) for (document,) in rows]

    def usage(self) -> StoreUsage:
        """See Catalog."""
        ((names,),) = self._rows("SELECT count(*) FROM entries WHERE alive")
        ((stored,),) = self._rows(
            "SELECT sum(b) FROM (SELECT max(stored_bytes) b FROM versions GROUP BY digest)"
        )
        return StoreUsage(names, stored or 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See Catalog."""
        with self._transaction():
            yield

    def check_integrity(self) -> None:
        """Asserts that SQLite finds no fault, and that the index matches the documents."""
        with self._reading, self._naming_damage():
            self._reader.execute("BEGIN")  # one state of all tables, even if others write
            try:
                rows = self._reader.execute("PRAGMA integrity_check").fetchall()
                documents = self._reader.execute("SELECT document FROM entries").fetchall()
                versions, labels = sqlite_index.indexed(self._reader)
            finally:
                self._reader.execute("COMMIT")
        assert rows == [("ok",)], rows
        found = [from_json(document) for (document,) in documents]
        for entry in found:
            entry.check_integrity()
        assert versions == {(e.name, v.number, v.digest) for e in found for v in e.versions}
        assert labels == {(e.name, *pair) for e in found for pair in e.labels.items()}

    def close(self) -> None:
        """See Catalog."""
        self._reader.close()
        self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, check_same_thread=False, isolation_level=None, timeout=BUSY_SECONDS
        )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yields the writing connection in a transaction that excludes those of all processes.

        A transaction inside another one is part of it.
        """
        with self._writing:
            if self._writer.in_transaction:
                yield self._writer
                return
            self._check_there()
            with self._naming_damage():
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                    raise

    def _check_there(self) -> None:
        """Raises CatalogCorrupt if the path has not the file that was opened: changes would be
        acknowledged and lost.
        """
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), self._status):
                return
        self._damage = f"{self.path.name} was removed or replaced while it was open"
        raise CatalogCorrupt(f"{self._damage}; start the server again")

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        """Raises CatalogCorrupt for what SQLite finds damaged."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in DAMAGED:
                raise
            self._damage = f"{self.path.name} is damaged: {error}"
            raise CatalogCorrupt(f"{self._damage}; {RESTORE}") from error

    def _rows(self, query: str, *values: str | int) -> list[tuple[Any, ...]]:
        with self._reading, self._naming_damage():
            return self._reader.execute(query, values).fetchall()

    def _get(self, db: sqlite3.Connection, name: str) -> NameRecord | None:
        """Returns the entry of a name. Parses its document only if its revision has changed."""
        cached = self._parsed.get(name)
        row = db.execute(
            "SELECT revision, iif(revision = ?, NULL, document) FROM entries WHERE name = ?",
            (cached[0] if cached else None, name),
        ).fetchone()
        if row is None:
            return None
        revision, document = row
        if cached is not None and document is None:
            return cached[1]
        entry = from_json(document)
        self._parsed[name] = revision, entry
        while len(self._parsed) > MAX_PARSED:
            self._parsed.popitem(last=False)
        return entry


def _quick_check(db: sqlite3.Connection) -> None:
    """Reads every page. Raises sqlite3.DatabaseError if one is damaged."""
    rows = db.execute("PRAGMA quick_check(1)").fetchall()
    if rows != [("ok",)]:
        error = sqlite3.DatabaseError(" ".join(str(rows[0][0]).split()))
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

"""SqliteCatalog: entries in one SQLite file, durable at commit, shared by processes on a machine.

An entry is one JSON document; the columns and tables beside it are its index, written in the same
transaction. The file is in WAL mode, so that readers never wait for a writer.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaplex.adapters.errors import AdapterError
from adaplex.adapters.storage.catalog import Order, Query, StoreUsage
from adaplex.adapters.storage.name_document import from_json, to_json
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.version import Version

SCHEMA = 2
BUSY_SECONDS = 30
"""How long a change waits for those of other processes."""
MAX_PARSED = 4096
"""Entries kept parsed."""
TABLES = """
CREATE TABLE entries (
    name TEXT PRIMARY KEY,
    revision INTEGER NOT NULL, -- drawn anew at each change
    document BLOB NOT NULL,
    tag TEXT NOT NULL,
    alive INTEGER NOT NULL,
    pinned INTEGER NOT NULL,
    family TEXT NOT NULL,
    stored_bytes INTEGER NOT NULL,
    create_time TEXT NOT NULL,
    update_time TEXT NOT NULL
) STRICT;
CREATE TABLE versions (
    name TEXT NOT NULL REFERENCES entries(name),
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    stored_bytes INTEGER NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (name, version)
) STRICT;
CREATE INDEX versions_by_digest ON versions(digest);
CREATE TABLE labels (
    name TEXT NOT NULL REFERENCES entries(name),
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (name, key)
) STRICT;
CREATE INDEX names_by_label ON labels(key, value);
"""


class SqliteCatalog:
    """See Catalog. One connection writes, one reads."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises AdapterError when its schema is another."""
        self._path = path
        self._writing = threading.RLock()
        self._reading = threading.Lock()
        self._parsed: OrderedDict[str, tuple[int, NameRecord]] = OrderedDict()
        self._writer = self._connect()
        with self._transaction() as db:
            (schema,) = db.execute("PRAGMA user_version").fetchone()
            if schema == 0:
                for statement in TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA}")
        if schema not in (0, SCHEMA):
            self._writer.close()
            raise AdapterError(
                f"{path} has schema {schema}, this version knows {SCHEMA}", field="store_dir"
            )
        self._reader = self._connect()

    def get(self, name: str) -> NameRecord | None:
        """See Catalog."""
        with self._reading:
            return self._get(self._reader, name)

    def update(self, name: str, change: Callable[[NameRecord | None], NameRecord]) -> NameRecord:
        """See Catalog. `change` is called once."""
        with self._transaction() as db:
            before = self._get(db, name)
            after = change(before)
            if after != before:
                self._write(db, before, after, tag="")
        return after

    def put(self, entry: NameRecord, tag: str) -> None:
        """Takes an entry over as another catalog has it; `tag` is that one's mark of its state."""
        with self._transaction() as db:
            self._write(db, self._get(db, entry.name), entry, tag)

    def drop(self, name: str) -> None:
        """Drops an entry and its tombstone."""
        with self._transaction() as db:
            for table in ("versions", "labels", "entries"):
                db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))

    def tags(self) -> dict[str, str]:
        """The tag of each entry, by name."""
        return dict(self._rows("SELECT name, tag FROM entries"))

    def tag(self, name: str) -> str:
        """The tag of an entry, empty for one that is not here."""
        rows = self._rows("SELECT tag FROM entries WHERE name = ?", name)
        return str(rows[0][0]) if rows else ""

    def query(self, query: Query) -> list[NameRecord]:
        """See Catalog."""
        where = ["alive", "substr(name, 1, ?) = ?"]
        values: list[str | int] = [len(query.prefix), query.prefix]
        if query.family:
            where.append("family = ?")
            values.append(query.family)
        for key, value in query.labels.items():
            where.append("name IN (SELECT name FROM labels WHERE key = ? AND value = ?)")
            values += [key, value]
        way, beyond = ("DESC", "<") if query.descending else ("ASC", ">")
        if query.after is not None:
            last, name = query.after
            where.append(f"({query.order} {beyond} ? OR ({query.order} = ? AND name > ?))")
            values += [last, last, name]
        order = f"{query.order} {way}" + ("" if query.order == "name" else ", name")
        rows = self._rows(
            f"SELECT document FROM entries WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?",
            *values,
            query.limit,
        )
        return [from_json(document) for (document,) in rows]

    def order_value(self, entry: NameRecord, order: Order) -> str | int:
        """See Catalog."""
        return _columns(entry)[order]

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
        """Asserts what SQLite promises, and that the index says what the documents say."""
        with self._reading:
            self._reader.execute("BEGIN")  # one state of all tables, whoever writes
            try:
                rows = self._reader.execute("PRAGMA integrity_check").fetchall()
                documents = self._reader.execute("SELECT document FROM entries").fetchall()
                versions = self._reader.execute("SELECT name, version, digest FROM versions")
                indexed = set(versions.fetchall())
                labels = set(self._reader.execute("SELECT name, key, value FROM labels").fetchall())
            finally:
                self._reader.execute("COMMIT")
        assert rows == [("ok",)], rows
        found = [from_json(document) for (document,) in documents]
        for entry in found:
            entry.check_integrity()
        assert indexed == {(e.name, v.number, v.digest) for e in found for v in e.versions}
        assert labels == {(e.name, *pair) for e in found for pair in e.labels.items()}

    def close(self) -> None:
        """See Catalog."""
        self._reader.close()
        self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self._path, check_same_thread=False, isolation_level=None, timeout=BUSY_SECONDS
        )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The writing connection, alone among all processes; nested ones are one."""
        with self._writing:
            if self._writer.in_transaction:
                yield self._writer
                return
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: str | int) -> list[tuple[Any, ...]]:
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    def _get(self, db: sqlite3.Connection, name: str) -> NameRecord | None:
        """Parsed again only when its revision is another."""
        kept = self._parsed.get(name)
        row = db.execute(
            "SELECT revision, iif(revision = ?, NULL, document) FROM entries WHERE name = ?",
            (kept[0] if kept else None, name),
        ).fetchone()
        if row is None:
            return None
        revision, document = row
        if kept is not None and document is None:
            return kept[1]
        entry = from_json(document)
        self._parsed[name] = revision, entry
        while len(self._parsed) > MAX_PARSED:
            self._parsed.popitem(last=False)
        return entry

    def _write(
        self, db: sqlite3.Connection, before: NameRecord | None, after: NameRecord, tag: str
    ) -> None:
        """The document and its index."""
        columns = {
            "revision": secrets.randbits(62),
            "document": to_json(after),
            "tag": tag,
            **_columns(after),
        }
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        db.execute(
            f"INSERT INTO entries ({names}) VALUES ({marks}) ON CONFLICT (name) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in columns),
            tuple(columns.values()),
        )
        old = {v.number: v for v in before.versions} if before else {}
        new = {v.number: v for v in after.versions}
        db.executemany(
            "DELETE FROM versions WHERE name = ? AND version = ?",
            [(after.name, number) for number in old.keys() - new.keys()],
        )
        db.executemany(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?)",
            [
                (after.name, n, v.digest, v.stored_bytes, v.created.isoformat())
                for n, v in new.items()
                if n not in old
            ],
        )
        if before is None or before.labels != after.labels:
            db.execute("DELETE FROM labels WHERE name = ?", (after.name,))
            db.executemany(
                "INSERT INTO labels VALUES (?, ?, ?)",
                [(after.name, *pair) for pair in after.labels.items()],
            )


def _columns(entry: NameRecord) -> dict[str, str | int]:
    """What entries are found and ordered by; of a tombstone, nothing."""
    latest = entry.latest if entry.alive else None
    return {
        "name": entry.name,
        "alive": int(entry.alive),
        "pinned": int(entry.pinned),
        "family": latest.family if latest else "",
        "stored_bytes": latest.stored_bytes if latest else 0,
        "create_time": latest.created.isoformat() if latest else "",
        "update_time": entry.updated.isoformat(),
    }

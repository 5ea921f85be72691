"""Catalog: names, their versions, and the content each points to. SQLite, durable at commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaplex.adapters.errors import AdapterError

SCHEMA = 1
ELEMENT_BYTES = (2, 4)
"""Of the compute dtypes; an adapter's packed size is kept for each, as a restart may change it."""
TABLES = """
CREATE TABLE names (
    name TEXT PRIMARY KEY,
    last_version INTEGER NOT NULL
) STRICT;
CREATE TABLE versions (
    name TEXT NOT NULL REFERENCES names(name),
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    family TEXT NOT NULL,
    modules INTEGER NOT NULL,
    max_rank INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    packed_bytes_2 INTEGER NOT NULL,
    packed_bytes_4 INTEGER NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (name, version)
) STRICT;
CREATE INDEX versions_by_digest ON versions(digest);
"""
LATEST = "version = (SELECT max(version) FROM versions WHERE name = v.name)"


@dataclass(frozen=True)
class AdapterRecord:
    """One version of one name. Never changes."""

    name: str
    version: int
    digest: str
    family: str
    modules: int
    max_rank: int
    stored_bytes: int
    packed_bytes: int
    """In the compute dtype of now."""
    created: datetime


class Catalog:
    """The tables. Callers hold a lock: one connection serves all threads."""

    def __init__(self, path: Path, *, element_bytes: int) -> None:
        """`element_bytes` is that of the compute dtype, one of ELEMENT_BYTES."""
        assert element_bytes in ELEMENT_BYTES
        self._select = (
            "SELECT name, version, digest, family, modules, max_rank, stored_bytes, "
            f"packed_bytes_{element_bytes}, created FROM versions v WHERE"
        )
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        (schema,) = self._db.execute("PRAGMA user_version").fetchone()
        if schema == 0:
            self._db.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
        elif schema != SCHEMA:
            self._db.close()
            raise AdapterError(
                f"{path} has schema {schema}, this version knows {SCHEMA}", field="store_dir"
            )

    def add(self, record: AdapterRecord, packed: Mapping[int, int]) -> AdapterRecord:
        """Adds the next version of a name; `record.version` is ignored. Numbers never come back,
        not even after the name was deleted. `packed` is the packed size by ELEMENT_BYTES.
        """
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            (version,) = self._db.execute(
                "INSERT INTO names (name, last_version) VALUES (?, 1) ON CONFLICT (name) DO "
                "UPDATE SET last_version = last_version + 1 RETURNING last_version",
                (record.name,),
            ).fetchone()
            values = (
                *(record.name, version, record.digest, record.family, record.modules),
                *(record.max_rank, record.stored_bytes, *(packed[n] for n in ELEMENT_BYTES)),
                record.created.isoformat(),
            )
            self._db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            self._db.execute("COMMIT")
        return replace(record, version=version)

    def latest(self, name: str) -> AdapterRecord | None:
        """The newest version of a name."""
        return self._one(f"{LATEST} AND name = ?", name)

    def version(self, name: str, version: int) -> AdapterRecord | None:
        """One version of a name."""
        return self._one("name = ? AND version = ?", name, version)

    def by_digest(self, digest: str) -> AdapterRecord | None:
        """The newest record of any name that points to the content."""
        return self._one("digest = ? ORDER BY created DESC LIMIT 1", digest)

    def page(self, limit: int, after: str) -> list[AdapterRecord]:
        """The newest version of each name beyond `after`, by name."""
        query = f"{self._select} {LATEST} AND name > ? ORDER BY name LIMIT ?"
        return [_record(row) for row in self._db.execute(query, (after, limit))]

    def count(self) -> int:
        """Names with a version."""
        return int(self._db.execute("SELECT count(DISTINCT name) FROM versions").fetchone()[0])

    def stored_bytes(self) -> int:
        """Bytes of all contents that a version points to; shared content counts once."""
        query = "SELECT sum(b) FROM (SELECT max(stored_bytes) b FROM versions GROUP BY digest)"
        return int(self._db.execute(query).fetchone()[0] or 0)

    def delete(self, name: str) -> list[str]:
        """Forgets a name; the digest of every version it had."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            rows = self._db.execute("SELECT digest FROM versions WHERE name = ?", (name,))
            digests = [digest for (digest,) in rows]
            self._db.execute("DELETE FROM versions WHERE name = ?", (name,))
            self._db.execute("COMMIT")
        return digests

    def digests(self) -> frozenset[str]:
        """Every content that a version points to."""
        return frozenset(row[0] for row in self._db.execute("SELECT digest FROM versions"))

    def holds(self, digest: str) -> bool:
        """Whether a version points to the content."""
        query = "SELECT 1 FROM versions WHERE digest = ? LIMIT 1"
        return self._db.execute(query, (digest,)).fetchone() is not None

    def check_integrity(self) -> None:
        """Asserts what SQLite and the schema promise."""
        assert self._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        query = "SELECT 1 FROM versions JOIN names USING (name) WHERE version > last_version"
        assert self._db.execute(query).fetchone() is None

    def close(self) -> None:
        """Closes the connection."""
        self._db.close()

    def _one(self, where: str, *values: str | int) -> AdapterRecord | None:
        row = self._db.execute(f"{self._select} {where}", values).fetchone()
        return None if row is None else _record(row)


def _record(row: tuple[Any, ...]) -> AdapterRecord:
    """A selected row, its columns in the order of AdapterRecord."""
    values = (*row[:-1], datetime.fromisoformat(row[-1]).astimezone(UTC))
    return AdapterRecord(*values)

"""The tables of SqliteCatalog: each entry's document, and the index derived from it."""

from __future__ import annotations

import secrets
import sqlite3

from adaplex.adapters.storage.catalog import Query
from adaplex.adapters.storage.name_document import to_json
from adaplex.adapters.storage.name_record import NameRecord

SCHEMA = 2
"""Version of the tables, in the file's `user_version`."""
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


def create_tables(db: sqlite3.Connection) -> int:
    """Creates the tables in an empty file. Returns the schema that the file has then."""
    (schema,) = db.execute("PRAGMA user_version").fetchone()
    if schema == 0:
        for statement in TABLES.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {SCHEMA}")
    return int(schema) or SCHEMA


def columns(entry: NameRecord) -> dict[str, str | int]:
    """Returns the indexed columns of an entry; those of versions are empty for a tombstone."""
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


def select(query: Query) -> tuple[str, list[str | int]]:
    """Returns the statement that yields the documents of a query, and its values."""
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
    statement = f"SELECT document FROM entries WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?"
    return statement, [*values, query.limit]


def write(db: sqlite3.Connection, before: NameRecord | None, after: NameRecord, tag: str) -> None:
    """Writes an entry's document and index, given the entry that the tables have now."""
    row = {
        "revision": secrets.randbits(62),
        "document": to_json(after),
        "tag": tag,
        **columns(after),
    }
    names, marks = ", ".join(row), ", ".join("?" * len(row))
    db.execute(
        f"INSERT INTO entries ({names}) VALUES ({marks}) ON CONFLICT (name) DO UPDATE SET "
        + ", ".join(f"{name} = excluded.{name}" for name in row),
        tuple(row.values()),
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


def drop(db: sqlite3.Connection, name: str) -> None:
    """Deletes an entry and its index."""
    for table in ("versions", "labels", "entries"):
        db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))


def indexed(db: sqlite3.Connection) -> tuple[set[tuple[str, int, str]], set[tuple[str, str, str]]]:
    """Returns the index: (name, version, digest) of versions, (name, key, value) of labels."""
    versions = set(db.execute("SELECT name, version, digest FROM versions").fetchall())
    return versions, set(db.execute("SELECT name, key, value FROM labels").fetchall())

"""Files: their hash, writes that survive a power cut, and disks that are full."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaplex.adapters.errors import StoreFull

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_is_store_full() -> Iterator[None]:
    """Raises StoreFull when the disk, or the quota of our user on it, has no room left."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _no_room(os.strerror(error.errno)) from error
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise _no_room(str(error)) from error


def _no_room(reason: str) -> StoreFull:
    return StoreFull(f"the disk of the store has no room left: {reason}", field="store_dir")


def sha256_of(path: Path) -> hashlib._Hash:
    """SHA-256 over a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    return sha256_of(path).hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(source: Path, target: Path) -> None:
    """Renames a folder whose files are synced, so that it is there whole or not at all."""
    sync(source)
    source.rename(target)
    sync(target.parent)

"""Durable files: hashes, writes that survive a power cut, and errors of full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaplex.adapters.errors import StoreFull

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk, or of an exhausted quota of this user on it."""


@contextmanager
def full_disk_is_store_full() -> Iterator[None]:
    """Raises StoreFull if the block fails because the disk or this user's quota is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise _store_full(os.strerror(error.errno)) from error
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise _store_full(str(error)) from error


def _store_full(reason: str) -> StoreFull:
    return StoreFull(
        f"the disk of the store is full: {reason}; delete adapters or free space", field="store_dir"
    )


def sha256_of(path: Path) -> hashlib._Hash:
    """Returns the SHA-256 hash object of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def file_sha256(path: Path) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    return sha256_of(path).hexdigest()


def sync(path: Path) -> None:
    """Flushes a file's data, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(source: Path, target: Path) -> None:
    """Renames a folder of synced files durably and atomically."""
    sync(source)
    source.rename(target)
    sync(target.parent)

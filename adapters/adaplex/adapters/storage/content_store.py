"""ContentStore: the interface of stores that have the files of adapters by digest."""

from __future__ import annotations

from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Protocol

from adaplex.adapters.errors import AdapterNotFound, StoreCorrupt
from adaplex.adapters.storage.staging import FileSpec, Staging


class ContentLock:
    """A shared lock on an object: no process removes the object before the lock is released."""

    def __init__(self, manifest: TextIOWrapper) -> None:
        """`manifest` is the object's open manifest, with a shared `flock` on it."""
        self._manifest = manifest

    def release(self) -> None:
        """Releases the lock."""
        self._manifest.close()


class ContentStore(Protocol):
    """Objects: the files of one adapter each, by digest. Thread-safe; calls block."""

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """Returns an empty staging folder for announced and checked files."""
        ...

    def scratch_folder(self) -> Path:
        """Makes a folder for `Staging.adopt`. The caller removes it."""
        ...

    def add(self, staging: Staging, digest: str) -> bool:
        """Stores verified files durably under their digest, unless the object exists already.

        Returns True if these files were stored.
        """
        ...

    def open(self, digest: str) -> Path:
        """Returns a local folder with an object's files, after comparing their hashes.

        Raises StoreCorrupt or AdapterNotFound.
        """
        ...

    def lock(self, digest: str) -> ContentLock | None:
        """Locks an object against removal. Returns None if it is absent or being removed."""
        ...

    def remove(self, digest: str, *, damaged: bool = False) -> bool:
        """Removes an object that nobody has locked; one that is `damaged` in any case.

        Returns True if the object was removed.
        """
        ...

    def has(self, digest: str) -> bool:
        """Returns True if an object exists, damaged or not."""
        ...

    def digests(self) -> frozenset[str]:
        """Returns the digests of all objects."""
        ...

    def cached_bytes(self) -> int | None:
        """Returns the bytes that this machine caches of a remote store; None for a local store."""
        ...

    def close(self) -> None:
        """Removes the staging folders of this process."""
        ...


def is_damaged(contents: ContentStore, digest: str) -> bool:
    """Returns True if an object exists, but not as it was stored. Reads all of its files."""
    try:
        contents.open(digest)
    except StoreCorrupt:
        return True
    except AdapterNotFound:
        return False
    return False

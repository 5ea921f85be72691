"""ContentStore: where the files of adapters are, by content, whatever keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Protocol

from adaplex.adapters.errors import AdapterNotFound, StoreCorrupt
from adaplex.adapters.storage.staging import FileSpec, Staging


class ContentLock:
    """Keeps an object from removal, by any process, until it is released."""

    def __init__(self, manifest: TextIOWrapper) -> None:
        self._manifest = manifest

    def release(self) -> None:
        """Lets the object go."""
        self._manifest.close()


class ContentStore(Protocol):
    """Where the files of adapters are, by content. Thread-safe; calls block."""

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """An empty staging folder for files that were checked."""
        ...

    def scratch_folder(self) -> Path:
        """A new folder that `Staging.adopt` can take over; the caller's to remove."""
        ...

    def add(self, staging: Staging, digest: str) -> bool:
        """Keeps verified files under their digest, durably; an object that is there already stays.
        Whether they were kept.
        """
        ...

    def open(self, digest: str) -> Path:
        """A local folder of an object whose files are what they were. Raises StoreCorrupt or
        AdapterNotFound.
        """
        ...

    def lock(self, digest: str) -> ContentLock | None:
        """Keeps an object from removal; None when it is not there, or about to go."""
        ...

    def remove(self, digest: str, *, damaged: bool = False) -> bool:
        """Removes an object that nobody holds, or one that is `damaged`. Whether it did."""
        ...

    def has(self, digest: str) -> bool:
        """Whether an object is there, in whatever state."""
        ...

    def digests(self) -> frozenset[str]:
        """Every object that is there."""
        ...

    def cached_bytes(self) -> int | None:
        """Bytes that this machine keeps of a store elsewhere; None when the store is here."""
        ...

    def close(self) -> None:
        """Ends this process's part in the store."""
        ...


def is_damaged(contents: ContentStore, digest: str) -> bool:
    """Whether an object is there, but not as it was stored. Reads it whole."""
    try:
        contents.open(digest)
    except StoreCorrupt:
        return True
    except AdapterNotFound:
        return False
    return False

"""NameCopies: a copy of every name's document in a folder beside the contents, apart from the
catalog, so that a catalog that is lost, damaged or older can be restored.

names/<name>.json   the SHA-256 of the document, a line end, the document
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaplex.adapters.durable_files import sync
from adaplex.adapters.storage.selector import NAME

SUFFIX = ".json"


class NameCopies:
    """Documents by name. Each is written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder unless it exists."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Excludes other processes from a change of a name and its copy. Not for two threads of
        one process.
        """
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def write(self, name: str, document: bytes) -> None:
        """Replaces a copy, durably and atomically. Raises OSError."""
        self._write(name, document, durable=True)
        sync(self.folder)

    def write_all(self, documents: dict[str, bytes]) -> None:
        """Writes many copies. A power cut may lose some: the next opener writes them again."""
        for name, document in documents.items():
            self._write(name, document, durable=False)

    def read(self, name: str) -> bytes | None:
        """Returns a copy; None if there is none, or if it is damaged."""
        try:
            digest, _, document = self._path(name).read_bytes().partition(b"\n")
        except OSError:
            return None
        return document if hashlib.sha256(document).hexdigest().encode() == digest else None

    def names(self) -> Iterator[str]:
        """Yields the names that have a copy, damaged or not, unsorted."""
        for path in self.folder.iterdir():
            name = path.name.removesuffix(SUFFIX)
            if name != path.name and NAME.fullmatch(name):
                yield name

    def _write(self, name: str, document: bytes, *, durable: bool) -> None:
        partial = self.folder / f".{name}.partial"
        with partial.open("wb") as file:
            file.write(hashlib.sha256(document).hexdigest().encode() + b"\n" + document)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(self._path(name))

    def _path(self, name: str) -> Path:
        assert NAME.fullmatch(name)
        return self.folder / f"{name}{SUFFIX}"

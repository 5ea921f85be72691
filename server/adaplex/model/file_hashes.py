"""FileHashes: SHA-256 of large files, cached for as long as the files do not change."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from adaplex.adapters.durable_files import file_sha256

HASHES = "hashes.json"
"""Name of the file of hashes in the cache folder."""
CACHED_BYTES = 16 << 20
"""Least size of a file whose hash is cached: hashing less takes milliseconds."""
RACY_NS = 2_000_000_000
"""Nanoseconds within which a file may be written again and keep its time stamp: file systems have
coarse clocks."""


class FileHashes:
    """Hashes by file, in one file that processes share. Losing it costs time only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def sha256(self, file: Path) -> str:
        """Returns the hex SHA-256 of the file's bytes. Raises OSError."""
        begun, stamp = time.time_ns(), _stamp(file)
        if stamp["size"] < CACHED_BYTES:
            return file_sha256(file)
        name = str(file.resolve())
        known = self._read().get(name, {})
        if known.get("stamp") == stamp:
            return str(known["sha256"])
        digest = file_sha256(file)
        settled = begun - max(stamp["mtime_ns"], stamp["ctime_ns"]) > RACY_NS
        if settled and _stamp(file) == stamp:
            with suppress(OSError):  # without a writable cache the file is hashed again next time
                self._store(name, {"stamp": stamp, "sha256": digest})
        return digest

    def _read(self) -> dict[str, Any]:
        """Returns stamp and hash by file; empty if the file of hashes is missing or damaged."""
        try:
            stored = json.loads(self._path.read_text())
            files: dict[str, Any] = stored["files"]
            return files if stored["check"] == _check(files) else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _store(self, name: str, entry: dict[str, Any]) -> None:
        """Adds a file, and drops files that no longer exist."""
        files = {each: known for each, known in self._read().items() if Path(each).exists()}
        files[name] = entry
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=self._path.parent, prefix=".hashes-", delete=False) as new:
            try:
                json.dump({"check": _check(files), "files": files}, new, indent=1)
                new.flush()
                os.fchmod(new.fileno(), 0o644)
                os.fsync(new.fileno())
                os.replace(new.name, self._path)
            except BaseException:
                os.unlink(new.name)
                raise


def _stamp(file: Path) -> dict[str, int]:
    """Returns what changes when a file changes; ctime changes even if its mtime is set back."""
    at = file.stat()
    return {
        "size": at.st_size,
        "mtime_ns": at.st_mtime_ns,
        "ctime_ns": at.st_ctime_ns,
        "inode": at.st_ino,
        "device": at.st_dev,
    }


def _check(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

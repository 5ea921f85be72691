"""FileHashes: SHA-256 of large files, remembered for as long as they are the same files."""

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
"""Its name in the cache folder."""
WORTH_BYTES = 16 << 20
"""Hashing less takes no time that anybody notices."""
RACY_NS = 2_000_000_000
"""A file that is written again so soon may keep its time stamp: file systems have coarse clocks."""


class FileHashes:
    """What is remembered lies in one file, which processes share. Losing it costs time only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def sha256(self, file: Path) -> str:
        """Hex SHA-256 of the file's bytes. Raises OSError."""
        begun, stamp = time.time_ns(), _stamp(file)
        if stamp["size"] < WORTH_BYTES:
            return file_sha256(file)
        name = str(file.resolve())
        known = self._read().get(name, {})
        if known.get("stamp") == stamp:
            return str(known["sha256"])
        digest = file_sha256(file)
        settled = begun - max(stamp["mtime_ns"], stamp["ctime_ns"]) > RACY_NS
        if settled and _stamp(file) == stamp:
            with suppress(OSError):  # a cache that cannot be written remembers nothing
                self._remember(name, {"stamp": stamp, "sha256": digest})
        return digest

    def _read(self) -> dict[str, Any]:
        """File -> its stamp and hash; empty when the memory is lost or damaged."""
        try:
            kept = json.loads(self._path.read_text())
            files: dict[str, Any] = kept["files"]
            return files if kept["check"] == _check(files) else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _remember(self, name: str, known: dict[str, Any]) -> None:
        """Adds one, and forgets files that are gone."""
        files = {each: kept for each, kept in self._read().items() if Path(each).exists()}
        files[name] = known
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
    """What changes when a file does; ctime also when its mtime is set back."""
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

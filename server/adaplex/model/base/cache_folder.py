"""CacheFolder: what the cache folder holds, within a byte budget.

Quantized weights and built kernels can be made again, so the least recently used ones are removed
where they exceed the budget; fetched models only on request. The time of use is a file's atime,
which `Use` sets. A file in use has a shared lock (flock), which `Use` has for as long as it lives.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["quantized", "kernels", "models"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MADE: tuple[Kind, ...] = ("quantized", "kernels")
"""Kinds that a start makes again, without a network."""
PARTIAL = ".partial"
LOCK = ".lock"
MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class CacheEntry:
    """One file of the cache, or one folder: a model, or an unfinished build."""

    kind: Kind
    path: Path
    size: int
    """Bytes on the disk's books, as file sizes."""
    used: float
    """Time of the last use, in seconds since the epoch."""
    in_use: bool


class Use:
    """Shared locks on files, and their time of use, from now until this object is dropped."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths: list[Path] = []
        descriptors: list[int] = []
        weakref.finalize(self, _close, descriptors)
        for path in paths:
            with suppress(OSError):  # removed meanwhile, or a file system without locks
                descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                fcntl.flock(descriptors[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)
                self.paths.append(path)
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


class CacheFolder:
    """The cache folder of one user or machine, which processes share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, kinds: Iterable[Kind] = KINDS) -> list[CacheEntry]:
        """Returns what is in the cache, the least recently used first."""
        found = [entry for kind in kinds for entry in self._of(kind)]
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def mapped(self) -> list[Path]:
        """Returns the files of the cache that this process maps; none on other systems than
        Linux.
        """
        try:
            lines = MAPS.read_text().splitlines()
        except OSError:
            return []
        root = f"{self.root.resolve()}/"
        files = {line.split(maxsplit=5)[5] for line in lines if root in line}
        return sorted(Path(file) for file in files if file.startswith(root))

    def trim(self, limit: int) -> list[CacheEntry]:
        """Removes quantized weights and kernels, the least recently used first, until at most
        `limit` bytes of them remain. Files in use stay. Returns what was removed.
        """
        entries = self.entries(MADE)
        excess = sum(entry.size for entry in entries) - limit
        removed = []
        for entry in entries:
            if excess > 0 and _remove(entry):
                excess -= entry.size
                removed.append(entry)
        return removed

    def clear(self, kinds: Iterable[Kind] = MADE) -> tuple[list[CacheEntry], list[CacheEntry]]:
        """Removes everything of these kinds that is not in use; returns what was removed and what
        was not.
        """
        entries = self.entries(kinds)
        removed = [entry for entry in entries if _remove(entry)]
        return removed, [entry for entry in entries if entry not in removed]

    def _of(self, kind: Kind) -> Iterator[CacheEntry]:
        folder = self.root / kind
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.endswith(LOCK) or (
                path.name.startswith(".") and not path.name.endswith(PARTIAL)
            ):
                continue
            with suppress(FileNotFoundError):  # removed by another process
                # Listing a folder changes its own atime.
                files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
                stats = [file.stat() for file in files]
                times = [max(s.st_atime, s.st_mtime) for s in stats] or [path.stat().st_mtime]
                yield CacheEntry(
                    kind,
                    path,
                    size=sum(s.st_size for s in stats),
                    used=max(times),
                    in_use=any(_is_locked(file) for file in _locks(kind, path)),
                )


def _locks(kind: Kind, path: Path) -> list[Path]:
    """Returns the files that are locked while an entry is used or made."""
    if kind == "models":
        key = path.name.removeprefix(".").removesuffix(PARTIAL)
        return [*(path.glob("*") if path.is_dir() else ()), path.with_name(f".{key}{LOCK}")]
    if path.is_dir():
        return [path.parent / LOCK]
    return [path, path.with_name(path.name + LOCK)]


def _is_locked(path: Path) -> bool:
    """True if a process has a lock on a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        return False
    finally:
        os.close(descriptor)


def _remove(entry: CacheEntry) -> bool:
    """Removes an entry that is not in use; returns True if it is gone. A process that has mapped
    the file can go on reading it.
    """
    if entry.in_use:
        return False
    try:
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    except OSError:  # a cache of another user
        return False
    return True


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

"""Stamps of files, which change with their content."""

from __future__ import annotations

from pathlib import Path

FileStamp = tuple[int, int, int]
"""Inode, size in bytes, and modification time in ns; zeros for a file that is missing."""


def file_stamp(path: Path) -> FileStamp:
    """Returns the stamp of a file, links followed."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)

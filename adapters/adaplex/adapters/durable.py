"""Writes that survive a power cut: fsync of files and of the folders that name them."""

from __future__ import annotations

import os
from pathlib import Path


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

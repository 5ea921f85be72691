"""Damage of a catalog on the disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from adaplex.adapters.storage.copied_catalog import CATALOG


def overwrite_pages(store: Path) -> None:
    """Overwrites every page of a store's catalog but the first."""
    with sqlite3.connect(store / CATALOG) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    size = (store / CATALOG).stat().st_size
    with (store / CATALOG).open("r+b") as file:
        file.seek(4096)
        file.write(bytes([0xA5]) * (size - 4096))

"""Lease: keeps the content of one record from removal while a request uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

from adaplex.adapters.catalog import AdapterRecord


class Lease:
    """Holds the content of one record. Release it once the request has left the engine."""

    def __init__(self, record: AdapterRecord, give_back: Callable[[], bool]) -> None:
        self.record = record
        self._give_back = give_back
        self._held = threading.Lock()
        """Free while the lease is held: only one release can take it."""

    def release(self) -> bool:
        """Gives the content back. Whether that removed it for good; False the second time."""
        return self._held.acquire(blocking=False) and self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

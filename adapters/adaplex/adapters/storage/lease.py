"""Leases: content that requests use stays, whatever becomes of its name."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.adapters.storage.content_store import ContentLock, ContentStore


class Leases:
    """How many users each content has; it is held in the store as long as it has any."""

    def __init__(self, contents: ContentStore) -> None:
        self._contents = contents
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._locks: dict[str, ContentLock] = {}

    def acquire(self, digest: str) -> bool:
        """One more user. Whether the content is held; if it is not in the store, it cannot be."""
        with self._lock:
            if digest not in self._locks and (lock := self._contents.lock(digest)):
                self._locks[digest] = lock
            self._counts[digest] += 1
            return digest in self._locks

    def release(self, digest: str) -> bool:
        """One user less. Whether it was the last."""
        with self._lock:
            self._counts[digest] -= 1
            assert self._counts[digest] >= 0
            if self._counts[digest]:
                return False
            del self._counts[digest]
            if lock := self._locks.pop(digest, None):
                lock.release()
            return True

    def __contains__(self, digest: object) -> bool:
        return digest in self._counts

    def __len__(self) -> int:
        """Number of contents that have users."""
        return len(self._counts)


@dataclass(frozen=True)
class LeasedAdapter:
    """One adapter of a combination."""

    record: AdapterRecord
    weight: float


class Lease:
    """Holds what a request is bound to. Release it once the request has left the engine."""

    def __init__(
        self,
        record: AdapterRecord,
        on_release: Callable[[], tuple[str, ...]],
        *,
        parts: Sequence[LeasedAdapter] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        self.record = record
        self.parts = tuple(parts)
        """What is combined; empty for a single adapter."""
        self.warnings = tuple(warnings)
        self._on_release = on_release
        self._held = threading.Lock()
        """Free while the lease is held: only one release can take it."""

    def release(self) -> tuple[str, ...]:
        """Gives the contents back. Those that are gone for good by it, and can leave the memory;
        none the second time.
        """
        return self._on_release() if self._held.acquire(blocking=False) else ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

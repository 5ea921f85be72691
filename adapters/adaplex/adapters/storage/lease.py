"""Leases: requests lease content, which protects it from removal even after its name is deleted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.adapters.storage.content_store import ContentLock, ContentStore


class Leases:
    """Counts the leases of each content, and locks content in the store while it has any."""

    def __init__(self, contents: ContentStore) -> None:
        self._contents = contents
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._locks: dict[str, ContentLock] = {}

    def acquire(self, digest: str) -> bool:
        """Adds a lease. Returns True if the content is locked; absent content cannot be."""
        with self._lock:
            if digest not in self._locks and (lock := self._contents.lock(digest)):
                self._locks[digest] = lock
            self._counts[digest] += 1
            return digest in self._locks

    def release(self, digest: str) -> bool:
        """Removes a lease. Returns True if it was the last of its content."""
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
        """Number of leased contents."""
        return len(self._counts)


@dataclass(frozen=True)
class LeasedAdapter:
    """One adapter of a mix, and its weight."""

    record: AdapterRecord
    weight: float


class Lease:
    """A request's lease of its adapter. Released once the request has left the engine."""

    def __init__(
        self,
        record: AdapterRecord,
        on_release: Callable[[], tuple[str, ...]],
        *,
        parts: Sequence[LeasedAdapter] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        """`on_release` returns what `release` does."""
        self.record = record
        self.parts = tuple(parts)
        """Adapters of a mix; empty for a single adapter."""
        self.warnings = tuple(warnings)
        self._on_release = on_release
        self._released = threading.Lock()
        """Acquired by the first `release`, so that another one has no effect."""

    def release(self) -> tuple[str, ...]:
        """Ends the lease. Returns the digests that no name and no lease refers to any more, whose
        copies in memory can be dropped. A second call returns none.
        """
        return self._on_release() if self._released.acquire(blocking=False) else ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

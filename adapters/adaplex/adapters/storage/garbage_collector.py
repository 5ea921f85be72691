"""GarbageCollector: content that no name points to and nobody holds goes."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable

from adaplex.adapters.errors import AdapterError
from adaplex.adapters.storage.catalog import Catalog
from adaplex.adapters.storage.content_store import ContentStore

log = logging.getLogger(__name__)


class GarbageCollector:
    """Removes with the catalog paused, so that no name can come to point to what goes."""

    def __init__(
        self,
        catalog: Catalog,
        contents: ContentStore,
        *,
        is_leased: Callable[[str], bool],
        on_removed: Callable[[str], None],
    ) -> None:
        """`is_leased` returns True if a request of this process uses a content; `on_removed` is
        called for each content that was removed.
        """
        self._catalog, self._contents = catalog, contents
        self._is_leased, self._on_removed = is_leased, on_removed

    def collect(self, digest: str) -> bool:
        """Removes content that is neither named nor held by any process; whether it did."""
        if self._is_leased(digest) or self._catalog.is_referenced(
            digest
        ):  # seen without waiting for others
            return False
        with self._catalog.paused():
            if self._catalog.is_referenced(digest) or not self._contents.remove(digest):
                return False
        self._on_removed(digest)
        return True

    def discard_if_unused(self, digest: str) -> bool:
        """The last name or lease of a content may be gone. Whether nothing here needs it any more,
        so that it can leave the memory; its files go now, or with the next sweep.
        """
        if self._is_leased(digest) or self._catalog.is_referenced_locally(digest):
            return False
        try:
            self.collect(digest)
        except (AdapterError, OSError, sqlite3.Error) as error:  # what it followed is done already
            log.warning("%s is not collected yet: %s", digest, error)
        return True

    def sweep(self) -> frozenset[str]:
        """Collects all that can be: what a kill, or a process on the same store, left behind."""
        return frozenset(filter(self.collect, self.orphans()))

    def orphans(self) -> frozenset[str]:
        """Content that no name points to, held or not."""
        return self._contents.digests() - self._catalog.digests()

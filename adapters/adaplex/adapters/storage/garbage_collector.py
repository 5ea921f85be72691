"""GarbageCollector: removes content that no name refers to and no request leases."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable

from adaplex.adapters.errors import AdapterError
from adaplex.adapters.storage.catalog import Catalog
from adaplex.adapters.storage.content_store import ContentStore

log = logging.getLogger(__name__)


class GarbageCollector:
    """Removes content while the catalog is paused, so that no name can start to refer to it."""

    def __init__(
        self,
        catalog: Catalog,
        contents: ContentStore,
        *,
        is_leased: Callable[[str], bool],
        on_removed: Callable[[str], None],
    ) -> None:
        """`is_leased` returns True if a request of this process leases a content; `on_removed` is
        called with the digest of each content that was removed.
        """
        self._catalog, self._contents = catalog, contents
        self._is_leased, self._on_removed = is_leased, on_removed

    def collect(self, digest: str) -> bool:
        """Removes content that no name refers to and no process has locked.

        Returns True if it was removed.
        """
        if self._is_leased(digest) or self._catalog.protects(digest):
            return False
        if self._catalog.is_referenced(digest):  # without pausing
            return False
        with self._catalog.paused():
            if self._catalog.is_referenced(digest) or not self._contents.remove(digest):
                return False
        self._on_removed(digest)
        return True

    def discard_if_unused(self, digest: str) -> bool:
        """Collects content whose last name or lease may have ended.

        Returns True if nothing here uses it any more, so that copies in memory can be dropped. Its
        files are removed now, or by the next sweep.
        """
        if self._is_leased(digest) or self._catalog.is_referenced_locally(digest):
            return False
        try:
            self.collect(digest)
        except (AdapterError, OSError, sqlite3.Error) as error:  # the caller's change is done
            log.warning("%s is not collected yet: %s", digest, error)
        return True

    def sweep(self) -> frozenset[str]:
        """Collects all orphans, such as those left by a killed process. Collects nothing while the
        catalog has no entry: it may be new, and the contents older.

        Returns the digests that were removed.
        """
        orphans = self.orphans()
        if orphans and self._catalog.is_empty():
            log.warning("the catalog is empty, so %d contents are not collected", len(orphans))
            return frozenset()
        return frozenset(filter(self.collect, orphans))

    def orphans(self) -> frozenset[str]:
        """Returns the digests that no name refers to, leased or not."""
        return self._contents.digests() - self._catalog.digests()

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
        in_use: Callable[[str], bool],
        forget: Callable[[str], None],
    ) -> None:
        """`in_use` tells whether a request of this process needs a content; `forget` is told of
        each that went.
        """
        self._catalog, self._contents = catalog, contents
        self._in_use, self._forget = in_use, forget

    def collect(self, digest: str) -> bool:
        """Removes content that is neither named nor held by any process; whether it did."""
        if self._in_use(digest) or self._catalog.holds(digest):  # seen without waiting for others
            return False
        with self._catalog.paused():
            if self._catalog.holds(digest) or not self._contents.remove(digest):
                return False
        self._forget(digest)
        return True

    def abandon(self, digest: str) -> bool:
        """The last name or lease of a content may be gone. Whether nothing here needs it any more,
        so that it can leave the memory; its files go now, or with the next sweep.
        """
        if self._in_use(digest) or self._catalog.seems_held(digest):
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

"""BucketCatalog: a Catalog in a bucket that servers on many machines share.

names/<name>.json is the document of an entry. A change reads it, and writes it back on condition
that its etag is the same. Each server has a SqliteCatalog that mirrors the bucket and answers
queries; names older than the refresh interval are fetched again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adaplex.adapters.errors import AdapterError, SourceUnavailable
from adaplex.adapters.storage.bucket import Blob, Bucket, Conflict
from adaplex.adapters.storage.catalog import Order, Query, StoreUsage
from adaplex.adapters.storage.name_document import from_json, to_json
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.sqlite_catalog import SqliteCatalog
from adaplex.adapters.storage.version import Version

log = logging.getLogger(__name__)

FOLDER, SUFFIX = "names/", ".json"
TRIES = 20
"""Conflicting writes of one name in a row before a change fails."""
STRIPES = 64
"""Locks for changes, each for the names of one hash value."""
MAX_AGES = 10_000
"""Names whose refresh time is stored."""


class BucketCatalog:
    """See Catalog. Reads use the mirror while the bucket cannot be reached."""

    def __init__(self, bucket: Bucket, mirror: SqliteCatalog, *, refresh_seconds: float) -> None:
        self._bucket, self._mirror, self._refresh_seconds = bucket, mirror, refresh_seconds
        self._refreshed: dict[str, float] = {}
        """Time of each name's last refresh, in `time.monotonic()` seconds."""
        self._all_refreshed = float("-inf")
        """Time of the last refresh of all names."""
        self._refreshing_all = threading.Lock()
        self._changing = [threading.Lock() for _ in range(STRIPES)]
        """By hash of the name: this process makes one change of a name at a time."""
        self._mirroring = threading.Lock()
        self._changes: dict[str, int] = {}
        """Number of changes of each name by this process."""

    def get(self, name: str) -> NameRecord | None:
        """See Catalog."""
        if time.monotonic() - self._refreshed.get(name, float("-inf")) >= self._refresh_seconds:
            try:
                self._refresh(name)
            except SourceUnavailable:
                if self._mirror.get(name) is None:
                    raise
                self._mark_refreshed(name)  # no further request before the next interval
        return self._mirror.get(name)

    def update(self, name: str, change: Callable[[NameRecord | None], NameRecord]) -> NameRecord:
        """See Catalog. Raises SourceUnavailable."""
        sent = b""
        with self._changing[hash(name) % len(self._changing)]:
            for _ in range(TRIES):
                blob = self._bucket.get(_key(name))
                assert blob is None or isinstance(blob, Blob)
                before = from_json(blob.data) if blob else None
                if before is not None and blob and blob.data == sent:
                    # this change, whose response was lost
                    return self._mirror_change(before, blob.etag)
                after = change(before)
                if blob and after == before:
                    return self._mirror_change(after, blob.etag)
                sent = to_json(after)
                try:
                    if blob:
                        assert blob.etag, "the bucket gives no etags"
                        etag = self._bucket.put(_key(name), sent, if_etag=blob.etag)
                    else:
                        etag = self._bucket.put(_key(name), sent, if_absent=True)
                except Conflict:
                    continue
                return self._mirror_change(after, etag)
        raise SourceUnavailable(
            f"{self._bucket.uri}: {name}: {TRIES} conflicting writes in a row; try again"
        )

    def query(self, query: Query) -> list[NameRecord]:
        """See Catalog."""
        return self._fresh_mirror().query(query)

    def order_value(self, entry: NameRecord, order: Order) -> str | int:
        """See Catalog."""
        return self._mirror.order_value(entry, order)

    def by_digest(self, digest: str) -> tuple[NameRecord, Version] | None:
        """See Catalog."""
        return self._fresh_mirror().by_digest(digest)

    def is_referenced(self, digest: str) -> bool:
        """See Catalog."""
        return self._fresh_mirror().is_referenced(digest)

    def is_referenced_locally(self, digest: str) -> bool:
        """See Catalog."""
        return self._mirror.is_referenced(digest)

    def digests(self) -> frozenset[str]:
        """See Catalog."""
        return self._fresh_mirror().digests()

    def is_empty(self) -> bool:
        """See Catalog."""
        return self._fresh_mirror().is_empty()

    def protects(self, digest: str) -> bool:
        """See Catalog. The documents in the bucket are the catalog, and have no copies."""
        return False

    def doubt(self) -> str:
        """See Catalog."""
        return ""

    def damage(self) -> str:
        """See Catalog."""
        return self._mirror.damage()

    def pinned(self) -> list[NameRecord]:
        """See Catalog."""
        return self._fresh_mirror().pinned()

    def usage(self) -> StoreUsage:
        """See Catalog. Concurrent uploads on several servers may exceed a quota by their size."""
        return self._fresh_mirror().usage()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does nothing, as other servers cannot be paused. BucketContent's grace period protects
        content that a name starts to refer to meanwhile.
        """
        yield

    def check_integrity(self) -> None:
        """Asserts that every entry of the bucket can be read and is in the mirror."""
        self._refresh_all()
        self._mirror.check_integrity()
        for stat in self._bucket.list(FOLDER):
            name = _name(stat.key)
            entry = self._mirror.get(name)
            assert entry is not None
            assert entry.name == name

    def close(self) -> None:
        """See Catalog."""
        self._mirror.close()

    def _refresh(self, name: str) -> None:
        """Fetches one name into the mirror, unless this process changes it meanwhile."""
        changes = self._changes.get(name, 0)
        found = self._bucket.get(_key(name), unless_etag=self._mirror.tag(name))
        with self._mirroring:
            if self._changes.get(name, 0) != changes:
                return
            if isinstance(found, Blob):
                self._mirror.put(from_json(found.data), found.etag)
            elif found is None and self._mirror.get(name) is not None:
                self._mirror.drop(name)
            self._mark_refreshed(name)

    def _fresh_mirror(self) -> SqliteCatalog:
        """Returns the mirror, after refreshing all names if that is due.

        While one thread refreshes, others get the mirror as it is; before the first refresh, they
        wait for it.
        """
        has_mirror = self._all_refreshed != float("-inf")
        if not self._refreshing_all.acquire(blocking=not has_mirror):
            return self._mirror
        try:
            if time.monotonic() - self._all_refreshed >= self._refresh_seconds:
                self._refresh_all()
        except SourceUnavailable:
            if self._all_refreshed == float("-inf"):
                raise
            self._all_refreshed = time.monotonic()  # no further request before the next interval
        finally:
            self._refreshing_all.release()
        return self._mirror

    def _refresh_all(self) -> None:
        """Fetches the entries whose etag differs from the mirror's, and drops absent ones."""
        mirrored, begun = self._mirror.tags(), time.monotonic()
        listed = {_name(stat.key): stat.etag for stat in self._bucket.list(FOLDER)}
        changed = {name for name, etag in listed.items() if mirrored.get(name) != etag}
        absent = mirrored.keys() - listed.keys()  # or added since the listing
        for name in changed | absent:
            try:
                self._refresh(name)
            except SourceUnavailable:
                raise
            except AdapterError as error:  # e.g. written by a newer version; others can be served
                log.warning("%s: %s", name, error)
        self._all_refreshed = begun

    def _mirror_change(self, entry: NameRecord, etag: str) -> NameRecord:
        """Writes an entry to the mirror after this process wrote it to the bucket."""
        with self._mirroring:
            self._mirror.put(entry, etag)
            self._changes[entry.name] = self._changes.get(entry.name, 0) + 1
            self._mark_refreshed(entry.name)
        return entry

    def _mark_refreshed(self, name: str) -> None:
        if len(self._refreshed) >= MAX_AGES:
            self._refreshed.clear()
        self._refreshed[name] = time.monotonic()


def _key(name: str) -> str:
    return f"{FOLDER}{name}{SUFFIX}"


def _name(key: str) -> str:
    return key.removeprefix(FOLDER).removesuffix(SUFFIX)

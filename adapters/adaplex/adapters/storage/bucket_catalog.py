"""BucketCatalog: entries as objects of a bucket that servers on many machines share.

names/<name>.json holds an entry. A change reads it, and writes it back on the condition that nobody
else has. A SqliteCatalog beside each server mirrors what it has seen, and answers what needs an
index; it is looked after again when it is older than the refresh interval.
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
"""Times that other servers may be faster with one name, in a row."""
STRIPES = 64
MAX_AGES = 10_000
"""Names whose age is remembered."""


class BucketCatalog:
    """See Catalog. When the bucket cannot be reached, what is known is still read."""

    def __init__(self, bucket: Bucket, mirror: SqliteCatalog, *, refresh_seconds: float) -> None:
        self._bucket, self._mirror, self._refresh_seconds = bucket, mirror, refresh_seconds
        self._refreshed: dict[str, float] = {}
        """When each name was looked up, in `time.monotonic()` seconds."""
        self._listed = float("-inf")
        self._listing = threading.Lock()
        self._changing = [threading.Lock() for _ in range(STRIPES)]
        """One for some names each: changes of a name by this process take turns."""
        self._mirroring = threading.Lock()
        self._changes: dict[str, int] = {}
        """How often this process has changed each name."""

    def get(self, name: str) -> NameRecord | None:
        """See Catalog."""
        if time.monotonic() - self._refreshed.get(name, float("-inf")) >= self._refresh_seconds:
            try:
                self._refresh(name)
            except SourceUnavailable:
                if self._mirror.get(name) is None:
                    raise
                self._mark_refreshed(name)  # not asked again before the next interval
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
                    return self._mirror_change(before, blob.etag)  # our own, whose answer was lost
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
        raise SourceUnavailable(f"{self._bucket.uri}: {name} changes too fast to be changed")

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

    def pinned(self) -> list[NameRecord]:
        """See Catalog."""
        return self._fresh_mirror().pinned()

    def usage(self) -> StoreUsage:
        """See Catalog. Servers that upload at the same time may overshoot a quota by what they
        upload.
        """
        return self._fresh_mirror().usage()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing: servers elsewhere cannot be stopped. Content that nothing names is kept for a
        grace period instead; see BucketContents.
        """
        yield

    def check_integrity(self) -> None:
        """Asserts that every entry of the bucket can be read, and is mirrored as it is."""
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
        """Brings one name up to date, unless this process has changed it meanwhile."""
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
        """The mirror, brought up to date as a whole if it is too old. While one thread does that,
        the others take it as it is, once there is one.
        """
        known = self._listed != float("-inf")
        if not self._listing.acquire(blocking=not known):
            return self._mirror
        try:
            if time.monotonic() - self._listed >= self._refresh_seconds:
                self._refresh_all()
        except SourceUnavailable:
            if self._listed == float("-inf"):
                raise
            self._listed = time.monotonic()  # not asked again before the next interval
        finally:
            self._listing.release()
        return self._mirror

    def _refresh_all(self) -> None:
        """Fetches what has changed since the mirror saw it, and forgets what is gone."""
        known, begun = self._mirror.tags(), time.monotonic()
        there = {_name(stat.key): stat.etag for stat in self._bucket.list(FOLDER)}
        changed = {name for name, etag in there.items() if known.get(name) != etag}
        for name in changed | (known.keys() - there.keys()):  # some came while the list was made
            try:
                self._refresh(name)
            except SourceUnavailable:
                raise
            except AdapterError as error:  # of a newer version, perhaps; the others can be served
                log.warning("%s: %s", name, error)
        self._listed = begun

    def _mirror_change(self, entry: NameRecord, etag: str) -> NameRecord:
        """Takes over what this process has written."""
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

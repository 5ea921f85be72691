"""BucketContents: the files of adapters in a bucket, and those in use on this machine's disk.

objects/<digest hex>/<file>, the manifest last: an object without one is not there.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from adaplex.adapters.bucket import Blob, Bucket, Stat
from adaplex.adapters.digest import PATTERN, PREFIX
from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound, StoreCorrupt
from adaplex.adapters.staging import FileSpec, Staging
from adaplex.adapters.store import MANIFEST, AdapterStore, Hold

FOLDER = "objects/"
GRACE = timedelta(hours=1)
"""Age before which an object stays in the bucket: a server elsewhere may be about to name it."""


class BucketContents:
    """See Contents. The local store is a cache under a byte budget, emptied by last use."""

    def __init__(
        self, bucket: Bucket, cache: AdapterStore, *, cache_bytes: int, grace: timedelta = GRACE
    ) -> None:
        self._bucket, self._cache = bucket, cache
        self._cache_bytes, self._grace = cache_bytes, grace
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """See Contents."""
        return self._cache.stage(files)

    def scratch(self) -> Path:
        """See Contents."""
        return self._cache.scratch()

    def take(self, staging: Staging, digest: str) -> bool:
        """See Contents. Makes an object that is there already as young as a new one."""
        known = self._bucket.get(_key(digest, MANIFEST))
        if isinstance(known, Blob):
            self._bucket.put(_key(digest, MANIFEST), known.data)
        else:
            for file in staging.files:
                self._bucket.put(_key(digest, file.name), staging.directory / file.name)
            files = {f.name: {"size": f.size, "sha256": f.sha256} for f in staging.files}
            manifest = json.dumps({"digest": digest, "files": files}, indent=1)
            self._bucket.put(_key(digest, MANIFEST), manifest.encode())
        self._cache.take(staging, digest)
        self._make_room(digest)
        return known is None

    def open(self, digest: str) -> Path:
        """See Contents. Fetches what is not here, or not as it should be."""
        try:
            return self._cache.open(digest)
        except StoreCorrupt:
            self._cache.remove(digest, damaged=True)
        except AdapterNotFound:
            pass
        with self._fetching[digest]:
            if not self._cache.has(digest):
                self._fetch(digest)
        return self._cache.open(digest)

    def hold(self, digest: str) -> Hold | None:
        """See Contents; what is not here needs none, as the bucket keeps it."""
        return self._cache.hold(digest)

    def remove(self, digest: str, *, damaged: bool = False) -> bool:
        """See Contents. From this machine now, from the bucket once it is old enough."""
        if self._cache.has(digest) and not self._cache.remove(digest, damaged=damaged):
            return False
        stats = list(self._bucket.list(_key(digest, "")))
        if damaged or (stats and self._is_old(stats)):
            first = [_key(digest, MANIFEST)]
            self._bucket.delete(*first, *(s.key for s in stats if s.key not in first))
        return True

    def has(self, digest: str) -> bool:
        """Whether an object is on this machine, in whatever state."""
        return self._cache.has(digest)

    def digests(self) -> frozenset[str]:
        """See Contents: what is in the bucket, or here, or begun to be uploaded and long left."""
        found: defaultdict[str, list[Stat]] = defaultdict(list)
        for stat in self._bucket.list(FOLDER):
            found[PREFIX + stat.key.removeprefix(FOLDER).partition("/")[0]].append(stat)
        whole = {
            digest
            for digest, stats in found.items()
            if PATTERN.fullmatch(digest)
            and (self._is_old(stats) or any(s.key == _key(digest, MANIFEST) for s in stats))
        }
        return self._cache.digests() | whole

    def cached_bytes(self) -> int:
        """See Contents."""
        return sum(nbytes for _, nbytes in self._cache.by_last_use())

    def close(self) -> None:
        """See Contents."""
        self._cache.close()

    def _fetch(self, digest: str) -> None:
        """Downloads an object into the cache. Raises AdapterNotFound, StoreCorrupt or
        SourceUnavailable.
        """
        manifest = self._bucket.get(_key(digest, MANIFEST))
        if not isinstance(manifest, Blob):
            raise AdapterNotFound(f"{digest} is not in the store")
        try:
            files: dict[str, dict[str, Any]] = json.loads(manifest.data)["files"]
            specs = [FileSpec(name, f["size"], f["sha256"]) for name, f in files.items()]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt(f"{digest}: its manifest cannot be read: {error}") from error
        folder = self._cache.scratch()
        try:
            for spec in specs:
                path = folder / spec.name
                size = self._bucket.download(_key(digest, spec.name), path, max_bytes=spec.size)
                if size is None:
                    raise StoreCorrupt(f"{digest}: {spec.name} is gone from the bucket")
            staging = Staging.of_files(folder, specs)
            try:
                staging.verify()
            except AdapterInvalid as error:
                raise StoreCorrupt(f"{digest}: in the bucket, {error}") from error
            self._cache.take(staging, digest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._make_room(digest)

    def _make_room(self, newest: str) -> None:
        """Removes what was used longest ago until the cache keeps to its budget."""
        self._cache.touch(newest)
        used = self._cache.by_last_use()
        total = sum(nbytes for _, nbytes in used)
        for digest, nbytes in used:
            if total <= self._cache_bytes:
                return
            if digest != newest and self._cache.remove(digest):
                total -= nbytes

    def _is_old(self, stats: Sequence[Stat]) -> bool:
        youngest = max(stat.modified for stat in stats)
        return datetime.now(UTC) - youngest > self._grace


def _key(digest: str, file: str) -> str:
    return f"{FOLDER}{digest.removeprefix(PREFIX)}/{file}"

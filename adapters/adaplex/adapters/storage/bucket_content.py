"""BucketContent: a ContentStore in a bucket, with a cache on this machine's disk.

objects/<digest hex>/manifest.json          names the files; written last, conditionally
objects/<digest hex>/<generation>/<file>    the files that one manifest names

Content without a name is marked in its manifest. If it still has no name after the grace period,
the manifest becomes a tombstone and the files are deleted. Each step is a conditional write, so a
concurrent upload of the same content wins, with a generation of its own.
"""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from adaplex.adapters.digest import PATTERN, PREFIX
from adaplex.adapters.errors import (
    AdapterInvalid,
    AdapterNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adaplex.adapters.storage.bucket import Blob, Bucket, Conflict
from adaplex.adapters.storage.content_store import ContentLock
from adaplex.adapters.storage.folder_content import MANIFEST, FolderContent
from adaplex.adapters.storage.staging import FileSpec, Staging

FOLDER = "objects/"
GRACE = timedelta(hours=1)
"""Time from finding content without a name to removing it: other servers may still use it."""
TRIES = 20
"""Conflicting writes of one manifest in a row before an upload fails."""
STRIPES = 64
"""Locks for downloads, each for the digests of one hash value."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of one content in the bucket."""

    digest: str
    generation: str
    files: tuple[FileSpec, ...]
    unnamed_since: str = ""
    """Time at which it was found without a name, ISO 8601; empty while it has one."""
    gone: bool = False
    """True for a tombstone: the files are deleted, or about to be."""

    @classmethod
    def parse(cls, data: bytes, digest: str) -> Manifest:
        """Returns the manifest in `data`. Raises StoreCorrupt."""
        try:
            fields = json.loads(data)
            files = tuple(FileSpec(**file) for file in fields.pop("files"))
            return cls(files=files, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreCorrupt(f"{digest}: its manifest cannot be read: {error}") from error

    def to_json(self) -> bytes:
        """Returns the bytes of the object in the bucket."""
        return json.dumps(asdict(self), indent=1).encode()

    def key(self, file: str) -> str:
        """Returns the key of one of its files."""
        return f"{_folder(self.digest)}{self.generation}/{file}"


class BucketContent:
    """See ContentStore. The cache has a byte budget, and evicts least recently used objects."""

    def __init__(
        self, bucket: Bucket, cache: FolderContent, *, cache_bytes: int, grace: timedelta = GRACE
    ) -> None:
        self._bucket, self._cache = bucket, cache
        self._cache_bytes, self._grace = cache_bytes, grace
        self._fetching = [threading.Lock() for _ in range(STRIPES)]
        """By hash of the digest: one thread downloads a content."""

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """See ContentStore."""
        return self._cache.stage(files)

    def scratch_folder(self) -> Path:
        """See ContentStore."""
        return self._cache.scratch_folder()

    def add(self, staging: Staging, digest: str) -> bool:
        """See ContentStore. Removes the mark of content that exists but had no name."""
        for _ in range(TRIES):
            known, etag = self._read(digest)
            try:
                if known is None or known.gone:
                    self._upload(staging, digest, etag)
                elif known.unnamed_since:
                    self._write(replace(known, unnamed_since=""), etag)
            except Conflict:
                continue
            self._cache.add(staging, digest)
            self._evict(digest)
            return known is None or known.gone
        raise SourceUnavailable(
            f"{self._bucket.uri}: {digest}: {TRIES} conflicting writes in a row; try again"
        )

    def open(self, digest: str) -> Path:
        """See ContentStore. Downloads an object that the cache lacks, or has damaged."""
        with self._fetching[hash(digest) % STRIPES]:
            try:
                return self._cache.open(digest)
            except StoreCorrupt:
                self._cache.remove(digest, damaged=True)
            except AdapterNotFound:
                pass
            self._fetch(digest)
            return self._cache.open(digest)

    def lock(self, digest: str) -> ContentLock | None:
        """See ContentStore. Locks the cached copy; the grace period protects the bucket's."""
        return self._cache.lock(digest)

    def remove(self, digest: str, *, damaged: bool = False) -> bool:
        """See ContentStore. Removes the cached copy now, and the bucket's after the grace period.

        Returns True if both are removed.
        """
        if self._cache.has(digest) and not self._cache.remove(digest, damaged=damaged):
            return False
        known, etag = self._read(digest)
        if known is None or known.gone:
            self._delete_leftovers(digest)
            return True
        try:
            if damaged or self._is_due(known):
                self._write(replace(known, gone=True), etag)
                self._bucket.delete(*(known.key(file.name) for file in known.files))
                return True
            if not known.unnamed_since:
                now = datetime.now(UTC).isoformat()
                self._write(replace(known, unnamed_since=now), etag)
        except Conflict:  # another server stores it again
            return False
        return False

    def has(self, digest: str) -> bool:
        """Returns True if the cache has an object, damaged or not."""
        return self._cache.has(digest)

    def digests(self) -> frozenset[str]:
        """See ContentStore. Objects with files in the cache or the bucket; tombstones have none."""
        found = {
            PREFIX + stat.key.removeprefix(FOLDER).partition("/")[0]
            for stat in self._bucket.list(FOLDER)
            if not stat.key.endswith(f"/{MANIFEST}")
        }
        return self._cache.digests() | {digest for digest in found if PATTERN.fullmatch(digest)}

    def cached_bytes(self) -> int:
        """See ContentStore."""
        return sum(nbytes for _, nbytes in self._cache.by_last_use())

    def close(self) -> None:
        """See ContentStore."""
        self._cache.close()

    def _delete_leftovers(self, digest: str) -> None:
        """Deletes files of unfinished uploads, unless they are recent: an upload may be running."""
        oldest = datetime.now(UTC) - self._grace
        stats = list(self._bucket.list(_folder(digest)))
        left = [s.key for s in stats if not s.key.endswith(MANIFEST) and s.modified < oldest]
        self._bucket.delete(*left)

    def _read(self, digest: str) -> tuple[Manifest | None, str]:
        """Returns the manifest and its etag. An unreadable one counts as a tombstone."""
        blob = self._bucket.get(_folder(digest) + MANIFEST)
        if not isinstance(blob, Blob):
            return None, ""
        assert blob.etag, "the bucket gives no etags"
        try:
            return Manifest.parse(blob.data, digest), blob.etag
        except StoreCorrupt:
            return Manifest(digest, "", (), gone=True), blob.etag

    def _write(self, manifest: Manifest, etag: str) -> None:
        """Replaces the manifest that has `etag`, or writes the first. Raises Conflict."""
        key = _folder(manifest.digest) + MANIFEST
        if etag:
            self._bucket.put(key, manifest.to_json(), if_etag=etag)
        else:
            self._bucket.put(key, manifest.to_json(), if_absent=True)

    def _upload(self, staging: Staging, digest: str, etag: str) -> None:
        """Uploads the files under a new generation, then the manifest. Raises Conflict."""
        manifest = Manifest(digest, uuid.uuid4().hex, staging.files)
        for file in manifest.files:
            self._bucket.put(manifest.key(file.name), staging.directory / file.name)
        self._write(manifest, etag)

    def _fetch(self, digest: str) -> None:
        """Downloads an object into the cache.

        Raises AdapterNotFound, StoreCorrupt or SourceUnavailable.
        """
        blob = self._bucket.get(_folder(digest) + MANIFEST)
        manifest = Manifest.parse(blob.data, digest) if isinstance(blob, Blob) else None
        if manifest is None or manifest.gone:
            raise AdapterNotFound(f"{digest} is not in the store")
        folder = self._cache.scratch_folder()
        try:
            for file in manifest.files:
                path, key = folder / Path(file.name).name, manifest.key(file.name)
                if self._bucket.download(key, path, max_bytes=file.size) is None:
                    raise StoreCorrupt(f"{digest}: {file.name} is missing in the bucket")
            staging = Staging.of_files(folder, manifest.files)
            try:
                staging.verify()
            except AdapterInvalid as error:
                raise StoreCorrupt(f"{digest}: in the bucket, {error}") from error
            self._cache.add(staging, digest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._evict(digest)

    def _evict(self, newest: str) -> None:
        """Removes least recently used objects until the cache is within its budget."""
        self._cache.touch(newest)
        used = self._cache.by_last_use()
        total = sum(nbytes for _, nbytes in used)
        for digest, nbytes in used:
            if total <= self._cache_bytes:
                return
            if digest != newest and self._cache.remove(digest):
                total -= nbytes

    def _is_due(self, manifest: Manifest) -> bool:
        """Returns True if content has had no name for the grace period."""
        if not manifest.unnamed_since:
            return False
        return datetime.now(UTC) - datetime.fromisoformat(manifest.unnamed_since) >= self._grace


def _folder(digest: str) -> str:
    return f"{FOLDER}{digest.removeprefix(PREFIX)}/"

"""BucketContent: the files of adapters in a bucket, and those in use on this machine's disk.

objects/<digest hex>/manifest.json          what there is, written last, and on condition only
objects/<digest hex>/<generation>/<file>    the files that one manifest names

A content that nothing names is marked in its manifest; a mark that is older than the grace period,
with the content still unnamed, becomes a tombstone, and the files go. Each step is a conditional
write, so an upload of the same content meanwhile wins, with a generation of its own.
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
"""How long content stays after it was found without a name: servers elsewhere may use it still."""
TRIES = 20
STRIPES = 64


@dataclass(frozen=True)
class Manifest:
    """What the bucket says of one content."""

    digest: str
    generation: str
    files: tuple[FileSpec, ...]
    unnamed_since: str = ""
    """When it was found without a name, in ISO 8601; empty while it has one."""
    gone: bool = False
    """A tombstone: the files of the generation are gone, or about to go."""

    @classmethod
    def parse(cls, data: bytes, digest: str) -> Manifest:
        """Raises StoreCorrupt."""
        try:
            fields = json.loads(data)
            files = tuple(FileSpec(**file) for file in fields.pop("files"))
            return cls(files=files, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreCorrupt(f"{digest}: its manifest cannot be read: {error}") from error

    def to_json(self) -> bytes:
        """The object in the bucket."""
        return json.dumps(asdict(self), indent=1).encode()

    def key(self, file: str) -> str:
        """Where a file of it lies."""
        return f"{_folder(self.digest)}{self.generation}/{file}"


class BucketContent:
    """See Contents. The local store is a cache under a byte budget, emptied by last use."""

    def __init__(
        self, bucket: Bucket, cache: FolderContent, *, cache_bytes: int, grace: timedelta = GRACE
    ) -> None:
        self._bucket, self._cache = bucket, cache
        self._cache_bytes, self._grace = cache_bytes, grace
        self._fetching = [threading.Lock() for _ in range(STRIPES)]
        """One for some digests each: a content is fetched by one thread."""

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """See Contents."""
        return self._cache.stage(files)

    def scratch_folder(self) -> Path:
        """See Contents."""
        return self._cache.scratch_folder()

    def add(self, staging: Staging, digest: str) -> bool:
        """See Contents. Content that is there already loses its mark, if it has one."""
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
        raise SourceUnavailable(f"{self._bucket.uri}: {digest} changes too fast to be stored")

    def open(self, digest: str) -> Path:
        """See Contents. Fetches what is not here, or not as it should be."""
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
        """See Contents; of what is here. The bucket keeps what servers use by its grace period."""
        return self._cache.lock(digest)

    def remove(self, digest: str, *, damaged: bool = False) -> bool:
        """See Contents. From this machine now, from the bucket after the grace period. Whether it
        is gone from both.
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
        except Conflict:  # somebody stores it again
            return False
        return False

    def has(self, digest: str) -> bool:
        """Whether an object is on this machine, in whatever state."""
        return self._cache.has(digest)

    def digests(self) -> frozenset[str]:
        """See Contents: what has files here or in the bucket; tombstones have none."""
        found = {
            PREFIX + stat.key.removeprefix(FOLDER).partition("/")[0]
            for stat in self._bucket.list(FOLDER)
            if not stat.key.endswith(f"/{MANIFEST}")
        }
        return self._cache.digests() | {digest for digest in found if PATTERN.fullmatch(digest)}

    def cached_bytes(self) -> int:
        """See Contents."""
        return sum(nbytes for _, nbytes in self._cache.by_last_use())

    def close(self) -> None:
        """See Contents."""
        self._cache.close()

    def _delete_leftovers(self, digest: str) -> None:
        """Deletes what uploads that never ended have left; one may be under way still."""
        oldest = datetime.now(UTC) - self._grace
        stats = list(self._bucket.list(_folder(digest)))
        left = [s.key for s in stats if not s.key.endswith(MANIFEST) and s.modified < oldest]
        self._bucket.delete(*left)

    def _read(self, digest: str) -> tuple[Manifest | None, str]:
        """The manifest and its etag. One that cannot be read is one that is gone."""
        blob = self._bucket.get(_folder(digest) + MANIFEST)
        if not isinstance(blob, Blob):
            return None, ""
        assert blob.etag, "the bucket gives no etags"
        try:
            return Manifest.parse(blob.data, digest), blob.etag
        except StoreCorrupt:
            return Manifest(digest, "", (), gone=True), blob.etag

    def _write(self, manifest: Manifest, etag: str) -> None:
        """Swaps the manifest. Raises Conflict."""
        key = _folder(manifest.digest) + MANIFEST
        if etag:
            self._bucket.put(key, manifest.to_json(), if_etag=etag)
        else:
            self._bucket.put(key, manifest.to_json(), if_absent=True)

    def _upload(self, staging: Staging, digest: str, etag: str) -> None:
        """Files first, under a generation that nobody else uses. Raises Conflict."""
        manifest = Manifest(digest, uuid.uuid4().hex, staging.files)
        for file in manifest.files:
            self._bucket.put(manifest.key(file.name), staging.directory / file.name)
        self._write(manifest, etag)

    def _fetch(self, digest: str) -> None:
        """Downloads an object into the cache. Raises AdapterNotFound, StoreCorrupt or
        SourceUnavailable.
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
                    raise StoreCorrupt(f"{digest}: {file.name} is gone from the bucket")
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
        """Removes what was used longest ago until the cache keeps to its budget."""
        self._cache.touch(newest)
        used = self._cache.by_last_use()
        total = sum(nbytes for _, nbytes in used)
        for digest, nbytes in used:
            if total <= self._cache_bytes:
                return
            if digest != newest and self._cache.remove(digest):
                total -= nbytes

    def _is_due(self, manifest: Manifest) -> bool:
        """Whether it has been without a name for long enough."""
        if not manifest.unnamed_since:
            return False
        return datetime.now(UTC) - datetime.fromisoformat(manifest.unnamed_since) >= self._grace


def _folder(digest: str) -> str:
    return f"{FOLDER}{digest.removeprefix(PREFIX)}/"

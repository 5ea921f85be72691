"""An S3-compatible bucket: s3://bucket/prefix, under allowed prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.sources.transfer import choose_files
from adaplex.adapters.storage.bucket import Bucket, Stat

MAX_LISTED = 10_000
"""Objects under one prefix, in folders too, that are looked at."""


class BucketSource:
    """Downloads the objects that are directly under a prefix."""

    def __init__(self, allow: Sequence[str], limits: AdapterLimits) -> None:
        """`allow` are URIs; what is asked for must be one of them or below one."""
        self._allow, self._limits = tuple(uri.rstrip("/") for uri in allow), limits

    def fetch(self, uri: str, into: Path) -> str:
        """Downloads an adapter; its URI. Raises AdapterInvalid, AdapterNotFound, AdapterTooLarge or
        SourceUnavailable.
        """
        bucket = Bucket(uri)
        if not any(
            bucket.uri == allowed or bucket.uri.startswith(allowed + "/") for allowed in self._allow
        ):
            raise AdapterInvalid.because("uri", "must lie under one of --bucket-allow")
        stats = _listing(bucket)
        for name in choose_files({n: stat.size for n, stat in stats.items()}, self._limits):
            listed = stats[name]
            found = bucket.download(name, into / name, max_bytes=listed.size, if_etag=listed.etag)
            if found is None:
                raise AdapterNotFound(f"{name} has gone meanwhile", field="uri")
        return bucket.uri


def _listing(bucket: Bucket) -> dict[str, Stat]:
    """The objects directly under the prefix, by name. Raises AdapterInvalid."""
    stats = {}
    for count, stat in enumerate(bucket.list()):
        if count == MAX_LISTED:
            raise AdapterInvalid.because("uri", f"has more than {MAX_LISTED} objects")
        if "/" not in stat.key:
            stats[stat.key] = stat
    return stats

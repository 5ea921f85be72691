"""BucketSource: S3-compatible buckets, s3://bucket/prefix, under allowed prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound, listed
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.sources.transfer import choose_files
from adaplex.adapters.storage.bucket import Bucket, Stat

MAX_LISTED = 10_000
"""Longest listing of one prefix, objects in its folders included."""


class BucketSource:
    """Downloads the objects directly under a prefix."""

    def __init__(self, allow: Sequence[str], limits: AdapterLimits) -> None:
        """`allow` has URIs; only these and URIs below them can be fetched."""
        self._allow, self._limits = tuple(uri.rstrip("/") for uri in allow), limits

    def fetch(self, uri: str, into: Path) -> str:
        """Downloads an adapter. Returns its URI.

        Raises AdapterInvalid, AdapterNotFound, AdapterTooLarge or SourceUnavailable.
        """
        bucket = Bucket(uri)
        if not any(
            bucket.uri == allowed or bucket.uri.startswith(allowed + "/") for allowed in self._allow
        ):
            reason = f"must lie under one of --bucket-allow: {listed(self._allow)}"
            raise AdapterInvalid.because("uri", reason)
        stats = _listing(bucket)
        for name in choose_files({n: stat.size for n, stat in stats.items()}, self._limits):
            size, etag = stats[name].size, stats[name].etag
            found = bucket.download(name, into / name, max_bytes=size, if_etag=etag)
            if found is None:
                raise AdapterNotFound(f"{name} was removed since it was listed", field="uri")
        return bucket.uri


def _listing(bucket: Bucket) -> dict[str, Stat]:
    """Returns the objects directly under the prefix by name. Raises AdapterInvalid."""
    stats = {}
    for count, stat in enumerate(bucket.list()):
        if count == MAX_LISTED:
            raise AdapterInvalid.because(
                "uri", f"has more than {MAX_LISTED} objects, the limit of a listing"
            )
        if "/" not in stat.key:
            stats[stat.key] = stat
    return stats

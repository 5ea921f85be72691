"""An S3-compatible bucket: s3://bucket/prefix, under allowed prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaplex.adapters.bucket import Bucket
from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.sources.transfer import choose_files

MAX_LISTED = 1000
"""Objects under one prefix that are looked at."""


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
        sizes: dict[str, int] = {}
        for stat in bucket.list():
            if "/" not in stat.key:
                sizes[stat.key] = stat.size
            if len(sizes) > MAX_LISTED:
                raise AdapterInvalid.because("uri", f"has more than {MAX_LISTED} objects")
        for name in choose_files(sizes, self._limits):
            found = bucket.download(name, into / name, max_bytes=sizes[name])
            if found is None:
                raise AdapterNotFound(f"{name} has gone meanwhile", field="uri")
        return bucket.uri

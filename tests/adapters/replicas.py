"""Registries that share a store in a bucket."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.registry.intake import Capacity
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.storage.bucket import Bucket
from adaplex.adapters.storage.bucket_catalog import BucketCatalog
from adaplex.adapters.storage.bucket_content import GRACE, BucketContent
from adaplex.adapters.storage.folder_content import FolderContent
from adaplex.adapters.storage.sqlite_catalog import SqliteCatalog
from adapters.handmade import BASE


def replica(
    uri: str,
    root: Path,
    *,
    cache_bytes: int = 1 << 30,
    grace: timedelta = GRACE,
    refresh_seconds: float = 0.0,
) -> AdapterRegistry:
    """Returns one server's registry of the bucket, for fp32."""
    root.mkdir(parents=True, exist_ok=True)
    bucket = Bucket(uri)
    mirror = SqliteCatalog(root / "catalog.sqlite3")
    return AdapterRegistry(
        BucketContent(bucket, FolderContent(root), cache_bytes=cache_bytes, grace=grace),
        BucketCatalog(bucket, mirror, refresh_seconds=refresh_seconds),
        BASE,
        capacity=Capacity(4, AdapterLimits()),
    )

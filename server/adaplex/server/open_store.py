"""Opens the adapter store of a configuration, with the importer that fills it."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog

from adaplex.adapters.api import (
    AdapterLimits,
    AdapterRegistry,
    BasePolicy,
    BaseSpec,
    Bucket,
    BucketCatalog,
    BucketContent,
    Capacity,
    Catalog,
    ContentStore,
    CopiedCatalog,
    FolderContent,
    Importer,
    Origin,
    SignaturePolicy,
    SignatureVerifier,
    Sources,
    SqliteCatalog,
    convert_gguf_lora,
)
from adaplex.adapters.errors import AdapterError, CatalogCorrupt
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError

log = structlog.get_logger("adaplex.store")

AT_START = "start"
"""Actor in the history of adapters that `--adapters` imports."""


@dataclass(frozen=True)
class OpenStore:
    """An open store: the registry, its content, and the importer from other sources."""

    registry: AdapterRegistry
    importer: Importer
    contents: ContentStore


def open_store(config: ServerConfig, spec: BaseSpec, *, element_bytes: int) -> OpenStore:
    """Opens the store of the configuration. Raises ConfigError if it is unusable."""
    limits = adapter_limits(config)
    contents, catalog = open_contents(config)
    registry = AdapterRegistry(
        contents,
        catalog,
        spec,
        capacity=Capacity(element_bytes, limits, config.arena_bytes, config.merged_bytes),
        base_policy=BasePolicy(config.base_policy),
        signatures=_signatures(config),
    )
    sources = _sources(config, spec, limits, config.adapter_roots)
    return OpenStore(registry, Importer(registry, contents, sources), contents)


def require_store(config: ServerConfig) -> None:
    """Raises ConfigError if the store does not exist yet."""
    if config.shared_store is None and not config.store_dir.is_dir():
        raise ConfigError(f"store_dir: there is no store in {config.store_dir}")


def open_contents(config: ServerConfig) -> tuple[ContentStore, Catalog]:
    """Opens content and catalog, in a folder of this machine or in a bucket. Raises ConfigError."""
    root = config.store_dir
    try:
        root.mkdir(parents=True, exist_ok=True)
        if config.shared_store is None:
            return FolderContent(root), CopiedCatalog(root)
        return _shared(config.shared_store, root, config)
    except (OSError, sqlite3.Error, AdapterError) as error:
        raise ConfigError(f"store_dir: cannot store adapters in {root}: {error}") from error


def _shared(uri: str, root: Path, config: ServerConfig) -> tuple[ContentStore, Catalog]:
    """Opens content and catalog in a bucket, with a cache on this machine for this bucket only."""
    try:
        bucket = Bucket(uri)
    except AdapterError as error:
        raise ConfigError(f"shared_store: {error}") from error
    cache = root / "shared" / hashlib.sha256(bucket.uri.encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    mirror = _mirror(cache / "catalog.sqlite3")
    return (
        BucketContent(bucket, FolderContent(cache), cache_bytes=config.cache_bytes),
        BucketCatalog(bucket, mirror, refresh_seconds=config.refresh_seconds),
    )


def _mirror(path: Path) -> SqliteCatalog:
    """Opens the mirror of a bucket's names; a damaged one is made anew from the bucket."""
    try:
        return SqliteCatalog(path)
    except CatalogCorrupt as error:
        log.warning("made anew from the bucket", reason=str(error))
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return SqliteCatalog(path)


def import_adapters(
    config: ServerConfig, store: OpenStore, progress: Callable[[str], None]
) -> None:
    """Imports the adapters of `--adapters`. Raises AdapterErrors."""
    # The operator chose the paths, so links may point anywhere, as in the hub's cache.
    anywhere = _sources(config, store.registry.base, adapter_limits(config), (Path("/"),))
    importer = Importer(store.registry, store.contents, anywhere)
    for name, path in config.adapters.items():
        progress(f"importing adapter {name}")
        origin = Origin(datetime.now(UTC), actor=AT_START)
        importer.load(str(path.absolute()), name, replace=True, origin=origin)


def adapter_limits(config: ServerConfig) -> AdapterLimits:
    """Returns the limits on one adapter and on the store."""
    return AdapterLimits(
        max_adapter_bytes=config.max_adapter_bytes,
        max_rank=config.max_adapter_rank,
        max_adapters=config.max_adapters,
        max_versions=config.max_versions,
        max_store_bytes=config.max_store_bytes,
    )


def _signatures(config: ServerConfig) -> SignatureVerifier:
    try:
        policy = SignaturePolicy(config.signature_policy)
        return SignatureVerifier(policy, public_keys=config.signature_keys)
    except (OSError, ValueError, ImportError, AdapterError) as error:
        raise ConfigError(f"signature_keys: {error}") from error


def _sources(
    config: ServerConfig, spec: BaseSpec, limits: AdapterLimits, roots: tuple[Path, ...]
) -> Sources:
    convert = partial(
        convert_gguf_lora, base=spec, limits=limits, heads=spec.heads, kv_heads=spec.kv_heads
    )
    return Sources(
        roots=roots,
        hub_allow=config.hub_allow,
        bucket_allow=config.bucket_allow,
        resolve_templates=config.resolve_from,
        limits=limits,
        convert=convert,
    )

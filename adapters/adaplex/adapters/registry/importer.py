"""Importer: stores adapters from sources, at a load call or at first use, and from merges."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from datetime import UTC, datetime
from pathlib import Path

from adaplex.adapters.checkpoint import write_checkpoint
from adaplex.adapters.compose.merge import MergePlan, merge_checkpoints
from adaplex.adapters.durable_files import full_disk_is_store_full
from adaplex.adapters.errors import AdapterExists
from adaplex.adapters.registry.intake import Committed
from adaplex.adapters.registry.registry import AdapterRegistry
from adaplex.adapters.sources.sources import Fetched, Sources
from adaplex.adapters.storage.content_store import ContentStore
from adaplex.adapters.storage.event import Origin
from adaplex.adapters.storage.lease import Lease
from adaplex.adapters.storage.selector import DEFAULT, LATEST, Selector

FIRST_USE = "first use"
"""Actor of an adapter that was fetched because a request named it."""


class Importer:
    """Fills a scratch folder of the store, then commits it. Thread-safe; calls block."""

    def __init__(self, registry: AdapterRegistry, contents: ContentStore, sources: Sources) -> None:
        self._registry, self._contents, self._sources = registry, contents, sources
        self._intake = registry.intake
        self._lock = threading.Lock()
        self._fetch_locks: dict[str, threading.Lock] = {}

    def load(self, uri: str, name: str, *, replace: bool, origin: Origin) -> Committed:
        """Stores the adapter at a URI. Raises as `Sources.fetch` and `Intake.commit`."""
        self._intake.check_name(name)
        with self._scratch() as folder:
            with full_disk_is_store_full():
                fetched = self._sources.fetch(uri, folder)
            return self._commit(fetched, name, replace=replace, origin=origin)

    def fetch_missing(self, selector: str) -> bool:
        """Fetches an unknown adapter from the templates of --resolve-from. Concurrent callers with
        one name wait for a single fetch.

        Returns True if the name has a version now.
        """
        parts = Selector.parse(selector)
        if parts is None or parts.digest or parts.version:
            return False
        if parts.alias not in ("", DEFAULT, LATEST):
            return False
        with self._exclusive(parts.name):
            if self._registry.names.exists(parts.name):
                return True
            if self._registry.names.is_deleted(parts.name):  # deleted on purpose
                return False
            with self._scratch() as folder:
                fetched = self._sources.find(parts.name, folder)
                if fetched is None:
                    return False
                origin = Origin(datetime.now(UTC), actor=FIRST_USE)
                try:
                    self._commit(fetched, parts.name, replace=False, origin=origin)
                except AdapterExists:  # another process of the store has fetched it
                    return self._registry.names.exists(parts.name)
                return True

    def merge(
        self,
        selectors: Sequence[str],
        plan: MergePlan,
        name: str,
        *,
        replace: bool,
        origin: Origin,
    ) -> Committed:
        """Stores the merge of several adapters as a new one.

        Raises AdapterNotFound, AdapterInvalid, or as `Intake.commit`.
        """
        self._intake.check_name(name)
        leases: list[Lease] = []
        try:
            leases += map(self._registry.resolve, selectors)
            records = [lease.record for lease in leases]
            sources = [self._registry.programs.checkpoint(r.digest) for r in records]
            merged = merge_checkpoints(plan, sources, self._registry.base)
            named = " ".join(
                f"{record.name}@{record.version}:{weight:g}"
                for record, weight in zip(records, plan.weights, strict=True)
            )
            origin = changed(origin, source=f"merge {plan.method} {named}")
            with self._scratch() as folder:
                with full_disk_is_store_full():
                    write_checkpoint(merged, folder)
                return self._intake.commit_folder(
                    folder, name, replace=replace, origin=origin, signed=False
                )
        finally:
            for lease in leases:
                lease.release()

    def _commit(self, fetched: Fetched, name: str, *, replace: bool, origin: Origin) -> Committed:
        origin = changed(origin, source=fetched.uri)
        return self._intake.commit_folder(fetched.directory, name, replace=replace, origin=origin)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        folder = self._contents.scratch_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        """Lets one thread per name into the block."""
        with self._lock:
            lock = self._fetch_locks.setdefault(name, threading.Lock())
        with lock:
            try:
                yield
            finally:
                with self._lock:
                    self._fetch_locks.pop(name, None)

"""Importer: adapters that come from elsewhere than an upload: sources, lazily too, and merges."""

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
from adaplex.adapters.sources import Fetched, Sources
from adaplex.adapters.storage.content_store import ContentStore
from adaplex.adapters.storage.event import Origin
from adaplex.adapters.storage.lease import Lease
from adaplex.adapters.storage.selector import DEFAULT, LATEST, Selector

FIRST_USE = "first use"
"""Who brings an adapter that a request names before anybody loaded it."""


class Importer:
    """Fetches into a folder of the store, then takes in. Thread-safe; calls block."""

    def __init__(self, registry: AdapterRegistry, contents: ContentStore, sources: Sources) -> None:
        self._registry, self._contents, self._sources = registry, contents, sources
        self._intake = registry.intake
        self._lock = threading.Lock()
        self._fetch_locks: dict[str, threading.Lock] = {}

    def load(self, uri: str, name: str, *, replace: bool, origin: Origin) -> Committed:
        """Takes in what a URI names. Raises as `Sources.fetch` and `Intake.commit`."""
        self._intake.check_name(name)
        with self._scratch() as folder:
            with full_disk_is_store_full():
                fetched = self._sources.fetch(uri, folder)
            return self._commit(fetched, name, replace=replace, origin=origin)

    def fetch_missing(self, selector: str) -> bool:
        """Looks for an adapter that is unknown here where the operator said that they are; whether
        it is known now. Of several callers, one fetches and the others wait.
        """
        parts = Selector.parse(selector)
        if parts is None or parts.digest or parts.version:
            return False
        if parts.alias not in ("", DEFAULT, LATEST):
            return False
        with self._exclusive(parts.name):
            if self._registry.names.exists(parts.name):
                return True
            if self._registry.names.is_deleted(parts.name):  # who deleted it does not want it back
                return False
            with self._scratch() as folder:
                fetched = self._sources.find(parts.name, folder)
                if fetched is None:
                    return False
                origin = Origin(datetime.now(UTC), actor=FIRST_USE)
                try:
                    self._commit(fetched, parts.name, replace=False, origin=origin)
                except AdapterExists:  # another process on the same store was faster
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
        """Makes a stored adapter out of stored ones. Raises AdapterNotFound, AdapterInvalid, or as
        `Intake.commit`.
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
        """One thread a name."""
        with self._lock:
            lock = self._fetch_locks.setdefault(name, threading.Lock())
        with lock:
            try:
                yield
            finally:
                with self._lock:
                    self._fetch_locks.pop(name, None)

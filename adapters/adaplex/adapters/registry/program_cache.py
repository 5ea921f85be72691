"""ProgramCache: stored content, lowered for the served base, and its reports."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint
from adaplex.adapters.compose.mix import Mix, mixed_program
from adaplex.adapters.errors import AdapterNotFound, StoreCorrupt
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import BasePolicy
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import AdapterProgram
from adaplex.adapters.program.report import Report, ReportCache, describe
from adaplex.adapters.registry.read_adapter import lower_checkpoint, read_adapter
from adaplex.adapters.storage.content_store import ContentStore

EVICTIONS = 64
"""Attempts to read content that a cache evicts between download and reading."""
MAX_REPORTS = 4096
"""Reports that are cached."""


class ProgramCache:
    """Lowers directories, stored content and mixes of it; caches reports. Thread-safe."""

    def __init__(
        self,
        contents: ContentStore,
        base: BaseSpec,
        *,
        element_bytes: int,
        limits: AdapterLimits,
        base_policy: BasePolicy,
        max_merged_bytes: int | None,
        is_needed: Callable[[str], bool],
    ) -> None:
        """`is_needed` returns True if a name or a lease refers to a digest. `max_merged_bytes` is
        the byte budget of merged weights, None if unknown.
        """
        self._contents, self._base, self._element_bytes = contents, base, element_bytes
        self._limits, self._policy, self._is_needed = limits, base_policy, is_needed
        self._max_merged_bytes = max_merged_bytes
        self._lock = threading.Lock()
        self._reports = ReportCache(MAX_REPORTS)
        self._mixes: dict[str, Mix] = {}

    def read(self, directory: Path) -> AdapterProgram:
        """Lowers an upload, checking limits and base policy.

        Raises AdapterInvalid or AdapterTooLarge.
        """
        return read_adapter(directory, self._base, self._limits, self._policy)

    def program(self, digest: str) -> AdapterProgram:
        """Reads and lowers stored content, or a mix of several. Limits of uploads do not apply.

        Raises StoreCorrupt for damaged content, and for missing content that is needed;
        AdapterNotFound for other missing content; AdapterInvalid if it does not fit the base.
        """
        if (mix := self._mixes.get(digest)) is not None:
            parts = [self.program(part.digest) for part in mix.components]
            return mixed_program(mix, parts, self._base)
        try:
            program = lower_checkpoint(
                self.checkpoint(digest), self._base, self._limits.for_stored()
            )
            if program.digest != digest:
                raise StoreCorrupt(f"{digest}: its files have the digest {program.digest}")
        except StoreCorrupt:
            self.drop_report(digest)
            raise
        return program

    def checkpoint(self, digest: str) -> Checkpoint:
        """Returns stored content as it was uploaded. Raises StoreCorrupt or AdapterNotFound."""
        for _ in range(EVICTIONS):
            folder = self._open(digest)
            if lock := self._contents.lock(digest):
                try:
                    return read_checkpoint(folder, self._limits.for_stored())
                finally:
                    lock.release()
        raise StoreCorrupt(
            f"{digest} was evicted {EVICTIONS} times while it was read; raise --cache-bytes"
        )

    def report(self, digest: str) -> Report:
        """Returns the report of stored content. Raises as `program`.

        A cached report is returned without reading the files, if they exist; they may be damaged.
        """
        with self._lock:
            cached = self._reports.get(digest)
        if cached is not None and self._contents.has(digest):
            return cached
        made = self.describe(self.program(digest))
        if self._is_needed(digest):
            self.cache_report(made)
        return made

    def describe(self, program: AdapterProgram) -> Report:
        """Returns the report of a program, with a warning if merged weights exceed their budget."""
        report = describe(program, self._base, self._element_bytes)
        limit = self._max_merged_bytes
        if limit is None or report.merged_bytes <= limit:
            return report
        budget = f"keeps {limit} bytes of merged weights" if limit else "keeps no merged weights"
        wanted = f"it can only be served merged, in {report.merged_bytes} bytes"
        return replace(report, warnings=(*report.warnings, f"{wanted}, and this server {budget}"))

    def cache_report(self, report: Report) -> None:
        """Caches a report of stored content."""
        with self._lock:
            self._reports.put(report)

    def drop_report(self, digest: str) -> None:
        """Drops the report of content that was removed, replaced or damaged."""
        with self._lock:
            self._reports.drop(digest)

    def add_mix(self, mix: Mix) -> None:
        """Registers a mix, so that `program` finds it by its digest."""
        self._mixes[mix.digest] = mix

    def remove_mix(self, digest: str) -> None:
        """Unregisters a mix. Ignores digests that are not of a registered mix."""
        self._mixes.pop(digest, None)

    def _open(self, digest: str) -> Path:
        """Returns the folder of intact content. Raises StoreCorrupt or AdapterNotFound."""
        for _ in range(EVICTIONS):  # an eviction, or an upload of the same content, may intervene
            try:
                return self._contents.open(digest)
            except AdapterNotFound:
                if not self._is_needed(digest):
                    raise
        raise StoreCorrupt(f"{digest} is missing on the disk; upload it again")

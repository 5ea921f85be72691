"""ProgramCache: stored content, read and lowered for the base that is served."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adaplex.adapters import formats
from adaplex.adapters.checkpoint import Checkpoint, read_checkpoint
from adaplex.adapters.compose.mix import Mix, mixed_program
from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound, Refusal, StoreCorrupt
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import BasePolicy, agreement, mismatches
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.check_prefix import check_prefix
from adaplex.adapters.program.program import AdapterProgram
from adaplex.adapters.program.report import Report, ReportCache, describe
from adaplex.adapters.registry.try_merge import try_merging
from adaplex.adapters.storage.content_store import ContentStore

EVICTIONS = 64
"""Times that a cache may drop content between fetching and reading it."""
MAX_REPORTS = 4096
"""Reports kept in memory."""


class ProgramCache:
    """Lowers directories, stored contents and mixs of them. Thread-safe."""

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
        """`is_needed` tells whether content must be there, as a name or a lease holds it;
        `max_merged_bytes` is what merged weights may take, if that is known.
        """
        self._contents, self._base, self._element_bytes = contents, base, element_bytes
        self._limits, self._policy, self._is_needed = limits, base_policy, is_needed
        self._max_merged_bytes = max_merged_bytes
        self._lock = threading.Lock()
        self._reports = ReportCache(MAX_REPORTS)
        self._mixes: dict[str, Mix] = {}

    def read(self, directory: Path) -> AdapterProgram:
        """Lowers an upload, which must keep to the limits and the policy about its base.

        Raises AdapterInvalid or AdapterTooLarge.
        """
        return read_adapter(directory, self._base, self._limits, self._policy)

    def program(self, digest: str) -> AdapterProgram:
        """Reads and lowers stored content, whatever the limits for uploads are by now, or combines
        several.

        Raises StoreCorrupt, also for content that is named or leased but gone from the disk,
        AdapterNotFound, or AdapterInvalid when it does not fit the base that is served now.
        """
        if (mix := self._mixes.get(digest)) is not None:
            parts = [self.program(part.digest) for part in mix.components]
            return mixed_program(mix, parts, self._base)
        try:
            program = _lowered(self.checkpoint(digest), self._base, self._limits.for_stored())
            if program.digest != digest:
                raise StoreCorrupt(f"{digest} holds the content of {program.digest}")
        except StoreCorrupt:
            self.drop_report(digest)
            raise
        return program

    def checkpoint(self, digest: str) -> Checkpoint:
        """Stored content as it was sent. Raises StoreCorrupt or AdapterNotFound."""
        for _ in range(EVICTIONS):
            folder = self._open(digest)
            if lock := self._contents.lock(digest):
                try:
                    return read_checkpoint(folder, self._limits.for_stored())
                finally:
                    lock.release()
        raise StoreCorrupt(f"{digest} does not stay on the disk long enough to be read")

    def report(self, digest: str) -> Report:
        """The report of stored content. Raises as `program`.

        A report made before is returned without reading the files again: it says that they are
        there, not that they are intact.
        """
        with self._lock:
            kept = self._reports.get(digest)
        if kept is not None and self._contents.has(digest):
            return kept
        made = self.describe(self.program(digest))
        if self._is_needed(digest):
            self.cache_report(made)
        return made

    def describe(self, program: AdapterProgram) -> Report:
        """The report of a lowered adapter."""
        report = describe(program, self._base, self._element_bytes)
        most = self._max_merged_bytes
        if most is None or report.merged_bytes <= most:
            return report
        room = f"keeps {most} bytes of merged weights" if most else "keeps no merged weights"
        wanted = f"it can only be served merged, in {report.merged_bytes} bytes"
        return replace(report, warnings=(*report.warnings, f"{wanted}, and this server {room}"))

    def cache_report(self, report: Report) -> None:
        """Keeps a report of content that is stored."""
        with self._lock:
            self._reports.put(report)

    def drop_report(self, digest: str) -> None:
        """The content is gone, or not what it was."""
        with self._lock:
            self._reports.drop(digest)

    def add_mix(self, mix: Mix) -> None:
        """From now on `program` knows the mix's digest."""
        self._mixes[mix.digest] = mix

    def remove_mix(self, digest: str) -> None:
        """Forgets a mix that nobody leases."""
        self._mixes.pop(digest, None)

    def _open(self, digest: str) -> Path:
        """The folder of intact content. Raises StoreCorrupt or AdapterNotFound."""
        for _ in range(
            EVICTIONS
        ):  # an upload of the same content, or an eviction, may come between
            try:
                return self._contents.open(digest)
            except AdapterNotFound:
                if not self._is_needed(digest):
                    raise
        raise StoreCorrupt(f"{digest} is gone from the disk")


def read_adapter(
    directory: Path, base: BaseSpec, limits: AdapterLimits, policy: BasePolicy
) -> AdapterProgram:
    """Lowers an adapter directory, and tries what can only be merged.

    Raises AdapterInvalid or AdapterTooLarge.
    """
    checkpoint = read_checkpoint(directory, limits)
    program = _lowered(checkpoint, base, limits)
    try_merging(program, base)
    if policy is BasePolicy.OFF:
        return program
    found = mismatches(checkpoint.config, base)
    if found and policy is BasePolicy.REFUSE:
        raise AdapterInvalid([Refusal(*pair) for pair in found])
    warnings = tuple(f"{where} {how}" for where, how in found)
    return replace(program, warnings=(*program.warnings, *warnings))


def _lowered(checkpoint: Checkpoint, base: BaseSpec, limits: AdapterLimits) -> AdapterProgram:
    program = formats.lower(checkpoint, base, limits)
    check_prefix(program, base)
    if mismatches(checkpoint.config, base):
        return program
    return replace(program, notes=(*program.notes, agreement(checkpoint.config)))

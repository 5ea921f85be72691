"""Intake: the only code that adds adapters, for uploads, imports and merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaplex.adapters.durable_files import full_disk_is_store_full
from adaplex.adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterTooLarge,
    Refusal,
    StoreFull,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.program import ELEMENT_BYTES, AdapterProgram
from adaplex.adapters.program.report import Report
from adaplex.adapters.registry.program_cache import ProgramCache
from adaplex.adapters.sources.signatures import SignatureVerifier, Verdict
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.adapters.storage.catalog import Catalog
from adaplex.adapters.storage.content_store import ContentStore, is_damaged
from adaplex.adapters.storage.event import Origin
from adaplex.adapters.storage.garbage_collector import GarbageCollector
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.selector import NAME
from adaplex.adapters.storage.staging import FileSpec, Staging, check_files
from adaplex.adapters.storage.version import Version
from adaplex.adapters.text_files import text_warnings


@dataclass(frozen=True)
class Committed:
    """A stored upload. `created` is False if the name's newest version had this content before."""

    record: AdapterRecord
    report: Report
    created: bool


@dataclass(frozen=True)
class Capacity:
    """Limits of this server that adapters are checked against."""

    element_bytes: int
    """Bytes per element of the compute dtype."""
    limits: AdapterLimits
    max_packed_bytes: int | None = None
    """Bytes of the arena; None for no limit."""
    max_merged_bytes: int | None = None
    """Byte budget of merged weights; None for no limit."""


class Intake:
    """Checks and stores adapters. Thread-safe; calls block on the disk."""

    def __init__(
        self,
        *,
        base: BaseSpec,
        capacity: Capacity,
        contents: ContentStore,
        catalog: Catalog,
        programs: ProgramCache,
        garbage: GarbageCollector,
        signatures: SignatureVerifier,
    ) -> None:
        self._base, self._capacity, self._limits = base, capacity, capacity.limits
        self._contents, self._catalog, self._programs = contents, catalog, programs
        self._garbage, self._signatures = garbage, signatures

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """Returns an empty staging folder for announced files, after checking them.

        Raises AdapterInvalid, AdapterTooLarge or StoreFull.
        """
        check_files(files, self._limits)
        return self._contents.stage(files)

    def check(self, staging: Staging) -> Report:
        """Returns the report that `commit` would, or one with every refusal. Stores nothing.

        Raises StoreFull if the disk is full.
        """
        try:
            staging.verify()
            self._signatures.verify(staging.directory)
            return self._programs.describe(self._read(staging.directory))
        except AdapterInvalid as error:
            return Report(refusals=error.refusals)
        except AdapterTooLarge as error:
            return Report(refusals=(Refusal(error.field, str(error)),))

    @full_disk_is_store_full()
    def commit(
        self,
        staging: Staging,
        name: str,
        *,
        replace: bool,
        origin: Origin,
        signed: bool = True,
        warnings: Sequence[str] = (),
    ) -> Committed:
        """Stores an upload under a name, durably: once this returns, it survives a kill.

        A name with other content gets a new version if `replace`, else AdapterExists is raised.
        Stored content that is damaged or missing is repaired. `signed` is False for adapters that
        this server made itself, whose signature is not checked; `warnings` are added to its report.

        Raises AdapterInvalid, AdapterExists, AdapterTooLarge or StoreFull.
        """
        self.check_name(name)
        staging.verify()
        verdict = self._signatures.verify(staging.directory) if signed else Verdict()
        program = self._read(staging.directory)
        if verdict.problem:
            program = _warned(program, f"model.sig: {verdict.problem}")
        program = _warned(program, *warnings)
        report = self._programs.describe(program)
        version = self._version(program, staging, origin, verdict.signer)
        damaged = is_damaged(self._contents, program.digest)  # slow, so outside the transaction
        added = stored = False

        def change(entry: NameRecord | None) -> NameRecord:
            nonlocal added, stored
            entry = entry or NameRecord(name)
            added = not (entry.alive and entry.latest.digest == version.digest)
            if added and entry.alive and not replace:
                raise AdapterExists(
                    f"{name} has {entry.latest.digest} already; replace it, or choose another name",
                    field="name",
                )
            if added:
                self._check_quota(entry, version)
            grown = entry.add(version, max_versions=self._limits.max_versions) if added else entry
            stored |= self._store(staging, version.digest, damaged=damaged)
            return grown

        try:
            entry = self._catalog.update(name, change)
        except BaseException:  # no name refers to the content now
            self._garbage.discard_if_unused(version.digest)
            raise
        if stored:
            self._programs.cache_report(report)
        record = entry.latest.record(name, self._capacity.element_bytes)
        return Committed(record, report, created=added)

    def commit_folder(
        self,
        directory: Path,
        name: str,
        *,
        replace: bool,
        origin: Origin,
        signed: bool = True,
    ) -> Committed:
        """Stores a folder's files under a name, and removes the folder. Raises as `commit`."""
        self.check_name(name)
        warnings = tuple(text_warnings(directory, self._base))
        with Staging.adopt(directory, self._limits) as staging:
            return self.commit(
                staging, name, replace=replace, origin=origin, signed=signed, warnings=warnings
            )

    def check_name(self, name: str) -> None:
        """Raises AdapterInvalid for an invalid name, AdapterExists for the base's."""
        if not NAME.fullmatch(name):
            raise AdapterInvalid.because("name", f"{name!r:.200} does not match ^{NAME.pattern}$")
        if name == self._base.name:
            raise AdapterExists(
                f"{name} is the name of the base model; choose another", field="name"
            )

    def _read(self, directory: Path) -> AdapterProgram:
        """Lowers an upload. Raises AdapterInvalid, or AdapterTooLarge also for the arena."""
        program = self._programs.read(directory)
        packed = program.packed_bytes(self._capacity.element_bytes)
        limit = self._capacity.max_packed_bytes
        if limit is not None and packed > limit and not program.traits.merged_only:
            raise AdapterTooLarge(
                f"the adapter takes {packed} bytes in memory, the arena has {limit}",
                field="arena_bytes",
            )
        return program

    def _version(
        self, program: AdapterProgram, staging: Staging, origin: Origin, signer: str
    ) -> Version:
        """Returns the version for the catalog, which numbers it."""
        return Version(
            number=0,
            digest=program.digest,
            family=program.family,
            traits=program.traits,
            stored_bytes=staging.size,
            packed_bytes={n: program.packed_bytes(n) for n in ELEMENT_BYTES},
            created=origin.time,
            actor=origin.actor,
            source=origin.source,
            base=self._base.fingerprint,
            signer=signer,
            warnings=program.warnings,
        )

    def _store(self, staging: Staging, digest: str, *, damaged: bool) -> bool:
        """Stores content that is absent, or was `damaged` and still is.

        Returns True if these files were stored.
        """
        if damaged and is_damaged(self._contents, digest):
            self._contents.remove(digest, damaged=True)
        return self._contents.add(staging, digest)

    def _check_quota(self, entry: NameRecord, version: Version) -> None:
        limits, usage = self._limits, self._catalog.usage()
        if not entry.alive and usage.names >= limits.max_adapters:
            raise StoreFull(
                f"{entry.name} would be adapter {usage.names + 1}, "
                f"the limit is {limits.max_adapters}; delete some",
                field="max_adapters",
            )
        size, stored = version.stored_bytes, usage.stored_bytes
        full = stored + size > limits.max_store_bytes
        if full and not self._catalog.is_referenced(version.digest):
            raise StoreFull(
                f"{size} bytes and {stored} stored exceed the limit of {limits.max_store_bytes}; "
                "delete adapters",
                field="max_store_bytes",
            )


def _warned(program: AdapterProgram, *warnings: str) -> AdapterProgram:
    return replace(program, warnings=(*program.warnings, *warnings))

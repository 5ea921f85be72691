"""Intake: the only way into the store, for uploads, imports and merges alike."""

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


@dataclass(frozen=True)
class Committed:
    """An upload that is in. `created` is false when the name pointed to this content before."""

    record: AdapterRecord
    report: Report
    created: bool


@dataclass(frozen=True)
class Capacity:
    """What adapters are checked against beside the base."""

    element_bytes: int
    """Of the compute dtype."""
    limits: AdapterLimits
    max_packed_bytes: int | None = None
    """Bytes of the arena."""
    max_merged_bytes: int | None = None
    """Bytes of merged weights."""


class Intake:
    """Checks adapters and takes them in. Thread-safe; calls block on the disk."""

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
        """Room for an upload. Raises AdapterInvalid, AdapterTooLarge or StoreFull before anything
        is taken.
        """
        check_files(files, self._limits)
        return self._contents.stage(files)

    def check(self, staging: Staging) -> Report:
        """What a commit would say; a checkpoint that cannot be served has refusals.

        Raises StoreFull when the disk is.
        """
        try:
            staging.verify()
            self._signatures.verify(staging.directory)
            return self._programs.describe(self._admit(staging.directory))
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
    ) -> Committed:
        """Takes an upload in under a name. `signed` is false for what this server made itself.

        Raises AdapterInvalid, AdapterExists, AdapterTooLarge or StoreFull.
        When it returns, the adapter survives a kill. A taken name gets a new version with
        `replace`, and is AdapterExists without, unless its content is the same. Content that is
        stored, but damaged or lost, is repaired.
        """
        self.check_name(name)
        staging.verify()
        verdict = self._signatures.verify(staging.directory) if signed else Verdict()
        program = self._admit(staging.directory)
        if verdict.problem:
            program = _warned(program, f"model.sig: {verdict.problem}")
        report = self._programs.describe(program)
        version = self._version(program, staging, origin, verdict.signer)
        damaged = is_damaged(self._contents, program.digest)  # takes long, so before the change
        added = kept = False

        def change(entry: NameRecord | None) -> NameRecord:
            nonlocal added, kept
            entry = entry or NameRecord(name)
            added = not (entry.alive and entry.latest.digest == version.digest)
            if added and entry.alive and not replace:
                raise AdapterExists(f"{name} is taken by {entry.latest.digest}", field="name")
            if added:
                self._check_quota(entry, version)
            grown = entry.add(version, max_versions=self._limits.max_versions) if added else entry
            kept |= self._store(staging, version.digest, damaged=damaged)
            return grown

        try:
            entry = self._catalog.update(name, change)
        except BaseException:  # content that nobody came to name goes again
            self._garbage.discard_if_unused(version.digest)
            raise
        if kept:
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
        """Takes in a folder that is ours alone. Raises as `commit`; the folder is gone then."""
        self.check_name(name)
        with Staging.adopt(directory, self._limits) as staging:
            return self.commit(staging, name, replace=replace, origin=origin, signed=signed)

    def check_name(self, name: str) -> None:
        """Raises AdapterInvalid for a bad name, AdapterExists for the base's."""
        if not NAME.fullmatch(name):
            raise AdapterInvalid.because("name", f"{name!r:.200} does not match ^{NAME.pattern}$")
        if name == self._base.name:
            raise AdapterExists(f"{name} is the base model", field="name")

    def _admit(self, directory: Path) -> AdapterProgram:
        """Lowers an upload that keeps to the limits."""
        program = self._programs.read(directory)
        packed = program.packed_bytes(self._capacity.element_bytes)
        most = self._capacity.max_packed_bytes
        if most is not None and packed > most and not program.traits.merged_only:
            raise AdapterTooLarge(
                f"the adapter takes {packed} bytes in memory, the arena has {most}",
                field="arena_bytes",
            )
        return program

    def _version(
        self, program: AdapterProgram, staging: Staging, origin: Origin, signer: str
    ) -> Version:
        """What the catalog will say; its number comes with the entry."""
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
        """Stores what is not stored yet, and replaces content that was damaged and still is.
        Whether these files are those that are stored now.
        """
        if damaged and is_damaged(self._contents, digest):
            self._contents.remove(digest, damaged=True)
        return self._contents.add(staging, digest)

    def _check_quota(self, entry: NameRecord, version: Version) -> None:
        limits, usage = self._limits, self._catalog.usage()
        if not entry.alive and usage.names >= limits.max_adapters:
            raise StoreFull(
                f"{entry.name} would be one more than the {limits.max_adapters} adapters allowed",
                field="max_adapters",
            )
        size, stored = version.stored_bytes, usage.stored_bytes
        if stored + size > limits.max_store_bytes and not self._catalog.is_referenced(
            version.digest
        ):
            raise StoreFull(
                f"{size} bytes beside {stored} stored exceed {limits.max_store_bytes}",
                field="max_store_bytes",
            )


def _warned(program: AdapterProgram, warning: str) -> AdapterProgram:
    return replace(program, warnings=(*program.warnings, warning))

"""AdapterRegistry: the one door to adapters: catalog, files, leases, lowering."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from adaplex.adapters import formats
from adaplex.adapters.catalog import ELEMENT_BYTES, AdapterRecord, Catalog
from adaplex.adapters.checkpoint import FILES, check_files_there, read_checkpoint
from adaplex.adapters.digest import PATTERN as DIGEST
from adaplex.adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    Refusal,
    StoreCorrupt,
    StoreFull,
)
from adaplex.adapters.files import file_sha256, full_disk_is_store_full
from adaplex.adapters.lease import Lease
from adaplex.adapters.limits import MIB, AdapterLimits
from adaplex.adapters.program import AdapterProgram, BaseSpec
from adaplex.adapters.report import Report, ReportCache, describe
from adaplex.adapters.staging import FileSpec, Staging, check_files, check_total
from adaplex.adapters.store import AdapterStore

__all__ = [
    "AdapterLimits",
    "AdapterRecord",
    "AdapterRegistry",
    "Committed",
    "Deleted",
    "FileSpec",
    "Lease",
    "Staging",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SELECTOR = re.compile(rf"(?P<name>{NAME.pattern})(@(?P<version>[1-9][0-9]{{0,17}}))?")
MAX_REPORTS = 1024
"""Reports kept in memory."""


@dataclass(frozen=True)
class Committed:
    """An upload that is in. `created` is false when the name pointed to this content before."""

    record: AdapterRecord
    report: Report
    created: bool


@dataclass(frozen=True)
class Deleted:
    """A name that is gone: how many versions, and the contents that no name points to any more."""

    versions: int
    digests: tuple[str, ...]


class AdapterRegistry:
    """Uploads, names and leases. Thread-safe; calls block on the disk."""

    def __init__(
        self,
        root: Path,
        base: BaseSpec,
        *,
        element_bytes: int,
        limits: AdapterLimits | None = None,
        max_packed_bytes: int | None = None,
    ) -> None:
        """`element_bytes` is that of the compute dtype, `max_packed_bytes` that of the arena."""
        root.mkdir(parents=True, exist_ok=True)
        self._base = base
        self._element_bytes = element_bytes
        self._limits = limits or AdapterLimits()
        self._max_packed_bytes = max_packed_bytes
        self._lock = threading.RLock()
        self._store = AdapterStore(root)
        self._catalog = Catalog(root / "catalog.sqlite3", element_bytes=element_bytes)
        self._leases: Counter[str] = Counter()
        self._reports = ReportCache(MAX_REPORTS)
        for orphan in self._store.digests() - self._catalog.digests():
            self._store.remove(orphan)

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """Room for an upload. Raises AdapterInvalid, AdapterTooLarge or StoreFull before anything
        is taken.
        """
        check_files(files, self._limits)
        return self._store.stage(files)

    def check(self, staging: Staging) -> Report:
        """What a commit would say; a checkpoint that cannot be served has refusals.

        Raises StoreFull when the disk is.
        """
        try:
            staging.verify()
            return describe(self._admit(staging.directory), self._base, self._element_bytes)
        except AdapterInvalid as error:
            return Report(refusals=error.refusals)
        except AdapterTooLarge as error:
            return Report(refusals=(Refusal(error.field, str(error)),))

    @full_disk_is_store_full()
    def commit(self, staging: Staging, name: str, *, replace: bool) -> Committed:
        """Takes an upload in under a name.

        Raises AdapterInvalid, AdapterExists, AdapterTooLarge or StoreFull.
        When it returns, the adapter survives a kill. A taken name gets a new version with
        `replace`, and is AdapterExists without, unless its content is the same. Content that is
        stored, but damaged or lost, is repaired.
        """
        self.check_name(name)
        staging.verify()
        program = self._admit(staging.directory)
        report = describe(program, self._base, self._element_bytes)
        damaged = self._store.is_damaged(program.digest)  # takes long, so without the lock
        with self._lock:
            current = self._catalog.latest(name)
            if current is not None and current.digest == program.digest:
                self._keep(staging, report, damaged=damaged)
                return Committed(current, report, created=False)
            if current is not None and not replace:
                raise AdapterExists(f"{name} is taken by {current.digest}", field="name")
            self._check_quota(name, program.digest, staging.size, is_new=current is None)
            record = AdapterRecord(
                name=name,
                version=0,
                digest=program.digest,
                family=program.family,
                modules=len(program.modules),
                max_rank=program.max_rank,
                stored_bytes=staging.size,
                packed_bytes=report.packed_bytes,
                created=datetime.now(UTC),
            )
            try:
                self._keep(staging, report, damaged=damaged)
                packed = {n: program.packed_bytes(n) for n in ELEMENT_BYTES}
                record = self._catalog.add(record, packed)
            except BaseException:  # content that nobody came to name goes again
                if not self._catalog.holds(program.digest):
                    self._collect(program.digest)
                raise
        return Committed(record, report, created=True)

    def import_directory(
        self, path: Path, name: str, *, replace: bool, roots: Sequence[Path] = ()
    ) -> Committed:
        """Copies an adapter directory in. Raises as `commit`.

        The real paths of its files must lie under one of `roots`, by default under `path`.
        """
        self.check_name(name)
        try:
            allowed = [root.resolve() for root in roots or [path]]
            sources = [(path / file).resolve() for file in FILES]
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
            raise AdapterInvalid.because("path", f"cannot be followed: {error}") from None
        for source, file in zip(sources, FILES, strict=True):
            if not any(source.is_relative_to(root) for root in allowed):
                raise AdapterInvalid.because(file, "leads out of the allowed folders")
        check_files_there(path)
        total = sum(source.stat().st_size for source in sources)
        check_total(total, self._limits)
        try:
            files = [_spec(file, source) for file, source in zip(FILES, sources, strict=True)]
            with self.stage(files) as staging:
                for index, source in enumerate(sources):
                    with source.open("rb") as stream:
                        while data := stream.read(MIB):
                            staging.write(index, stream.tell() - len(data), data)
                return self.commit(staging, name, replace=replace)
        except PermissionError as error:
            raise AdapterInvalid.because("path", f"cannot be read: {error.strerror}") from None

    def check_name(self, name: str) -> None:
        """Raises AdapterInvalid for a bad name, AdapterExists for the base's."""
        if not NAME.fullmatch(name):
            raise AdapterInvalid.because("name", f"{name!r:.200} does not match ^{NAME.pattern}$")
        if name == self._base.name:
            raise AdapterExists(f"{name} is the base model", field="name")

    def resolve(self, selector: str) -> Lease:
        """Binds `name`, `name@version` or `sha256:<hex>` to its content, and holds the content
        until the lease is released. Raises AdapterNotFound.
        """
        with self._lock:
            record = self.get(selector)
            self._leases[record.digest] += 1
        return Lease(record, partial(self.release, record.digest))

    def get(self, selector: str) -> AdapterRecord:
        """The record that a selector names. Raises AdapterNotFound."""
        record = None
        with self._lock:
            if DIGEST.fullmatch(selector):
                record = self._catalog.by_digest(selector)
            elif match := SELECTOR.fullmatch(selector):
                name, version = match["name"], match["version"]
                record = (
                    self._catalog.version(name, int(version))
                    if version
                    else self._catalog.latest(name)
                )
        if record is None:
            raise AdapterNotFound(f"no adapter {selector!r:.200}")
        return record

    def list(self, *, limit: int, after: str = "") -> list[AdapterRecord]:
        """The newest version of each name beyond `after`, by name."""
        with self._lock:
            return self._catalog.page(limit, after)

    def count(self) -> int:
        """Names."""
        with self._lock:
            return self._catalog.count()

    @full_disk_is_store_full()
    def delete(self, name: str) -> Deleted:
        """Forgets a name. Content goes when neither a name nor a lease holds it.

        Raises AdapterNotFound, or StoreFull when the disk has no room to note it.
        """
        with self._lock:
            digests = self._catalog.delete(name) if NAME.fullmatch(name) else []
            if not digests:
                raise AdapterNotFound(f"no adapter {name!r:.200}")
            gone = tuple(set(digests) - self._catalog.digests())
            for digest in gone:
                self._collect(digest)
        return Deleted(len(digests), gone)

    def program(self, digest: str) -> AdapterProgram:
        """Reads and lowers stored content, whatever the limits for uploads are by now.

        Raises StoreCorrupt, also for content that is named or leased but gone from the disk,
        AdapterNotFound, or AdapterInvalid when it does not fit the base that is served now.
        """
        try:
            program = self._lower(self._open(digest), self._limits.for_stored())
            if program.digest != digest:
                raise StoreCorrupt(f"{digest} holds the content of {program.digest}")
        except StoreCorrupt:
            with self._lock:
                self._reports.drop(digest)
            raise
        return program

    def report(self, digest: str) -> Report:
        """The report of stored content. Raises as `program`.

        A report made before is returned without reading the files again: it says that they are
        there, not that they are intact.
        """
        with self._lock:
            kept = self._reports.get(digest)
            if kept is not None and self._store.has(digest):
                return kept
        made = describe(self.program(digest), self._base, self._element_bytes)
        with self._lock:
            if self._reports.get(digest) is None and self._is_wanted(digest):
                self._reports.put(made)
        return made

    def check_integrity(self) -> None:
        """Asserts that catalog, files and leases agree."""
        with self._lock:
            self._catalog.check_integrity()
            named, stored = self._catalog.digests(), self._store.digests()
            assert named <= stored, f"named but not stored: {named - stored}"
            assert stored - named <= set(self._leases), "stored, but neither named nor leased"
            assert all(count > 0 for count in self._leases.values())

    def close(self) -> None:
        """Closes the catalog."""
        with self._lock:
            self._catalog.close()
            self._store.close()

    def release(self, digest: str) -> bool:
        """Gives one lease back; see Lease. Whether that removed the content, as it was the last
        and no name held it any more: it can be dropped from memory, too. False without a lease.
        """
        with self._lock:
            if digest not in self._leases:
                return False
            self._leases[digest] -= 1
            if self._leases[digest]:
                return False
            del self._leases[digest]
            if self._catalog.holds(digest):
                return False
            self._collect(digest)
            return True

    def _keep(self, staging: Staging, report: Report, *, damaged: bool) -> None:
        """Stores what is not stored yet, and replaces content that was damaged and still is."""
        digest = report.digest
        if damaged and self._store.is_damaged(digest):
            self._store.remove(digest)
        if self._store.take(staging, digest):
            self._reports.put(report)

    def _collect(self, digest: str) -> None:
        if digest not in self._leases:
            self._reports.drop(digest)
            self._store.remove(digest)

    def _is_wanted(self, digest: str) -> bool:
        """Whether content must be in the store."""
        return digest in self._leases or self._catalog.holds(digest)

    def _open(self, digest: str) -> Path:
        """The folder of intact content. Raises StoreCorrupt or AdapterNotFound."""
        try:
            return self._store.open(digest)
        except AdapterNotFound:
            with self._lock:  # no upload or deletion is half done now
                if not self._is_wanted(digest):
                    raise
                if not self._store.has(digest):
                    raise StoreCorrupt(f"{digest} is gone from the disk") from None
                return self._store.open(digest)

    def _lower(self, directory: Path, limits: AdapterLimits) -> AdapterProgram:
        """Reads and lowers a directory."""
        return formats.lower(read_checkpoint(directory, limits), self._base, limits)

    def _admit(self, directory: Path) -> AdapterProgram:
        """Lowers an upload that keeps to the limits."""
        program = self._lower(directory, self._limits)
        packed = program.packed_bytes(self._element_bytes)
        if self._max_packed_bytes is not None and packed > self._max_packed_bytes:
            raise AdapterTooLarge(
                f"the adapter takes {packed} bytes in memory, the arena has "
                f"{self._max_packed_bytes}",
                field="arena_bytes",
            )
        return program

    def _check_quota(self, name: str, digest: str, size: int, *, is_new: bool) -> None:
        limits = self._limits
        if is_new and self._catalog.count() >= limits.max_adapters:
            raise StoreFull(
                f"{name} would be one more than the {limits.max_adapters} adapters allowed",
                field="max_adapters",
            )
        stored = self._catalog.stored_bytes()
        if stored + size > limits.max_store_bytes and not self._catalog.holds(digest):
            raise StoreFull(
                f"{size} bytes beside {stored} stored exceed {limits.max_store_bytes}",
                field="max_store_bytes",
            )


def _spec(name: str, source: Path) -> FileSpec:
    """What an upload of this file would announce."""
    return FileSpec(name, source.stat().st_size, file_sha256(source))

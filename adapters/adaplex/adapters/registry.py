"""AdapterRegistry: the one door to adapters: catalog, files, leases, lowering."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

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
from adaplex.adapters.files import file_sha256
from adaplex.adapters.limits import MIB, AdapterLimits
from adaplex.adapters.program import AdapterProgram, BaseSpec
from adaplex.adapters.report import Report, describe
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
        for orphan in self._store.digests() - self._catalog.digests():
            self._store.remove(orphan)

    def stage(self, files: Sequence[FileSpec]) -> Staging:
        """Room for an upload. Raises AdapterInvalid or AdapterTooLarge before anything is taken."""
        check_files(files, self._limits)
        return self._store.stage(files)

    def check(self, staging: Staging) -> Report:
        """What a commit would say; a checkpoint that cannot be served has refusals."""
        try:
            staging.verify()
            return describe(self._lower(staging.directory), self._base, self._element_bytes)
        except AdapterInvalid as error:
            return Report(refusals=error.refusals)
        except AdapterTooLarge as error:
            return Report(refusals=(Refusal(error.field, str(error)),))

    def commit(self, staging: Staging, name: str, *, replace: bool) -> Committed:
        """Takes an upload in under a name.

        Raises AdapterInvalid, AdapterExists, AdapterTooLarge or StoreFull.
        When it returns, the adapter survives a kill. A taken name gets a new version with
        `replace`, and is AdapterExists without, unless its content is the same.
        """
        self.check_name(name)
        staging.verify()
        program = self._lower(staging.directory)
        report = describe(program, self._base, self._element_bytes)
        damaged = self._store.is_damaged(program.digest)
        with self._lock:
            if damaged:
                self._store.remove(program.digest)
                self._store.take(staging, program.digest)
            current = self._catalog.latest(name)
            if current is not None and current.digest == program.digest:
                staging.discard()
                return Committed(current, report, created=False)
            if current is not None and not replace:
                raise AdapterExists(f"{name} is taken by {current.digest}", field="name")
            self._check_quota(name, program.digest, staging.size, is_new=current is None)
            self._store.take(staging, program.digest)
            record = self._add(
                AdapterRecord(
                    name=name,
                    version=0,
                    digest=program.digest,
                    family=program.family,
                    modules=len(program.modules),
                    max_rank=program.max_rank,
                    stored_bytes=staging.size,
                    packed_bytes=report.packed_bytes,
                    created=datetime.now(UTC),
                ),
                {n: program.packed_bytes(n) for n in ELEMENT_BYTES},
            )
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
        return Lease(self, record)

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

    def delete(self, name: str) -> Deleted:
        """Forgets a name. Content goes when neither a name nor a lease holds it.

        Raises AdapterNotFound.
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
        """Reads and lowers stored content. Raises StoreCorrupt, AdapterNotFound, or AdapterInvalid
        when it does not fit the base that is served now.
        """
        program = self._lower(self._store.open(digest))
        if program.digest != digest:
            raise StoreCorrupt(f"{digest} holds the content of {program.digest}")
        return program

    def report(self, digest: str) -> Report:
        """The report of stored content. Raises as `program`."""
        return describe(self.program(digest), self._base, self._element_bytes)

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

    def release(self, digest: str) -> None:
        """Gives one lease back; see Lease."""
        with self._lock:
            self._leases[digest] -= 1
            if not self._leases[digest]:
                del self._leases[digest]
                if not self._catalog.holds(digest):
                    self._collect(digest)

    def _add(self, record: AdapterRecord, packed: Mapping[int, int]) -> AdapterRecord:
        """Names content that the store has taken; content that nobody came to name goes again."""
        try:
            return self._catalog.add(record, packed)
        except BaseException:
            if not self._catalog.holds(record.digest):
                self._collect(record.digest)
            raise

    def _collect(self, digest: str) -> None:
        if digest not in self._leases:
            self._store.remove(digest)

    def _lower(self, directory: Path) -> AdapterProgram:
        """Reads and lowers a directory within the limits."""
        checkpoint = read_checkpoint(directory, self._limits)
        program = formats.lower(checkpoint, self._base, self._limits)
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


class Lease:
    """Holds the content of one record. Release it once the request has left the engine."""

    def __init__(self, registry: AdapterRegistry, record: AdapterRecord) -> None:
        self.record = record
        self._registry = registry
        self._held = threading.Lock()
        """Free while the lease is held: only one release can take it."""

    def release(self) -> None:
        """Gives the content back. Idempotent."""
        if self._held.acquire(blocking=False):
            self._registry.release(self.record.digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

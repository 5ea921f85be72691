"""AdapterRegistry: the one door to adapters: binds requests to content, and holds its parts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from adaplex.adapters.compose.mix import Component, Mix, check_mix, mix_packed_bytes, mix_ranks
from adaplex.adapters.errors import (
    AdapterNotFound,
    AdapterTooLarge,
    BaseMismatch,
    SourceUnavailable,
)
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.program.base_match import BasePolicy, other_base
from adaplex.adapters.program.base_spec import BaseSpec
from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.registry.intake import Capacity, Intake
from adaplex.adapters.registry.names import Names
from adaplex.adapters.registry.program_cache import ProgramCache
from adaplex.adapters.sources.signatures import SignaturePolicy, SignatureVerifier
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.adapters.storage.catalog import Catalog
from adaplex.adapters.storage.content_store import ContentStore
from adaplex.adapters.storage.folder_content import FolderContent
from adaplex.adapters.storage.garbage_collector import GarbageCollector
from adaplex.adapters.storage.lease import Lease, LeasedAdapter, Leases
from adaplex.adapters.storage.sqlite_catalog import SqliteCatalog

RACES = 8
"""Times that a name may come to point elsewhere while it is being resolved."""


class AdapterRegistry:
    """Binds requests. `names` says what names stand for, `intake` takes adapters in, `programs`
    lowers them, `garbage` collects. Thread-safe; calls block on the disk.
    """

    def __init__(
        self,
        contents: ContentStore,
        catalog: Catalog,
        base: BaseSpec,
        *,
        capacity: Capacity,
        base_policy: BasePolicy = BasePolicy.WARN,
        signatures: SignatureVerifier | None = None,
    ) -> None:
        self._contents, self._catalog = contents, catalog
        self.base, self._policy, self._capacity = base, base_policy, capacity
        self._leases = Leases(contents)
        self._mixing = threading.Lock()
        self.programs = ProgramCache(
            contents,
            base,
            element_bytes=capacity.element_bytes,
            limits=capacity.limits,
            base_policy=base_policy,
            max_merged_bytes=capacity.max_merged_bytes,
            is_needed=lambda digest: digest in self._leases or catalog.is_referenced(digest),
        )
        self.garbage = GarbageCollector(
            catalog,
            contents,
            is_leased=lambda digest: digest in self._leases,
            on_removed=self.programs.drop_report,
        )
        self.names = Names(catalog, self.garbage, element_bytes=capacity.element_bytes)
        self.intake = Intake(
            base=base,
            capacity=capacity,
            contents=contents,
            catalog=catalog,
            programs=self.programs,
            garbage=self.garbage,
            signatures=signatures or SignatureVerifier(SignaturePolicy.OFF),
        )
        with suppress(SourceUnavailable):  # the next sweep may reach it
            self.garbage.sweep()

    @classmethod
    def local(
        cls,
        root: Path,
        base: BaseSpec,
        *,
        element_bytes: int,
        limits: AdapterLimits | None = None,
        max_packed_bytes: int | None = None,
        max_merged_bytes: int | None = None,
        base_policy: BasePolicy = BasePolicy.WARN,
        signatures: SignatureVerifier | None = None,
    ) -> AdapterRegistry:
        """A registry in a folder of this machine, which several processes may open.

        `element_bytes` is that of the compute dtype, `max_packed_bytes` that of the arena,
        `max_merged_bytes` that of merged weights.
        """
        root.mkdir(parents=True, exist_ok=True)
        return cls(
            FolderContent(root),
            SqliteCatalog(root / "catalog.sqlite3"),
            base,
            capacity=Capacity(
                element_bytes, limits or AdapterLimits(), max_packed_bytes, max_merged_bytes
            ),
            base_policy=base_policy,
            signatures=signatures,
        )

    def resolve(self, selector: str, *, routing_key: str = "") -> Lease:
        """Binds a selector to content, and holds the content until the lease is released.

        `routing_key` makes requests take the same side of a weighted alias.
        Raises AdapterNotFound, or BaseMismatch by policy.
        """
        record = self._acquire(selector, routing_key)
        try:
            warnings = self._warnings(record)
        except BaseException:
            self._release(record.digest)
            raise
        return Lease(record, lambda: self._release(record.digest), warnings=warnings)

    def resolve_mix(
        self, selectors: Sequence[tuple[str, float]], *, routing_key: str = ""
    ) -> Lease:
        """Binds several weighted selectors to one content, their sum.

        Raises as `resolve`, AdapterInvalid for the weights or for adapters that cannot be combined,
        or AdapterTooLarge.
        """
        leases: list[Lease] = []
        try:
            leases += (self.resolve(name, routing_key=routing_key) for name, _ in selectors)
            weights = [weight for _, weight in selectors]
            parts = [
                LeasedAdapter(lease.record, w) for lease, w in zip(leases, weights, strict=True)
            ]
            mix = Mix.of(Component(p.record.digest, p.weight) for p in parts)
            record = self._mix_record(mix, parts)
        except BaseException:
            for lease in leases:
                lease.release()
            raise
        with self._mixing:
            if not mix.alone:
                self.programs.add_mix(mix)
            self._leases.acquire(record.digest)

        def release() -> tuple[str, ...]:
            with self._mixing:
                if self._leases.release(record.digest):
                    self.programs.remove_mix(record.digest)  # nothing, of a plain one
            gone = tuple(digest for lease in leases for digest in lease.release())
            return (*gone, record.digest) if gone else ()

        warnings = dict.fromkeys(w for lease in leases for w in lease.warnings)
        return Lease(record, release, parts=parts, warnings=tuple(warnings))

    def cached_bytes(self) -> int | None:
        """Bytes that this machine keeps of a store elsewhere; None when the store is here."""
        return self._contents.cached_bytes()

    def is_local(self, digest: str) -> bool:
        """Whether the files are on this machine."""
        return self._contents.has(digest)

    def check_integrity(self) -> None:
        """Asserts that the catalog is whole and every content that it names is there."""
        with self._catalog.paused():
            self._catalog.check_integrity()
            named, stored = self._catalog.digests(), self._contents.digests()
            assert named <= stored, f"named but not stored: {named - stored}"

    @property
    def leased(self) -> int:
        """Contents that requests use."""
        return len(self._leases)

    def close(self) -> None:
        """Closes the catalog and ends this process's part in the store."""
        self._catalog.close()
        self._contents.close()

    def _acquire(self, selector: str, routing_key: str) -> AdapterRecord:
        """Resolves and leases. Content that goes in between is looked up again; what is named and
        yet not there is leased all the same, and found out about when it is read.
        """
        for _ in range(RACES):
            record = self.names.get(selector, routing_key=routing_key)
            if self._leases.acquire(record.digest) or self.names.version_exists(record):
                return record
            self._leases.release(record.digest)
        raise AdapterNotFound(f"{selector} changes too fast to be resolved", field="adapter")

    def _release(self, digest: str) -> tuple[str, ...]:
        """Ends a lease; the content, if it went for good with it."""
        gone = self._leases.release(digest) and self.garbage.discard_if_unused(digest)
        return (digest,) if gone else ()

    def _warnings(self, record: AdapterRecord) -> tuple[str, ...]:
        """What is doubtful about serving it on this base. Raises BaseMismatch by policy."""
        if self._policy is BasePolicy.OFF:
            return ()
        if problem := other_base(record.base, self.base):
            if self._policy is BasePolicy.REFUSE:
                raise BaseMismatch(f"{record.name}@{record.version}: {problem}")
            return (*record.warnings, problem)
        return record.warnings

    def _mix_record(self, mix: Mix, parts: Sequence[LeasedAdapter]) -> AdapterRecord:
        """The record of a mix."""
        if mix.alone:
            return next(p.record for p in parts if p.record.digest == mix.alone)
        digests = [component.digest for component in mix.components]
        reports = [self.programs.report(digest) for digest in digests]
        check_mix(mix, reports, {part.record.digest: part.record.name for part in parts})
        size = mix_packed_bytes(reports, self._capacity.element_bytes)
        most = self._capacity.max_packed_bytes
        if most is not None and size > most:
            raise AdapterTooLarge(
                f"the mix takes {size} bytes in memory, the arena has {most}",
                field="adapters",
            )
        ranks = mix_ranks(reports)
        return AdapterRecord(
            name="+".join(part.record.name for part in parts),
            version=0,
            digest=mix.digest,
            family="combination",
            traits=AdapterTraits(
                modules=len(ranks),
                max_rank=max(ranks.values()),
                leading=sum(report.traits.leading for report in reports),
                invocation=reports[0].traits.invocation,
            ),
            stored_bytes=0,
            packed_bytes=size,
            created=datetime.now(UTC),
        )

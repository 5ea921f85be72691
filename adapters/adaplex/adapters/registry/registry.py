"""AdapterRegistry: resolves what requests name to stored content, and leases it."""

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
from adaplex.adapters.storage.copied_catalog import CopiedCatalog
from adaplex.adapters.storage.folder_content import FolderContent
from adaplex.adapters.storage.garbage_collector import GarbageCollector
from adaplex.adapters.storage.lease import Lease, LeasedAdapter, Leases

RACES = 8
"""Attempts to resolve a name whose version is deleted meanwhile."""


class AdapterRegistry:
    """Resolves and leases adapters. Thread-safe; calls block on the disk.

    `names` reads and changes names, `intake` adds adapters, `programs` lowers them, `garbage`
    removes unused content.
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
        """Guards a mix's first and last lease."""
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
        with suppress(SourceUnavailable):  # a later sweep may succeed
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
        """Returns a registry in a local folder, which several processes may open.

        `element_bytes` is the compute dtype's, `max_packed_bytes` the arena's, `max_merged_bytes`
        the budget of merged weights.
        """
        root.mkdir(parents=True, exist_ok=True)
        return cls(
            FolderContent(root),
            CopiedCatalog(root),
            base,
            capacity=Capacity(
                element_bytes, limits or AdapterLimits(), max_packed_bytes, max_merged_bytes
            ),
            base_policy=base_policy,
            signatures=signatures,
        )

    def resolve(self, selector: str, *, routing_key: str = "") -> Lease:
        """Resolves a selector, and leases its content until the lease is released.

        Requests with the same `routing_key` get the same version of a weighted alias.
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
        """Resolves weighted selectors to their mix, and leases it and each adapter in it.

        Raises as `resolve`, AdapterInvalid for invalid weights or adapters that cannot be mixed, or
        AdapterTooLarge.
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
                    self.programs.remove_mix(record.digest)  # no-op for a single adapter
            unused = tuple(digest for lease in leases for digest in lease.release())
            return (*unused, record.digest) if unused else ()

        warnings = dict.fromkeys(w for lease in leases for w in lease.warnings)
        return Lease(record, release, parts=parts, warnings=tuple(warnings))

    def cached_bytes(self) -> int | None:
        """Returns the bytes that this machine caches of a remote store; None for a local store."""
        return self._contents.cached_bytes()

    def is_local(self, digest: str) -> bool:
        """Returns True if the files are on this machine."""
        return self._contents.has(digest)

    def check_integrity(self) -> None:
        """Asserts the catalog's invariants, and that all content it refers to is stored."""
        with self._catalog.paused():
            self._catalog.check_integrity()
            named, stored = self._catalog.digests(), self._contents.digests()
            assert named <= stored, f"named but not stored: {named - stored}"

    @property
    def leased(self) -> int:
        """Number of contents that requests lease."""
        return len(self._leases)

    def damage(self) -> str:
        """Returns what of the catalog was found to be damaged or gone; empty if nothing."""
        return self._catalog.damage()

    def close(self) -> None:
        """Closes the catalog and the content store."""
        self._catalog.close()
        self._contents.close()

    def _acquire(self, selector: str, routing_key: str) -> AdapterRecord:
        """Resolves a selector and leases its content, again if the version was deleted meanwhile.

        Content that is missing although a version refers to it is leased; reading it will fail.
        """
        for _ in range(RACES):
            record = self.names.get(selector, routing_key=routing_key)
            if self._leases.acquire(record.digest) or self.names.version_exists(record):
                return record
            self._leases.release(record.digest)
        raise AdapterNotFound(
            f"{selector} was deleted {RACES} times while it was resolved", field="adapter"
        )

    def _release(self, digest: str) -> tuple[str, ...]:
        """Ends a lease. Returns the digest if nothing here uses the content any more."""
        unused = self._leases.release(digest) and self.garbage.discard_if_unused(digest)
        return (digest,) if unused else ()

    def _warnings(self, record: AdapterRecord) -> tuple[str, ...]:
        """Returns the doubts about serving a record on this base. Raises BaseMismatch by policy."""
        if self._policy is BasePolicy.OFF:
            return ()
        if problem := other_base(record.base, self.base):
            if self._policy is BasePolicy.REFUSE:
                raise BaseMismatch(f"{record.name}@{record.version}: {problem}")
            return (*record.warnings, problem)
        return record.warnings

    def _mix_record(self, mix: Mix, parts: Sequence[LeasedAdapter]) -> AdapterRecord:
        """Returns the record of a mix. Raises AdapterInvalid or AdapterTooLarge."""
        if mix.alone:
            return next(p.record for p in parts if p.record.digest == mix.alone)
        digests = [component.digest for component in mix.components]
        reports = [self.programs.report(digest) for digest in digests]
        check_mix(mix, reports, {part.record.digest: part.record.name for part in parts})
        size = mix_packed_bytes(reports, self._capacity.element_bytes)
        limit = self._capacity.max_packed_bytes
        if limit is not None and size > limit:
            raise AdapterTooLarge(
                f"the mix takes {size} bytes in memory, the arena has {limit}",
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

"""Residency: which adapters are in memory, for sequences that wait and that run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum, auto

from adaplex.adapters.errors import AdaplexError
from adaplex.engine.adapter_cache import CacheStats
from adaplex.engine.batch import Batch
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import AdapterLoadFailed, RequestInvalid
from adaplex.engine.eviction import LoadCosts
from adaplex.engine.load_jobs import AdapterSource, Completion, Job, LoadJobs
from adaplex.engine.merged_residency import MergedResidency
from adaplex.engine.observer import Observer
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.runner import Runner
from adaplex.engine.sequence import Sequence
from adaplex.engine.unmerged_residency import UnmergedResidency


class Admission(Enum):
    """The outcome of `Residency.try_admit`."""

    ADMITTED = auto()
    """The sequence has its mode, its KV blocks and a lease on its adapter."""
    NO_ADAPTER = auto()
    """The adapter is not in memory; sequences behind this one may start."""
    NO_BLOCKS = auto()
    """Too few KV blocks are free; no sequence behind this one may start."""


@dataclass(frozen=True)
class LoadFailure:
    """An adapter that cannot be loaded; the sequences that wait for it must fail."""

    digest: str
    merged: bool
    cause: BaseException

    def hits(self, sequence: Sequence) -> bool:
        """Returns True if a waiting sequence waits for this; one in `auto` waits for the arena."""
        adapter = sequence.adapter
        return (
            adapter is not None
            and adapter.digest == self.digest
            and (adapter.mode is AdapterMode.MERGED) == self.merged
        )

    def error(self) -> AdaplexError:
        """Returns the error of a request that waited for the adapter."""
        if isinstance(self.cause, AdaplexError):
            return self.cause
        error = AdapterLoadFailed(f"adapter {self.digest} could not be loaded: {self.cause}")
        error.__cause__ = self.cause
        return error


@dataclass(frozen=True)
class ResidencyStats:
    """Sizes and contents of the caches, and pins."""

    arena: CacheStats
    host: CacheStats
    merged: CacheStats
    pinned: frozenset[str]
    """Digests of pinned adapters, resident or not."""
    pinned_bytes: int
    """Bytes of the arena that pins take."""
    max_pinned_bytes: int


class Residency:
    """Loads adapters into memory for waiting sequences and leases them to running ones.

    Each step begins with `begin_step`. Then waiting sequences go in queue order to `try_admit`,
    `load` (when no more can start) or `prefetch` (further back); a sequence that ends or is
    preempted goes to `release`. Running sequences have leases, waiting ones none.

    A sequence gets no room for its adapter that an earlier one waits for. A sequence without room
    lets at most `max_bypass` later ones lease resident adapters; then the cache admits no more
    until enough leases have ended, so that no stream of requests blocks another adapter for ever.
    A sequence that would find no room even if every lease ended, because of pins, fails.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        source: AdapterSource,
        observer: Observer,
        *,
        on_completion: Callable[[], None],
        executor: Executor | None = None,
    ) -> None:
        self._config = config
        self._jobs = LoadJobs(source, on_completion, executor)
        costs = LoadCosts()
        self._unmerged = UnmergedResidency(config, runner, self._jobs, observer, costs)
        self._merged = MergedResidency(config, runner, self._jobs, observer, costs)
        self._failures: list[LoadFailure] = []
        self._now = 0.0
        self._prefetches = 0
        """Sequences of this step whose adapters were prefetched."""

    @property
    def has_failures(self) -> bool:
        """True if `collect` would return failures even without a completed job."""
        return bool(self._failures)

    def check(self, adapter: AdapterRef) -> None:
        """Raises AdapterTooLarge, NoRoomBesidePins or RequestInvalid if the adapter can never be
        served in its mode.
        """
        if adapter.mode is AdapterMode.MERGED:
            self._merged.check(adapter)
        elif adapter.traits.merged_only:
            raise RequestInvalid("mode", f"adapter {adapter.name} can only be served merged")
        else:
            self._unmerged.check(adapter)

    def record_request(self, adapter: AdapterRef) -> None:
        """Records that a request for the adapter was added."""
        if adapter.mode is not AdapterMode.UNMERGED:
            self._merged.record_request(adapter.digest)

    def record_step(self, batch: Batch) -> None:
        """Records a step that ran; recent steps decide the mode of `auto`."""
        self._merged.record_step(batch)

    def begin_step(self, now: float) -> None:
        """Begins a step at `now`: loads pinned adapters before those of waiting sequences."""
        self._now, self._prefetches = now, 0
        self._merged.begin_step()
        self._unmerged.begin_step()

    def try_admit(self, sequence: Sequence, allocate: Callable[[Sequence], bool]) -> Admission:
        """Admits a waiting sequence if its adapter is in memory and `allocate` finds KV blocks.

        The order matters: the mode, decided for good, is part of the hashes of the blocks, and a
        sequence without blocks gets no lease.
        """
        if not self.load(sequence):
            return Admission.NO_ADAPTER
        if sequence.adapter is not None:
            merged = self._place(sequence.adapter) is self._merged
            sequence.bind(AdapterMode.MERGED if merged else AdapterMode.UNMERGED)
        if not allocate(sequence):
            return Admission.NO_BLOCKS
        if adapter := sequence.adapter:
            self._place(adapter).lease(adapter.digest, sequence)
        return Admission.ADMITTED

    def load(self, sequence: Sequence) -> bool:
        """Starts the next job that loads the adapter of a waiting sequence, if one is needed.

        Returns True if the sequence may lease the adapter in this step.
        """
        if sequence.adapter_requested_at is None:
            sequence.adapter_requested_at = self._now
        ready = sequence.adapter is None or self._load(sequence, sequence.adapter)
        if ready and sequence.adapter_ready_at is None:
            sequence.adapter_ready_at = self._now
        return ready

    def prefetch(self, sequence: Sequence) -> bool:
        """Fetches the adapter of a sequence into host memory, behind those that are loaded now;
        returns False if no further adapter can be prefetched in this step.
        """
        self._prefetches += 1
        if self._prefetches > self._config.prefetch_ahead:
            return False
        adapter = sequence.adapter
        if adapter is None or adapter.mode is AdapterMode.MERGED:
            return True
        return self._unmerged.prefetch(adapter.digest, adapter.packed_bytes)

    def release(self, sequence: Sequence) -> None:
        """Ends the sequence's lease, if it has one."""
        if adapter := sequence.adapter:
            self._unmerged.release(adapter.digest, sequence)
            self._merged.release(adapter.digest, sequence)

    def pin(self, digest: str, packed_bytes: int, name: str) -> None:
        """Loads an adapter into the arena and exempts it from eviction. Raises PinsFull."""
        self._unmerged.pin(digest, packed_bytes, name)

    def unpin(self, digest: str) -> None:
        """Makes a pinned adapter evictable."""
        self._unmerged.unpin(digest)

    def unload(self, digest: str) -> bool:
        """Drops an adapter from all caches once no sequence leases it; returns True if it was in
        the arena or merged.
        """
        unmerged, merged = self._unmerged.unload(digest), self._merged.unload(digest)
        return unmerged or merged

    def collect(self) -> list[LoadFailure]:
        """Applies the jobs that have completed; an adapter whose job failed is absent again."""
        failures, self._failures = self._failures, []
        for done in self._jobs.collect():
            if failure := self._complete(done):
                failures.append(failure)
        return failures

    def close(self) -> None:
        """Waits for the jobs that run."""
        self._jobs.close()

    def stats(self) -> ResidencyStats:
        """Returns how full the memory of adapters is now."""
        return ResidencyStats(
            arena=self._unmerged.arena_stats(),
            host=self._unmerged.host_stats(),
            merged=self._merged.stats(),
            pinned=self._unmerged.pinned,
            pinned_bytes=self._unmerged.pinned_bytes,
            max_pinned_bytes=self._unmerged.max_pinned_bytes,
        )

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Asserts that exactly running sequences have leases, and that bytes and jobs balance."""
        leases: dict[AdapterMode, list[tuple[str, Sequence]]] = {mode: [] for mode in AdapterMode}
        for sequence in running:
            if adapter := sequence.adapter:
                leases[adapter.mode].append((adapter.digest, sequence))
        assert not leases[AdapterMode.AUTO]
        self._unmerged.check_integrity(leases[AdapterMode.UNMERGED])
        self._merged.check_integrity(leases[AdapterMode.MERGED])
        assert self._jobs.pending == self._unmerged.loading + self._merged.pending

    def _load(self, sequence: Sequence, adapter: AdapterRef) -> bool:
        place = self._place(adapter)
        if place is self._merged:
            self._merged.load(sequence, adapter.digest)
            return place.leasable(adapter.digest)
        if adapter.mode is AdapterMode.AUTO:
            self._merged.build_if_it_pays(adapter.digest)
        if self._unmerged.blocked:
            self.prefetch(sequence)
        elif not self._unmerged.load(sequence, adapter.digest, adapter.packed_bytes):
            self._check_room(adapter)
        return place.leasable(adapter.digest)

    def _place(self, adapter: AdapterRef) -> UnmergedResidency | MergedResidency:
        """Returns where the adapter is served from; in `auto` from merged weights if they pay and
        are in memory.
        """
        merged = adapter.mode is AdapterMode.MERGED or (
            adapter.mode is AdapterMode.AUTO
            and self._merged.pays(adapter.digest)
            and self._merged.leasable(adapter.digest)
        )
        return self._merged if merged else self._unmerged

    def _check_room(self, adapter: AdapterRef) -> None:
        """Adds a failure if pins leave no room for an adapter, whatever else is released."""
        try:
            self._unmerged.check(adapter)
        except AdaplexError as error:
            self._failures.append(LoadFailure(adapter.digest, False, error))

    def _complete(self, done: Completion) -> LoadFailure | None:
        merged = done.job in (Job.MEASURE, Job.BUILD)
        if merged:
            error = self._merged.complete(done)
        else:
            self._unmerged.complete(done)
            error = done.error
        return LoadFailure(done.digest, merged, error) if error else None

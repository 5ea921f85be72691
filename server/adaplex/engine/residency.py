"""Residency: which adapters are in memory, for those who wait and those who run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from adaplex.adapters.errors import AdaplexError
from adaplex.engine.adapter_cache import AdapterCache
from adaplex.engine.batch import Batch
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import AdapterLoadFailed, RequestInvalid
from adaplex.engine.eviction import LoadCosts
from adaplex.engine.load_jobs import Completion, Job, LoadJobs
from adaplex.engine.merged_residency import MergedResidency
from adaplex.engine.observer import Observer
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.runner import Runner
from adaplex.engine.sequence import Sequence
from adaplex.engine.unmerged_residency import UnmergedResidency


@dataclass(frozen=True)
class LoadFailure:
    """An adapter did not come; the sequences that wait for it must fail."""

    digest: str
    merged: bool
    cause: BaseException

    def hits(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence waits for just this: `auto` waits for the arena only."""
        adapter = sequence.adapter
        return (
            adapter is not None
            and adapter.digest == self.digest
            and (adapter.mode is AdapterMode.MERGED) == self.merged
        )

    def error(self) -> AdaplexError:
        """What to tell one of them."""
        if isinstance(self.cause, AdaplexError):
            return self.cause
        error = AdapterLoadFailed(f"adapter {self.digest} could not be loaded: {self.cause}")
        error.__cause__ = self.cause
        return error


class Residency:
    """Brings adapters into memory for waiting sequences and keeps them there for running ones.

    Running sequences hold leases; waiting ones hold nothing, but are asked for in queue order
    every round, and no later one gets the room of an earlier one. An earlier one that finds no
    room lets at most `max_bypass` later ones use what is resident, then the tier closes until
    enough leases have ended: no adapter is kept in memory for ever by a stream of requests. One
    that would find none if every lease ended, because of pins, fails.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        observer: Observer,
        *,
        on_completion: Callable[[], None],
        executor: Executor | None = None,
    ) -> None:
        self._config = config
        self.loader = LoadJobs(on_completion, executor)
        costs = LoadCosts()
        self.unmerged = UnmergedResidency(config, runner, self.loader, observer, costs)
        self.merged = MergedResidency(config, runner, self.loader, observer, costs)
        self._hopeless: list[LoadFailure] = []
        self.start_round()

    @property
    def hopeless(self) -> bool:
        """Whether `collect` would tell of sequences that wait in vain."""
        return bool(self._hopeless)

    def check(self, adapter: AdapterRef) -> None:
        """Raises AdapterTooLarge, NoRoomBesidePins or RequestInvalid when the adapter can never be
        served so.
        """
        if adapter.mode is AdapterMode.MERGED:
            self.merged.check(adapter)
        elif adapter.merged_only:
            raise RequestInvalid("mode", f"adapter {adapter.name} can only be served merged")
        else:
            self.unmerged.check(adapter)

    def note(self, adapter: AdapterRef) -> None:
        """A request for this adapter has come in."""
        if adapter.mode is not AdapterMode.UNMERGED:
            self.merged.note(adapter.digest)

    def ran(self, batch: Batch) -> None:
        """A step ran: what recent ones were made of decides what `auto` means."""
        self.merged.popularity.note(batch)

    def start_round(self) -> None:
        """From now on `ready` is asked for waiting sequences in queue order."""
        self._ahead = 0
        self.merged.tier.start_round()
        self.unmerged.start_round()

    def ready(self, sequence: Sequence) -> bool:
        """Whether the sequence may lease its adapter now. If not, brings the adapter nearer."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        if self._tier_for(adapter) is self.merged.tier:
            self.merged.bring(sequence, adapter.digest)
            return self._usable(self.merged.tier, adapter.digest)
        if adapter.mode is AdapterMode.AUTO:
            self.merged.build_if_it_pays(adapter.digest)
        if self.unmerged.arena.blocked is not None:
            self.prefetch(sequence)
        elif not self.unmerged.bring(sequence, adapter.digest, adapter.packed_bytes):
            self._check_hope(adapter)
        return self._usable(self.unmerged.arena, adapter.digest)

    def prefetch(self, sequence: Sequence) -> bool:
        """Fetches the adapter of a sequence behind those whose adapters may be loaded now; False
        when no more can be in this round.
        """
        self._ahead += 1
        if self._ahead > self._config.prefetch_ahead:
            return False
        adapter = sequence.adapter
        if adapter is None or adapter.mode is AdapterMode.MERGED:
            return True
        return self.unmerged.prefetch(adapter.digest, adapter.packed_bytes)

    def bind(self, sequence: Sequence) -> None:
        """Decides the mode of a sequence that is `ready`, for good."""
        if adapter := sequence.adapter:
            merged = self._tier_for(adapter) is self.merged.tier
            mode = AdapterMode.MERGED if merged else AdapterMode.UNMERGED
            sequence.request = replace(sequence.request, adapter=replace(adapter, mode=mode))

    def lease(self, sequence: Sequence) -> None:
        """Keeps the adapter of a bound sequence in memory until it is released."""
        if adapter := sequence.adapter:
            self._tier_for(adapter).lease(adapter.digest, sequence)

    def release(self, sequence: Sequence) -> None:
        """Ends the sequence's lease, if it has one."""
        if sequence.adapter is not None:
            for tier in (self.unmerged.arena, self.merged.tier):
                tier.release(sequence.adapter.digest, sequence)

    def unload(self, digest: str) -> bool:
        """Drops an adapter from all tiers once unleased; whether it was in the arena or merged."""
        unmerged, merged = self.unmerged.unload(digest), self.merged.unload(digest)
        return unmerged or merged

    def collect(self) -> list[LoadFailure]:
        """Takes in what the loader has completed; what failed is absent again."""
        failures, self._hopeless = self._hopeless, []
        for done in self.loader.collect():
            if failure := self._settle(done):
                failures.append(failure)
        return failures

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Asserts that just the running sequences hold leases, and that bytes and jobs balance."""
        leases: dict[AdapterMode, list[tuple[str, Sequence]]] = {mode: [] for mode in AdapterMode}
        for sequence in running:
            if adapter := sequence.adapter:
                leases[adapter.mode].append((adapter.digest, sequence))
        assert not leases[AdapterMode.AUTO]
        self.unmerged.check_integrity(leases[AdapterMode.UNMERGED])
        self.merged.check_integrity(leases[AdapterMode.MERGED])
        tiers = (self.unmerged.arena, self.unmerged.host, self.merged.tier)
        loading = sum(tier.loading for tier in tiers)
        assert self.loader.pending == loading + self.merged.measuring

    def _tier_for(self, adapter: AdapterRef) -> AdapterCache:
        """Where the adapter is served from; `auto` takes merged weights where they pay and are
        there.
        """
        merged = adapter.mode is AdapterMode.MERGED or (
            adapter.mode is AdapterMode.AUTO
            and self.merged.popularity.pays(adapter.digest)
            and self._usable(self.merged.tier, adapter.digest)
        )
        return self.merged.tier if merged else self.unmerged.arena

    def _usable(self, tier: AdapterCache, digest: str) -> bool:
        """Whether the next in the queue may lease it; whoever comes later may not evict it."""
        tier.wanted.add(digest)
        return tier.has(digest) and tier.open(self._config.max_bypass)

    def _check_hope(self, adapter: AdapterRef) -> None:
        """Notes a failure when pins leave no room for an adapter, whatever else ends."""
        try:
            self.unmerged.check(adapter)
        except AdaplexError as error:
            self._hopeless.append(LoadFailure(adapter.digest, False, error))

    def _settle(self, done: Completion) -> LoadFailure | None:
        merged = done.job in (Job.MEASURE, Job.BUILD)
        if merged:
            error = self.merged.settle(done)
        else:
            self.unmerged.settle(done)
            error = done.error
        return LoadFailure(done.digest, merged, error) if error else None

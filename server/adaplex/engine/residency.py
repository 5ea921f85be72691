"""Residency: which adapters are in memory, unmerged in the arena or as merged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from adaplex.adapters.errors import AdaplexError, AdapterTooLarge
from adaplex.engine.byte_budget import ByteBudget
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import AdapterLoadFailed, RequestInvalid
from adaplex.engine.extents import ExtentAllocator
from adaplex.engine.loader import Completion, Job, Loader
from adaplex.engine.observer import Observer
from adaplex.engine.popularity import Popularity
from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.engine.runner import Runner
from adaplex.engine.sequence import Sequence
from adaplex.engine.tier import Tier


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
    enough leases have ended: no adapter is kept in memory for ever by a stream of requests.
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
        self._runner = runner
        self._observer = observer
        self.loader = Loader(on_completion, executor)
        self.arena = Tier(
            "arena", ExtentAllocator(config.arena_bytes), runner.remove_adapter, observer
        )
        self.merged = Tier(
            "merged", ByteBudget(config.merged_bytes), runner.remove_merged, observer
        )
        self._popularity = Popularity(config.auto_merge_requests)
        self._merged_sizes: dict[str, int | None] = {}
        """Bytes of merged weights; None while they are being asked for."""
        self.start_round()

    def check(self, adapter: AdapterRef) -> None:
        """Raises AdapterTooLarge or RequestInvalid when the adapter can never be served so."""
        if adapter.mode is AdapterMode.MERGED:
            if not self._config.merged_bytes:
                raise RequestInvalid("mode", "this server keeps no merged weights")
            if refusal := self._too_large_to_merge(adapter.digest):
                raise refusal
        elif not self.arena.space.could_hold(adapter.packed_bytes):
            raise AdapterTooLarge(
                f"adapter {adapter.name} takes {adapter.packed_bytes} bytes in memory; "
                f"the arena has {self.arena.space.capacity}"
            )

    def note(self, adapter: AdapterRef) -> None:
        """A request for this adapter has come in."""
        if self._config.merged_bytes and adapter.mode is not AdapterMode.UNMERGED:
            self._popularity.note(adapter.digest)
            self._observer.merged_looked_up(hit=self.merged.has(adapter.digest))

    def start_round(self) -> None:
        """From now on `ready` is asked for waiting sequences in queue order."""
        for tier in (self.arena, self.merged):
            tier.start_round()

    def ready(self, sequence: Sequence) -> bool:
        """Whether the sequence may lease its adapter now. If not, brings the adapter nearer."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        tier = self._tier_for(adapter)
        if tier is self.merged:
            return self._merged_ready(sequence, adapter.digest)
        if adapter.mode is AdapterMode.AUTO and self._popularity.is_hot(adapter.digest):
            self._build_in_background(adapter.digest)
        if self.arena.get(adapter.digest) is None and self._may_load(self.arena):
            if entry := self.arena.reserve(adapter.digest, adapter.packed_bytes):
                load = partial(
                    self._runner.load_adapter, adapter.digest, entry.handle, adapter.packed_bytes
                )
                self.loader.submit(Job.LOAD, adapter.digest, load)
            else:
                self.arena.blocked = sequence
        return self._usable(self.arena, adapter.digest)

    def bind(self, sequence: Sequence) -> None:
        """Decides the mode of a sequence that is `ready`, for good."""
        if adapter := sequence.adapter:
            merged = self._tier_for(adapter) is self.merged
            mode = AdapterMode.MERGED if merged else AdapterMode.UNMERGED
            sequence.request = replace(sequence.request, adapter=replace(adapter, mode=mode))

    def lease(self, sequence: Sequence) -> None:
        """Keeps the adapter of a bound sequence in memory until it is released."""
        if adapter := sequence.adapter:
            self._tier_for(adapter).lease(adapter.digest, sequence)

    def release(self, sequence: Sequence) -> None:
        """Ends the sequence's lease, if it has one."""
        if sequence.adapter is not None:
            for tier in (self.arena, self.merged):
                tier.release(sequence.adapter.digest, sequence)

    def unload(self, digest: str) -> bool:
        """Drops an adapter from both tiers once unleased; whether it was resident in one."""
        if self._merged_sizes.get(digest) is not None:
            del self._merged_sizes[digest]
        self._popularity.forget(digest)
        unmerged, merged = self.arena.unload(digest), self.merged.unload(digest)
        return unmerged or merged

    def collect(self) -> list[LoadFailure]:
        """Takes in what the loader has completed; what failed is absent again."""
        failures = [self._settle(completion) for completion in self.loader.collect()]
        return [failure for failure in failures if failure is not None]

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Asserts that just the running sequences hold leases, and that bytes and jobs balance."""
        leases: dict[AdapterMode, list[tuple[str, Sequence]]] = {mode: [] for mode in AdapterMode}
        for sequence in running:
            if adapter := sequence.adapter:
                leases[adapter.mode].append((adapter.digest, sequence))
        assert not leases[AdapterMode.AUTO]
        self.arena.check_integrity(leases[AdapterMode.UNMERGED])
        self.merged.check_integrity(leases[AdapterMode.MERGED])
        measuring = sum(size is None for size in self._merged_sizes.values())
        assert self.loader.pending == self.arena.loading + self.merged.loading + measuring

    def _tier_for(self, adapter: AdapterRef) -> Tier:
        """Where the adapter is served from; `auto` takes merged weights only if they are there."""
        merged = adapter.mode is AdapterMode.MERGED or (
            adapter.mode is AdapterMode.AUTO and self._usable(self.merged, adapter.digest)
        )
        return self.merged if merged else self.arena

    def _usable(self, tier: Tier, digest: str) -> bool:
        """Whether the next in the queue may lease it; whoever comes later may not evict it."""
        tier.wanted.add(digest)
        return tier.has(digest) and tier.open(self._config.max_bypass)

    def _may_load(self, tier: Tier) -> bool:
        return tier.blocked is None and not self.loader.full

    def _merged_ready(self, sequence: Sequence, digest: str) -> bool:
        if self.merged.get(digest) is None and self._may_load(self.merged):
            if (size := self._merged_size(digest)) is None:
                return False
            if not self._build(digest, size, keep=frozenset()):
                self.merged.blocked = sequence
        return self._usable(self.merged, digest)

    def _build_in_background(self, digest: str) -> None:
        """Builds merged weights that nobody waits for, if that delays no load and evicts no
        others that are hot.
        """
        if self.merged.get(digest) or self.merged.blocked or self.loader.pending:
            return
        size = self._merged_size(digest)
        if size is not None and self.merged.space.could_hold(size):
            self._build(digest, size, keep=self._popularity.hot())

    def _build(self, digest: str, size: int, *, keep: frozenset[str]) -> bool:
        if self.merged.reserve(digest, size, keep=keep) is None:
            return False

        def build() -> None:
            built = self._runner.build_merged(digest)
            assert built <= size, f"merged weights take {built} bytes, not {size}"

        self.loader.submit(Job.BUILD, digest, build)
        return True

    def _merged_size(self, digest: str) -> int | None:
        """Bytes of the merged weights; None while the loader finds out."""
        if digest not in self._merged_sizes:
            self._merged_sizes[digest] = None
            self.loader.submit(Job.MEASURE, digest, partial(self._runner.merged_bytes, digest))
        return self._merged_sizes[digest]

    def _too_large_to_merge(self, digest: str) -> RequestInvalid | None:
        size = self._merged_sizes.get(digest)
        if size is None or self.merged.space.could_hold(size):
            return None
        budget = self.merged.space.capacity
        return RequestInvalid("mode", f"merged weights take {size} bytes of a budget of {budget}")

    def _settle(self, completion: Completion) -> LoadFailure | None:
        digest, job, error = completion.digest, completion.job, completion.error
        if job is Job.MEASURE:
            self._merged_sizes[digest] = completion.result
            if error is None:
                error = self._too_large_to_merge(digest)
                return LoadFailure(digest, True, error) if error else None
            del self._merged_sizes[digest]
        tier = self.arena if job is Job.LOAD else self.merged
        self._observer.adapter_loaded(
            tier=tier.name, outcome="error" if error else "ok", seconds=completion.seconds
        )
        if error is None:
            tier.loaded(digest)
            return None
        if job is not Job.MEASURE:
            tier.failed(digest)
        if tier is self.merged:
            self._popularity.forget(digest)
        return LoadFailure(digest, tier is self.merged, error)

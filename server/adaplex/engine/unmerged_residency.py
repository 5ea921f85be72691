"""UnmergedResidency: adapters on their way from the store through host memory into the arena."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.engine.adapter_cache import AdapterCache, CacheStats
from adaplex.engine.arena_allocator import ArenaAllocator, aligned
from adaplex.engine.byte_budget import ByteBudget
from adaplex.engine.config import EngineConfig
from adaplex.engine.errors import NoRoomBesidePins, PinsFull
from adaplex.engine.eviction import LoadCosts
from adaplex.engine.load_jobs import Completion, Job, LoadJobs
from adaplex.engine.observer import Observer
from adaplex.engine.request import AdapterRef
from adaplex.engine.runner import Runner
from adaplex.engine.sequence import Sequence


@dataclass(eq=False)
class Pin:
    """An adapter that is to stay in the arena."""

    nbytes: int
    bypassed: int = 0
    """Sequences that leased an adapter while there was no room for this."""


class UnmergedResidency:
    """Two tiers: the arena, where adapters are used, and the host, from where a copy brings them.

    What comes from the store is packed into host memory first, and stays there as long as it is
    worth it; only what the host has no room for goes straight into the arena. Pinned adapters are
    in the arena whether anybody asks for them or not.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        jobs: LoadJobs,
        observer: Observer,
        costs: LoadCosts,
    ) -> None:
        self._config, self._runner, self._jobs, self._costs = config, runner, jobs, costs
        self._observer = observer
        space = ArenaAllocator(config.arena_bytes)
        self._arena = AdapterCache(
            "arena", space, runner.remove_adapter, observer, self._reload_seconds
        )
        budget = ByteBudget(config.host_bytes)
        fetch_seconds = partial(costs.seconds, "host")
        self._host = AdapterCache(
            "host", budget, runner.remove_host, observer, lambda _, n: fetch_seconds(n)
        )
        self._pins: dict[str, Pin] = {}
        """By digest."""

    @property
    def pinned(self) -> frozenset[str]:
        """Digests that are pinned."""
        return frozenset(self._pins)

    @property
    def max_pinned_bytes(self) -> int:
        """Bytes of the arena that pins may take."""
        return int(self._config.max_pinned_share * self._arena.capacity)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the arena that pins take, or will."""
        return sum(aligned(pin.nbytes) for pin in self._pins.values())

    def check(self, adapter: AdapterRef) -> None:
        """Raises AdapterTooLarge or NoRoomBesidePins when the adapter can never be served."""
        name, nbytes = adapter.name, adapter.packed_bytes
        if not self._arena.fits_empty(nbytes):
            raise AdapterTooLarge(
                f"adapter {name} takes {nbytes} bytes in memory; "
                f"the arena has {self._arena.capacity}"
            )
        if not self.fits_beside_pins(adapter.digest, nbytes):
            raise NoRoomBesidePins(name, nbytes, self.pinned_bytes, self._arena.capacity)

    def fits_beside_pins(self, digest: str, nbytes: int) -> bool:
        """Returns True if an adapter is in the arena, or would fit if all but pins were gone."""
        return self._arena.get(digest) is not None or self._arena.fits_beside(self._pins, nbytes)

    def begin_step(self) -> None:
        """Brings what is pinned nearer, before anybody else asks. A pin that finds no room counts
        who bypasses it as a waiting sequence does; one that other pins leave no room does not hold
        the others up.
        """
        self._arena.begin_step()
        self._host.begin_step()
        for digest, pin in self._pins.items():
            if self._arena.get(digest) is None and not self._start_job(digest, pin.nbytes):
                fits = self._arena.fits_beside(self._pins, pin.nbytes)
                self._arena.blocked = pin if fits else None

    @property
    def blocked(self) -> bool:
        """True if a pin or a sequence of this step waits for room in the arena."""
        return self._arena.blocked is not None

    def leasable(self, digest: str) -> bool:
        """Keeps an adapter in the arena for this step; returns True if a sequence may lease it."""
        return self._arena.leasable(digest, self._config.max_bypass)

    def lease(self, digest: str, sequence: Sequence) -> None:
        """Keeps an adapter in the arena until the sequence releases it."""
        self._arena.lease(digest, sequence)

    def release(self, digest: str, sequence: Sequence) -> None:
        """Ends the lease of a sequence, if it has one."""
        self._arena.release(digest, sequence)

    def load(self, sequence: Sequence, digest: str, nbytes: int) -> bool:
        """Brings the adapter of a waiting sequence a step nearer to the arena. False when there is
        no room: whoever is behind must not take what room there will be.
        """
        if self._arena.get(digest) is None and not self._start_job(digest, nbytes):
            self._arena.blocked = sequence
            return False
        return True

    def prefetch(self, digest: str, nbytes: int) -> bool:
        """Fetches an adapter into host memory for later; False when that must wait."""
        if self._arena.get(digest):
            return True
        self._host.protect(digest)
        if self._host.get(digest) or not self._host.fits_empty(nbytes):
            return True
        return self._jobs.spare(Job.FETCH) and self._fetch(digest, nbytes)

    def pin(self, digest: str, nbytes: int, name: str) -> None:
        """From now on the adapter is brought into the arena and kept there, until it is unpinned,
        unloaded, or found impossible to load. Raises PinsFull when pins would take too many bytes,
        and when those that are there leave no stretch of the arena that is long enough.
        """
        if digest in self._pins:
            return
        pinned, limit = self.pinned_bytes, self.max_pinned_bytes
        if pinned + aligned(nbytes) > limit or not self.fits_beside_pins(digest, nbytes):
            raise PinsFull(name, nbytes, pinned, limit)
        self._pins[digest] = Pin(nbytes)
        self._arena.cancel_unload(digest)

    def unpin(self, digest: str) -> None:
        """The adapter is one like others again."""
        self._pins.pop(digest, None)

    def unload(self, digest: str) -> bool:
        """Drops an adapter from arena and host as soon as nobody needs it; whether it was in the
        arena. It is pinned no more.
        """
        self.unpin(digest)
        self._host.unload(digest)
        return self._arena.unload(digest)

    def complete(self, done: Completion) -> None:
        """Takes in what a job has done; what failed is absent again."""
        tier = self._host if done.job is Job.FETCH else self._arena
        if done.job is Job.COPY:
            self._host.read_ended(done.digest)
        entry = tier.get(done.digest)
        assert entry is not None
        self._observer.adapter_loaded(
            tier=tier.name, outcome="error" if done.error else "ok", seconds=done.seconds
        )
        if done.error is not None:
            tier.failed(done.digest)
            self._pins.pop(done.digest, None)
            return
        cost = {Job.FETCH: "host", Job.COPY: "copy", Job.LOAD: "host"}[done.job]
        self._costs.note(cost, entry.nbytes, done.seconds)
        tier.loaded(done.digest)

    @property
    def loading(self) -> int:
        """Number of adapters that load into host memory or into the arena."""
        return self._host.loading + self._arena.loading

    def arena_stats(self) -> CacheStats:
        """Returns how full the arena is now."""
        return self._arena.stats()

    def host_stats(self) -> CacheStats:
        """Returns how full host memory is now."""
        return self._host.stats()

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that both tiers balance, and that pins keep to their bound."""
        self._arena.check_integrity(leases)
        self._host.check_integrity(())
        assert self.pinned_bytes <= self.max_pinned_bytes

    def _start_job(self, digest: str, nbytes: int) -> bool:
        """Begins the next job for an adapter that is absent from the arena, if there is one to
        begin. False when the arena has no room for it.
        """
        self._host.protect(digest)
        copy = self._host.get(digest)
        if copy is None and self._jobs.full(Job.FETCH):
            return True
        if copy is None and self._fetch(digest, nbytes):
            return True
        if copy is not None and not copy.resident:
            return True  # it is being fetched
        return self.blocked or self._load(digest, nbytes)

    def _fetch(self, digest: str, nbytes: int) -> bool:
        """Begins to fetch an absent adapter into the host; False when there is no room for it."""
        if not self._host.fits_empty(nbytes) or self._host.reserve(digest, nbytes) is None:
            return False
        self._jobs.submit(Job.FETCH, digest, self._runner.pack_adapter)
        return True

    def _load(self, digest: str, nbytes: int) -> bool:
        """Begins to bring an adapter into the arena, from the host if there is a copy, unless the
        loader is busy; False when there is no room for it.
        """
        job = Job.COPY if self._host.has(digest) else Job.LOAD
        if self._jobs.full(job):
            return True
        if (place := self._arena.reserve(digest, nbytes, keep=self._pins)) is None:
            return False
        runner, offset = self._runner, place.handle
        if job is Job.COPY:
            self._host.read(digest)
            self._jobs.submit_copy(digest, partial(runner.copy_adapter, digest, offset, nbytes))
        else:
            self._jobs.submit(job, digest, lambda p: runner.load_adapter(p, offset, nbytes))
        return True

    def _reload_seconds(self, digest: str, nbytes: int) -> float:
        """What bringing an adapter back into the arena would take."""
        copy = self._costs.seconds("copy", nbytes)
        return copy if self._host.has(digest) else copy + self._costs.seconds("host", nbytes)

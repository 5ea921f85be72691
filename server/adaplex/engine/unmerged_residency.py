"""UnmergedResidency: loads adapters from the store through host memory into the arena."""

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
from adaplex.engine.eviction import LoadCosts, LoadKind
from adaplex.engine.load_jobs import Completion, Job, LoadJobs
from adaplex.engine.observer import Observer
from adaplex.engine.request import AdapterRef
from adaplex.engine.runner import Runner
from adaplex.engine.sequence import Sequence

LOAD_KINDS: dict[Job, LoadKind] = {Job.FETCH: "host", Job.COPY: "copy", Job.LOAD: "host"}


@dataclass(eq=False)
class Pin:
    """An adapter that stays in the arena whether requests use it or not."""

    nbytes: int
    bypassed: int = 0
    """Sequences that leased an adapter since this began to wait for room."""


class UnmergedResidency:
    """Two caches: the arena, whose adapters steps use, and host memory, one copy away.

    An adapter from the store is packed into host memory first, and stays there while its value
    lasts; an adapter for which the host has no room is packed straight into the arena. Pinned
    adapters are loaded into the arena without a request, and not evicted.
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
        """Pins by digest."""

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
        """Bytes of the arena that pins take, loaded or not."""
        return sum(aligned(pin.nbytes) for pin in self._pins.values())

    @property
    def blocked(self) -> bool:
        """True if a pin or a sequence of this step waits for room in the arena."""
        return self._arena.blocked is not None

    @property
    def loading(self) -> int:
        """Number of adapters that load into host memory or into the arena."""
        return self._host.loading + self._arena.loading

    def check(self, adapter: AdapterRef) -> None:
        """Raises AdapterTooLarge or NoRoomBesidePins if the adapter can never be served."""
        name, nbytes = adapter.name, adapter.packed_bytes
        if not self._arena.fits_empty(nbytes):
            raise AdapterTooLarge(
                f"adapter {name} takes {nbytes} bytes in memory; "
                f"the arena has {self._arena.capacity}"
            )
        if not self.fits_beside_pins(adapter.digest, nbytes):
            raise NoRoomBesidePins(name, nbytes, self.pinned_bytes, self._arena.capacity)

    def fits_beside_pins(self, digest: str, nbytes: int) -> bool:
        """Returns True if an adapter is in the arena, or would fit if all but pins were evicted."""
        return self._arena.get(digest) is not None or self._arena.fits_beside(self._pins, nbytes)

    def begin_step(self) -> None:
        """Starts the next jobs of pinned adapters, before those of waiting sequences.

        A pin without room counts the sequences that bypass it, as a waiting sequence does; a pin
        for which other pins leave no room blocks nothing.
        """
        self._arena.begin_step()
        self._host.begin_step()
        for digest, pin in self._pins.items():
            if self._arena.get(digest) is None and not self._start_job(digest, pin.nbytes):
                fits = self._arena.fits_beside(self._pins, pin.nbytes)
                self._arena.blocked = pin if fits else None

    def load(self, sequence: Sequence, digest: str, nbytes: int) -> bool:
        """Starts the next job that loads the adapter of a waiting sequence into the arena.

        Returns False if there is no room: later sequences must not take the room that is freed.
        """
        if self._arena.get(digest) is None and not self._start_job(digest, nbytes):
            self._arena.blocked = sequence
            return False
        return True

    def prefetch(self, digest: str, nbytes: int) -> bool:
        """Fetches an adapter into host memory ahead of time; returns False if that must wait."""
        if self._arena.get(digest):
            return True
        self._host.protect(digest)
        if self._host.get(digest) or not self._host.fits_empty(nbytes):
            return True
        return self._jobs.has_spare_thread(Job.FETCH) and self._start_fetch(digest, nbytes)

    def leasable(self, digest: str) -> bool:
        """Protects an adapter in this step; returns True if a sequence may lease it now."""
        return self._arena.leasable(digest, self._config.max_bypass)

    def lease(self, digest: str, sequence: Sequence) -> None:
        """Prevents an adapter from leaving the arena until the sequence releases it."""
        self._arena.lease(digest, sequence)

    def release(self, digest: str, sequence: Sequence) -> None:
        """Ends the lease of a sequence, if it has one."""
        self._arena.release(digest, sequence)

    def pin(self, digest: str, nbytes: int, name: str) -> None:
        """Loads an adapter into the arena and exempts it from eviction, until it is unpinned,
        unloaded, or fails to load.

        Raises PinsFull if pins would take more than `max_pinned_bytes`, or if the other pins leave
        no contiguous range of the arena that is long enough.
        """
        if digest in self._pins:
            return
        pinned, limit = self.pinned_bytes, self.max_pinned_bytes
        if pinned + aligned(nbytes) > limit or not self.fits_beside_pins(digest, nbytes):
            raise PinsFull(name, nbytes, pinned, limit)
        self._pins[digest] = Pin(nbytes)
        self._arena.cancel_unload(digest)

    def unpin(self, digest: str) -> None:
        """Makes a pinned adapter evictable."""
        self._pins.pop(digest, None)

    def unload(self, digest: str) -> bool:
        """Unpins an adapter and drops it from arena and host once it is idle there; returns True if
        it was in the arena.
        """
        self.unpin(digest)
        self._host.unload(digest)
        return self._arena.unload(digest)

    def complete(self, done: Completion) -> None:
        """Applies a completed job; an adapter whose job failed is absent again, and unpinned."""
        cache = self._host if done.job is Job.FETCH else self._arena
        if done.job is Job.COPY:
            self._host.end_read(done.digest)
        entry = cache.get(done.digest)
        assert entry is not None
        self._observer.adapter_loaded(
            cache=cache.name, outcome="error" if done.error else "ok", seconds=done.seconds
        )
        if done.error is not None:
            cache.cancel_load(done.digest)
            self.unpin(done.digest)
            return
        self._costs.record(LOAD_KINDS[done.job], entry.nbytes, done.seconds)
        cache.finish_load(done.digest)

    def arena_stats(self) -> CacheStats:
        """Returns how full the arena is now."""
        return self._arena.stats()

    def host_stats(self) -> CacheStats:
        """Returns how full host memory is now."""
        return self._host.stats()

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that both caches balance, and that pins are within their limit."""
        self._arena.check_integrity(leases)
        self._host.check_integrity(())
        assert self.pinned_bytes <= self.max_pinned_bytes

    def _start_job(self, digest: str, nbytes: int) -> bool:
        """Starts the next job of an adapter that is absent from the arena, unless one runs or its
        lane is full; returns False if the arena has no room.
        """
        self._host.protect(digest)
        copy = self._host.get(digest)
        if copy is None and self._jobs.full(Job.FETCH):
            return True
        if copy is None and self._start_fetch(digest, nbytes):
            return True
        if copy is not None and not copy.resident:
            return True  # its FETCH runs
        return self.blocked or self._start_load(digest, nbytes)

    def _start_fetch(self, digest: str, nbytes: int) -> bool:
        """Starts to fetch an absent adapter into the host; returns False if there is no room."""
        if not self._host.fits_empty(nbytes) or self._host.reserve(digest, nbytes) is None:
            return False
        self._jobs.submit(Job.FETCH, digest, self._runner.pack_adapter)
        return True

    def _start_load(self, digest: str, nbytes: int) -> bool:
        """Starts to load an adapter into the arena, from its host copy if there is one, unless the
        lane is full; returns False if there is no room.
        """
        job = Job.COPY if self._host.has(digest) else Job.LOAD
        if self._jobs.full(job):
            return True
        if (entry := self._arena.reserve(digest, nbytes, exempt=self._pins)) is None:
            return False
        runner, offset = self._runner, entry.handle
        if job is Job.COPY:
            self._host.begin_read(digest)
            self._jobs.submit_copy(digest, partial(runner.copy_adapter, digest, offset, nbytes))
        else:
            self._jobs.submit(job, digest, lambda p: runner.load_adapter(p, offset, nbytes))
        return True

    def _reload_seconds(self, digest: str, nbytes: int) -> float:
        """Returns the seconds that loading an adapter into the arena again is expected to take."""
        copy = self._costs.seconds("copy", nbytes)
        return copy if self._host.has(digest) else copy + self._costs.seconds("host", nbytes)

"""AdapterCache: the adapters in one kind of memory, with leases and cost-aware eviction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from adaplex.engine.arena_allocator import ArenaAllocator
from adaplex.engine.byte_budget import ByteBudget
from adaplex.engine.eviction import GreedyDual, UseRecord
from adaplex.engine.observer import CacheName, Observer
from adaplex.engine.sequence import Sequence

Space = ArenaAllocator | ByteBudget


class Waiter(Protocol):
    """A sequence or a pin that waits for room in a cache."""

    bypassed: int
    """Sequences that leased an adapter of the cache since this began to wait."""


@dataclass(eq=False)
class CachedAdapter:
    """An adapter that is resident or loading; an absent one has no entry."""

    digest: str
    handle: int
    """The allocation of its bytes; in the arena their offset."""
    nbytes: int
    use: UseRecord
    resident: bool = False
    """False while it loads."""
    unloading: bool = False
    """True if it is dropped when its last lease ends; a new lease cancels that."""
    readers: int = 0
    """Running copies from it into another cache."""
    leases: set[Sequence] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        """True if it is resident, not leased and not read."""
        return self.resident and not self.leases and not self.readers


@dataclass(frozen=True)
class CacheStats:
    """Size and content of one cache."""

    capacity: int
    """Bytes."""
    used: int
    """Bytes of resident and loading adapters."""
    resident: frozenset[str]
    """Digests."""


class AdapterCache:
    """Resident and loading adapters by digest, within the bytes of `space`.

    `remove` drops the content of a digest; `cost` returns the seconds that loading a digest of so
    many bytes again would take.
    """

    def __init__(
        self,
        name: CacheName,
        space: Space,
        remove: Callable[[str], None],
        observer: Observer,
        cost: Callable[[str, int], float] = lambda _digest, nbytes: float(nbytes),
    ) -> None:
        self.name: CacheName = name
        self._space = space
        self._remove = remove
        self._observer = observer
        self._cost = cost
        self._policy = GreedyDual()
        self._entries: dict[str, CachedAdapter] = {}
        self._protected: set[str] = set()
        """Digests that are not evicted in this step: waiting sequences need them."""
        self.blocked: Waiter | None = None
        """The first waiter of this step without room for its adapter."""
        self._resident: frozenset[str] | None = None
        """Cached value of `resident`; None after a change."""

    def begin_step(self) -> None:
        """Ends the protections and the blocking of the last step."""
        self._protected.clear()
        self.blocked = None

    def protect(self, digest: str) -> None:
        """Excludes an adapter, resident, loading or absent, from eviction in this step."""
        self._protected.add(digest)

    def leasable(self, digest: str, max_bypass: int) -> bool:
        """Protects an adapter in this step; returns True if a sequence may lease it now.

        At most `max_bypass` sequences may lease past a blocked waiter.
        """
        self.protect(digest)
        return self.has(digest) and (self.blocked is None or self.blocked.bypassed < max_bypass)

    def get(self, digest: str) -> CachedAdapter | None:
        """Returns the entry of an adapter, None if it is absent."""
        return self._entries.get(digest)

    def has(self, digest: str) -> bool:
        """Returns True if the adapter is resident."""
        entry = self._entries.get(digest)
        return entry is not None and entry.resident

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the resident adapters."""
        if self._resident is None:
            self._resident = frozenset(d for d, entry in self._entries.items() if entry.resident)
        return self._resident

    @property
    def loading(self) -> int:
        """Number of adapters that load."""
        return sum(not entry.resident for entry in self._entries.values())

    @property
    def capacity(self) -> int:
        """Bytes of the cache."""
        return self._space.capacity

    def stats(self) -> CacheStats:
        """Returns how full the cache is now."""
        return CacheStats(self._space.capacity, self._space.used, self.resident)

    def fits_empty(self, nbytes: int) -> bool:
        """Returns True if the cache would have room if it were empty."""
        return self._space.fits_empty(nbytes)

    def fits_beside(self, others: Collection[str], nbytes: int) -> bool:
        """Returns True if the cache would have room if all adapters but `others` were evicted."""
        prices = {e.handle: 0.0 for e in self._entries.values() if e.digest not in others}
        return self._space.victims(nbytes, prices) is not None

    def reserve(
        self, digest: str, nbytes: int, *, exempt: Collection[str] = frozenset()
    ) -> CachedAdapter | None:
        """Allocates bytes for an absent adapter and returns its entry, which is loading.

        Evicts the adapters of least value, none that is leased, read, protected or in `exempt`.
        Returns None, and evicts nothing, if that would not make enough room.
        """
        assert digest not in self._entries
        if (handle := self._space.allocate(nbytes)) is None:
            victims = self._victims(nbytes, exempt)
            if victims is None:
                return None
            for victim in victims:
                self._policy.record_eviction(self._value(victim))
                self._drop(victim)
                self._observer.adapter_evicted(cache=self.name)
            handle = self._space.allocate(nbytes)
            assert handle is not None
        entry = self._entries[digest] = CachedAdapter(
            digest, handle, nbytes, self._policy.first_use()
        )
        return entry

    def finish_load(self, digest: str) -> None:
        """Makes a loading adapter resident."""
        entry = self._entries[digest]
        entry.resident, self._resident = True, None
        self._drop_if_unloading(entry)

    def cancel_load(self, digest: str) -> None:
        """Makes a loading adapter absent again, after its load failed."""
        self._space.free(self._entries.pop(digest).handle)

    def lease(self, digest: str, sequence: Sequence) -> None:
        """Prevents a resident adapter from being dropped until the sequence releases it."""
        entry = self._entries[digest]
        assert entry.resident
        entry.unloading = False
        entry.leases.add(sequence)
        if self.blocked is not None:
            self.blocked.bypassed += 1
        self._policy.record_use(entry.use)

    def release(self, digest: str, sequence: Sequence) -> None:
        """Ends the lease of a sequence, if it has one."""
        entry = self._entries.get(digest)
        if entry is None or sequence not in entry.leases:
            return
        entry.leases.remove(sequence)
        entry.use.clock = self._policy.clock
        self._drop_if_unloading(entry)

    def begin_read(self, digest: str) -> None:
        """Prevents a resident adapter from being dropped until `end_read`: it is being copied."""
        entry = self._entries[digest]
        entry.readers += 1
        self._policy.record_use(entry.use)

    def end_read(self, digest: str) -> None:
        """Ends one `begin_read`."""
        entry = self._entries[digest]
        entry.readers -= 1
        self._drop_if_unloading(entry)

    def unload(self, digest: str) -> bool:
        """Drops an adapter once it is idle; returns True if it was resident."""
        entry = self._entries.get(digest)
        if entry is None:
            return False
        resident, entry.unloading = entry.resident, True
        self._drop_if_unloading(entry)
        return resident

    def cancel_unload(self, digest: str) -> None:
        """Cancels an `unload` that waits for the adapter to be idle."""
        if entry := self._entries.get(digest):
            entry.unloading = False

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that exactly these leases exist, and that the bytes are those of the entries."""
        found = {(d, sequence) for d, entry in self._entries.items() for sequence in entry.leases}
        assert found == set(leases)
        for entry in self._entries.values():
            assert entry.resident or not (entry.leases or entry.readers)
            assert not (entry.unloading and entry.idle)
            assert entry.readers >= 0
        self._space.check_integrity([entry.handle for entry in self._entries.values()])

    def _victims(self, nbytes: int, exempt: Collection[str]) -> list[CachedAdapter] | None:
        """Returns the evictable entries of least value that make room for `nbytes`, if any do."""
        evictable = {
            entry.handle: entry
            for entry in self._entries.values()
            if entry.idle and entry.digest not in self._protected and entry.digest not in exempt
        }
        prices = {handle: self._value(entry) for handle, entry in evictable.items()}
        chosen = self._space.victims(nbytes, prices)
        return None if chosen is None else [evictable[handle] for handle in chosen]

    def _value(self, entry: CachedAdapter) -> float:
        seconds = self._cost(entry.digest, entry.nbytes)
        return self._policy.value(entry.use, seconds, entry.nbytes)

    def _drop_if_unloading(self, entry: CachedAdapter) -> None:
        if entry.unloading and entry.idle:
            self._drop(entry)

    def _drop(self, entry: CachedAdapter) -> None:
        """Drops the content before its bytes are freed, since they may be reused at once."""
        self._resident = None
        self._remove(entry.digest)
        self._space.free(self._entries.pop(entry.digest).handle)

"""AdapterCache: adapters in one kind of memory, with leases and cost-aware eviction."""

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
    """Who waits for room: a sequence, or a pin."""

    bypassed: int
    """Sequences that leased an adapter of the tier meanwhile."""


@dataclass(eq=False)
class CachedAdapter:
    """One adapter that is in the tier or on its way; what has no entry is absent."""

    digest: str
    handle: int
    """Where it is in the space: an offset in the arena."""
    nbytes: int
    usage: UseRecord
    resident: bool = False
    """False while it loads."""
    leaving: bool = False
    """To be dropped once nobody leases it; a new lease cancels that."""
    readers: int = 0
    """Loads into a faster tier that copy from it."""
    leases: set[Sequence] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        """Whether nobody needs it where it is: it is there, and neither leased nor read."""
        return self.resident and not self.leases and not self.readers


@dataclass(frozen=True)
class CacheStats:
    """How full one cache is."""

    capacity: int
    """Bytes."""
    used: int
    """Bytes of resident and loading adapters."""
    resident: frozenset[str]
    """Digests."""


class AdapterCache:
    """Entries by digest. `remove` forgets the content of one; `cost` says how many seconds bringing
    back a digest of so many bytes would take.
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
        """None after a change."""

    def begin_step(self) -> None:
        """Ends the protections and the blocking of the last step."""
        self._protected.clear()
        self.blocked = None

    def protect(self, digest: str) -> None:
        """Keeps an adapter, resident, loading or absent, from being evicted in this step."""
        self._protected.add(digest)

    def leasable(self, digest: str, max_bypass: int) -> bool:
        """Protects an adapter in this step; returns True if a sequence may lease it now.

        Behind a blocked waiter, which counts them, at most `max_bypass` sequences may lease.
        """
        self.protect(digest)
        return self.has(digest) and (self.blocked is None or self.blocked.bypassed < max_bypass)

    def get(self, digest: str) -> CachedAdapter | None:
        """The entry of an adapter, None when it is absent."""
        return self._entries.get(digest)

    def has(self, digest: str) -> bool:
        """Whether the adapter is resident."""
        entry = self._entries.get(digest)
        return entry is not None and entry.resident

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the resident adapters."""
        if self._resident is None:
            self._resident = frozenset(d for d, entry in self._entries.items() if entry.resident)
        return self._resident

    @property
    def capacity(self) -> int:
        """Bytes of the cache."""
        return self._space.capacity

    def stats(self) -> CacheStats:
        """Returns how full the cache is now."""
        return CacheStats(self._space.capacity, self._space.used, self.resident)

    @property
    def loading(self) -> int:
        """Number of adapters that load."""
        return sum(not entry.resident for entry in self._entries.values())

    def reserve(
        self, digest: str, nbytes: int, *, keep: Collection[str] = frozenset()
    ) -> CachedAdapter | None:
        """Room for an absent adapter, which is loading from now on.

        Evicts the adapters of least value, none that is in use, protected or in `keep`. Returns
        None, and evicts nothing, if that would not make enough room.
        """
        assert digest not in self._entries
        if (handle := self._space.allocate(nbytes)) is None:
            victims = self._victims(nbytes, keep)
            if victims is None:
                return None
            for victim in victims:
                self._policy.evicted(self._value(victim))
                self._drop(victim)
                self._observer.adapter_evicted(tier=self.name)
            handle = self._space.allocate(nbytes)
            assert handle is not None
        entry = self._entries[digest] = CachedAdapter(
            digest, handle, nbytes, self._policy.first_use()
        )
        return entry

    def fits_empty(self, nbytes: int) -> bool:
        """Returns True if the cache would have room if it were empty."""
        return self._space.could_hold(nbytes)

    def fits_beside(self, kept: Collection[str], nbytes: int) -> bool:
        """Returns True if the cache would have room if all adapters but `kept` were gone."""
        prices = {e.handle: 0.0 for e in self._entries.values() if e.digest not in kept}
        return self._space.victims(nbytes, prices) is not None

    def loaded(self, digest: str) -> None:
        """The content is there."""
        entry = self._entries[digest]
        entry.resident, self._resident = True, None
        self._drop_if_leaving(entry)

    def failed(self, digest: str) -> None:
        """The content will not come; the adapter is absent again."""
        self._space.free(self._entries.pop(digest).handle)

    def lease(self, digest: str, sequence: Sequence) -> None:
        """Keeps a resident adapter in place until the sequence releases it."""
        entry = self._entries[digest]
        assert entry.resident
        entry.leaving = False
        entry.leases.add(sequence)
        if self.blocked is not None:
            self.blocked.bypassed += 1
        self.used(digest)

    def release(self, digest: str, sequence: Sequence) -> None:
        """Ends the lease of a sequence, if it has one."""
        entry = self._entries.get(digest)
        if entry is None or sequence not in entry.leases:
            return
        entry.leases.remove(sequence)
        entry.usage.clock = self._policy.clock
        self._drop_if_leaving(entry)

    def used(self, digest: str) -> None:
        """The adapter was of use once more."""
        self._policy.use(self._entries[digest].usage)

    def read(self, digest: str) -> None:
        """A resident adapter stays until `read_ended`: it is being copied."""
        self._entries[digest].readers += 1
        self.used(digest)

    def read_ended(self, digest: str) -> None:
        """One copy is made."""
        entry = self._entries[digest]
        entry.readers -= 1
        self._drop_if_leaving(entry)

    def unload(self, digest: str) -> bool:
        """Drops an adapter as soon as nobody needs it here; whether it was resident."""
        entry = self._entries.get(digest)
        if entry is None:
            return False
        resident, entry.leaving = entry.resident, True
        self._drop_if_leaving(entry)
        return resident

    def cancel_unload(self, digest: str) -> None:
        """Keeps an adapter that was to be dropped after its last lease."""
        if entry := self._entries.get(digest):
            entry.leaving = False

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that exactly these leases exist, and that the bytes are those of the entries."""
        held = {(d, sequence) for d, entry in self._entries.items() for sequence in entry.leases}
        assert held == set(leases)
        for entry in self._entries.values():
            assert entry.resident or not (entry.leases or entry.readers)
            assert not (entry.leaving and entry.idle)
            assert entry.readers >= 0
        self._space.check_integrity([entry.handle for entry in self._entries.values()])

    def _victims(self, nbytes: int, keep: Collection[str]) -> list[CachedAdapter] | None:
        """The cheapest entries whose place is enough."""
        evictable = {
            entry.handle: entry
            for entry in self._entries.values()
            if entry.idle and entry.digest not in self._protected and entry.digest not in keep
        }
        prices = {handle: self._value(entry) for handle, entry in evictable.items()}
        chosen = self._space.victims(nbytes, prices)
        return None if chosen is None else [evictable[handle] for handle in chosen]

    def _value(self, entry: CachedAdapter) -> float:
        seconds = self._cost(entry.digest, entry.nbytes)
        return self._policy.value(entry.usage, seconds, entry.nbytes)

    def _drop_if_leaving(self, entry: CachedAdapter) -> None:
        if entry.leaving and entry.idle:
            self._drop(entry)

    def _drop(self, entry: CachedAdapter) -> None:
        """Forgets the content first: the bytes may be reused right after."""
        self._resident = None
        self._remove(entry.digest)
        self._space.free(self._entries.pop(entry.digest).handle)

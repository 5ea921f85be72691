"""Tier: adapters in one kind of memory, with leases and LRU eviction under a byte limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from adaplex.engine.byte_budget import ByteBudget
from adaplex.engine.extents import ExtentAllocator
from adaplex.engine.observer import Observer
from adaplex.engine.observer import Tier as TierName
from adaplex.engine.sequence import Sequence

Space = ExtentAllocator | ByteBudget


@dataclass(eq=False)
class Entry:
    """One adapter that is in the tier or on its way; what has no entry is absent."""

    digest: str
    handle: int
    """Where it is in the space: an offset in the arena."""
    resident: bool = False
    """False while it loads."""
    leaving: bool = False
    """To be dropped once nobody leases it; a new lease cancels that."""
    leases: set[Sequence] = field(default_factory=set)

    @property
    def evictable(self) -> bool:
        """Whether it may make room: never while it loads or a sequence leases it."""
        return self.resident and not self.leases


class Tier:
    """Entries by digest, least recently used first. `remove` forgets the content of one."""

    def __init__(
        self, name: TierName, space: Space, remove: Callable[[str], None], observer: Observer
    ) -> None:
        self.name: TierName = name
        self.space = space
        self._remove = remove
        self._observer = observer
        self._entries: dict[str, Entry] = {}
        self.wanted: set[str] = set()
        """Adapters that the waiting sequences asked for so far this round; not evicted in it."""
        self.blocked: Sequence | None = None
        """The first waiting sequence of this round for which there is no room."""

    def start_round(self) -> None:
        """Forgets what the last round wanted."""
        self.wanted.clear()
        self.blocked = None

    def open(self, max_bypass: int) -> bool:
        """Whether sequences behind a blocked one may lease; the blocked one counts who does."""
        return self.blocked is None or self.blocked.bypassed < max_bypass

    def get(self, digest: str) -> Entry | None:
        """The entry of an adapter, None when it is absent."""
        return self._entries.get(digest)

    def has(self, digest: str) -> bool:
        """Whether the adapter is resident."""
        entry = self._entries.get(digest)
        return entry is not None and entry.resident

    @property
    def resident(self) -> frozenset[str]:
        """Digests of the resident adapters."""
        return frozenset(d for d, entry in self._entries.items() if entry.resident)

    @property
    def loading(self) -> int:
        """Adapters on their way."""
        return sum(not entry.resident for entry in self._entries.values())

    def reserve(
        self, digest: str, nbytes: int, *, keep: Collection[str] = frozenset()
    ) -> Entry | None:
        """Room for an absent adapter, which is loading from now on.

        Evicts unleased adapters, least recently used first, none that is wanted or in `keep`.
        None, and nothing is evicted, when that would not make one large enough hole.
        """
        assert digest not in self._entries
        victims = [
            entry
            for entry in self._entries.values()
            if entry.evictable and entry.digest not in self.wanted and entry.digest not in keep
        ]
        if not self.space.fits(nbytes, without={victim.handle for victim in victims}):
            return None
        candidates = iter(victims)
        while (handle := self.space.allocate(nbytes)) is None:
            self._drop(next(candidates))
            self._observer.adapter_evicted(tier=self.name)
        entry = self._entries[digest] = Entry(digest, handle)
        return entry

    def loaded(self, digest: str) -> None:
        """The content is there."""
        entry = self._entries[digest]
        entry.resident = True
        if entry.leaving:
            self._drop(entry)

    def failed(self, digest: str) -> None:
        """The content will not come; the adapter is absent again."""
        self.space.free(self._entries.pop(digest).handle)

    def lease(self, digest: str, sequence: Sequence) -> None:
        """Keeps a resident adapter in place until the sequence releases it."""
        entry = self._entries[digest]
        assert entry.resident
        entry.leaving = False
        entry.leases.add(sequence)
        if self.blocked is not None:
            self.blocked.bypassed += 1
        self._touch(entry)

    def release(self, digest: str, sequence: Sequence) -> None:
        """Ends the lease of a sequence, if it has one."""
        entry = self._entries.get(digest)
        if entry is None or sequence not in entry.leases:
            return
        entry.leases.remove(sequence)
        self._touch(entry)
        if entry.leaving and entry.evictable:
            self._drop(entry)

    def unload(self, digest: str) -> bool:
        """Drops an adapter as soon as nobody leases it; whether it was resident."""
        entry = self._entries.get(digest)
        if entry is None:
            return False
        entry.leaving = True
        resident = entry.resident
        if entry.evictable:
            self._drop(entry)
        return resident

    def check_integrity(self, leases: Iterable[tuple[str, Sequence]]) -> None:
        """Asserts that exactly these leases exist, and that the bytes are those of the entries."""
        held = {(d, sequence) for d, entry in self._entries.items() for sequence in entry.leases}
        assert held == set(leases)
        assert all(entry.resident for entry in self._entries.values() if entry.leases)
        assert not any(entry.leaving and entry.evictable for entry in self._entries.values())
        self.space.check_integrity([entry.handle for entry in self._entries.values()])

    def _touch(self, entry: Entry) -> None:
        self._entries[entry.digest] = self._entries.pop(entry.digest)

    def _drop(self, entry: Entry) -> None:
        """Forgets the content first: the bytes may be reused right after."""
        self._remove(entry.digest)
        self.space.free(self._entries.pop(entry.digest).handle)

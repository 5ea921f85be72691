"""Names: what each stands for, and how that changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adaplex.adapters.durable_files import full_disk_is_store_full
from adaplex.adapters.errors import AdapterNotFound
from adaplex.adapters.storage.adapter_record import AdapterRecord
from adaplex.adapters.storage.alias_split import Target, checked_split
from adaplex.adapters.storage.catalog import Catalog, Query, StoreUsage
from adaplex.adapters.storage.event import Event, Origin
from adaplex.adapters.storage.garbage_collector import GarbageCollector
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.selector import DEFAULT, NAME, Selector


@dataclass(frozen=True)
class Deleted:
    """How many versions are gone, and the contents that went with them."""

    versions: int
    digests: tuple[str, ...]


class Names:
    """Versions, aliases, labels and history. Thread-safe; every change is durable at return, and
    seen by the next request.
    """

    def __init__(self, catalog: Catalog, garbage: GarbageCollector, *, element_bytes: int) -> None:
        self._catalog, self._garbage, self._element_bytes = catalog, garbage, element_bytes

    def get(self, selector: str, *, routing_key: str = "") -> AdapterRecord:
        """The record that a selector names. Raises AdapterNotFound."""
        parts = Selector.parse(selector)
        if parts is None:
            raise AdapterNotFound(f"no adapter {selector!r:.200}")
        if parts.digest:
            found = self._catalog.by_digest(parts.digest)
            if found is None:
                raise AdapterNotFound(f"no adapter {selector}")
            entry, version = found
            return version.record(entry.name, self._element_bytes)
        entry, alias = self.entry(parts.name), ""
        if parts.version:
            version = entry.version(parts.version)
        else:
            version, alias = entry.resolve(parts.alias, routing_key)
        return version.record(entry.name, self._element_bytes, alias)

    def entry(self, name: str) -> NameRecord:
        """All that is known under a name. Raises AdapterNotFound."""
        return _alive(name, self._find(name))

    def exists(self, name: str) -> bool:
        """Whether the name has a version."""
        entry = self._find(name)
        return entry is not None and entry.alive

    def version_exists(self, record: AdapterRecord) -> bool:
        """Whether the version that a record is of still exists."""
        entry = self._find(record.name)
        return entry is not None and any(v.number == record.version for v in entry.versions)

    def is_deleted(self, name: str) -> bool:
        """Whether the name was deleted, and not given again."""
        entry = self._find(name)
        return entry is not None and not entry.alive

    def history(self, name: str) -> tuple[Event, ...]:
        """What happened to a name, newest first, also to one that is deleted. Raises
        AdapterNotFound for one that never was.
        """
        entry = self._find(name)
        if entry is None:
            raise AdapterNotFound(f"no adapter {name!r:.200}")
        return entry.history[::-1]

    def query(self, query: Query) -> list[NameRecord]:
        """Entries, filtered and ordered."""
        return self._catalog.query(query)

    def cursor(self, entry: NameRecord, query: Query) -> tuple[str | int, str]:
        """Query.after for the page behind an entry of this query."""
        return self._catalog.order_value(entry, query.order), entry.name

    def latest(self, entry: NameRecord) -> AdapterRecord:
        """The newest version of an entry that is alive."""
        return entry.latest.record(entry.name, self._element_bytes)

    def reachable(self, name: str) -> list[AdapterRecord]:
        """What a bare name can lead to now. Raises AdapterNotFound."""
        versions = self.entry(name).reachable()
        return [version.record(name, self._element_bytes) for version in versions]

    def candidates(self, selector: str) -> list[AdapterRecord]:
        """All that a selector can lead to: several where it follows a split. Raises
        AdapterNotFound.
        """
        parts = Selector.parse(selector)
        if parts is None or parts.digest or parts.version or parts.alias not in ("", DEFAULT):
            return [self.get(selector)]
        return self.reachable(parts.name)

    def pinned(self) -> list[AdapterRecord]:
        """What the pinned names can lead to now."""
        return [
            version.record(entry.name, self._element_bytes)
            for entry in self._catalog.pinned()
            for version in entry.reachable()
        ]

    def usage(self) -> StoreUsage:
        """How full the store is."""
        return self._catalog.usage()

    def update(
        self,
        name: str,
        origin: Origin,
        *,
        description: str | None = None,
        set_labels: Mapping[str, str] | None = None,
        remove_labels: Sequence[str] = (),
        pinned: bool | None = None,
    ) -> NameRecord:
        """Changes what is not None. Raises AdapterNotFound or AdapterInvalid."""

        def change(entry: NameRecord) -> NameRecord:
            labels = {**entry.labels, **(set_labels or {})}
            kept = {key: value for key, value in labels.items() if key not in remove_labels}
            return entry.update_metadata(
                origin, description=description, labels=kept, pinned=pinned
            )

        return self._change(name, change)

    def set_alias(
        self, name: str, alias: str, targets: Sequence[Target], origin: Origin
    ) -> NameRecord:
        """Points an alias to a version or to several by weight, in one step.

        Raises AdapterNotFound or AdapterInvalid.
        """
        split = checked_split(targets)
        return self._change(name, lambda entry: entry.set_alias(alias, split, origin))

    def delete_alias(self, name: str, alias: str, origin: Origin) -> NameRecord:
        """Forgets an alias. Raises AdapterNotFound or AdapterInvalid."""
        return self._change(name, lambda entry: entry.set_alias(alias, (), origin))

    def rollback(self, name: str, alias: str, origin: Origin) -> NameRecord:
        """Points an alias, by default `default`, to what it pointed to before.

        Raises AdapterNotFound or AdapterInvalid.
        """
        return self._change(name, lambda entry: entry.rollback(alias or DEFAULT, origin))

    def delete(self, selector: str, origin: Origin) -> Deleted:
        """Forgets a name, or one version. Content goes when no name and no lease holds it.

        Raises AdapterNotFound, AdapterInvalid while an alias points to the version, or StoreFull
        when the disk has no room to note it.
        """
        parts = Selector.parse(selector)
        if parts is None or parts.digest or parts.alias:
            raise AdapterNotFound(f"no adapter {selector!r:.200}")
        before: list[NameRecord] = []

        def change(entry: NameRecord) -> NameRecord:
            before[:] = [entry]
            if parts.version:
                return entry.remove_version(parts.version, origin)
            return entry.remove(origin)

        after = self._change(parts.name, change)
        left = {version.number for version in after.versions}
        removed = [version for version in before[0].versions if version.number not in left]
        gone = filter(
            self._garbage.discard_if_unused, sorted({version.digest for version in removed})
        )
        return Deleted(len(removed), tuple(gone))

    def _find(self, name: str) -> NameRecord | None:
        """The entry of a name that a client sent; what is no name has none."""
        return self._catalog.get(name) if NAME.fullmatch(name) else None

    @full_disk_is_store_full()
    def _change(self, name: str, change: Callable[[NameRecord], NameRecord]) -> NameRecord:
        """Changes an entry that is alive."""
        if not NAME.fullmatch(name):
            raise AdapterNotFound(f"no adapter {name!r:.200}")
        return self._catalog.update(name, lambda entry: change(_alive(name, entry)))


def _alive(name: str, entry: NameRecord | None) -> NameRecord:
    """The entry of a name, if it has a version. Raises AdapterNotFound."""
    if entry is None or not entry.alive:
        raise AdapterNotFound(f"no adapter {name!r:.200}")
    return entry

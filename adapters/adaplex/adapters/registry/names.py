"""Names: the operations on names, versions, aliases and labels."""

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
    """Number of deleted versions, and the digests that nothing here uses any more."""

    versions: int
    digests: tuple[str, ...]


class Names:
    """Reads and changes names. Thread-safe. A change is durable once it returns, and applies to
    the next request.
    """

    def __init__(self, catalog: Catalog, garbage: GarbageCollector, *, element_bytes: int) -> None:
        self._catalog, self._garbage, self._element_bytes = catalog, garbage, element_bytes

    def get(self, selector: str, *, routing_key: str = "") -> AdapterRecord:
        """Returns the record of a selector; see NameRecord.resolve. Raises AdapterNotFound."""
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
        """Returns the entry of a name that has a version. Raises AdapterNotFound."""
        return _alive(name, self._find(name))

    def exists(self, name: str) -> bool:
        """Returns True if the name has a version."""
        entry = self._find(name)
        return entry is not None and entry.alive

    def version_exists(self, record: AdapterRecord) -> bool:
        """Returns True if the version of a record has not been deleted."""
        entry = self._find(record.name)
        return entry is not None and any(v.number == record.version for v in entry.versions)

    def is_deleted(self, name: str) -> bool:
        """Returns True if the name was deleted, and not used again."""
        entry = self._find(name)
        return entry is not None and not entry.alive

    def history(self, name: str) -> tuple[Event, ...]:
        """Returns the events of a name, deleted or not, newest first.

        Raises AdapterNotFound for a name that never had a version.
        """
        entry = self._find(name)
        if entry is None:
            raise AdapterNotFound(f"no adapter {name!r:.200}")
        return entry.history[::-1]

    def query(self, query: Query) -> list[NameRecord]:
        """Returns the entries of a query."""
        return self._catalog.query(query)

    def cursor(self, entry: NameRecord, query: Query) -> tuple[str | int, str]:
        """Returns Query.after for the page that follows an entry of this query."""
        return self._catalog.order_value(entry, query.order), entry.name

    def latest(self, entry: NameRecord) -> AdapterRecord:
        """Returns the record of an entry's newest version. The entry must have one."""
        return entry.latest.record(entry.name, self._element_bytes)

    def reachable(self, name: str) -> list[AdapterRecord]:
        """Returns the records that a bare name can resolve to. Raises AdapterNotFound."""
        versions = self.entry(name).reachable()
        return [version.record(name, self._element_bytes) for version in versions]

    def candidates(self, selector: str) -> list[AdapterRecord]:
        """Returns the records that a selector can resolve to: several for a bare name whose
        `default` is a split. Raises AdapterNotFound.
        """
        parts = Selector.parse(selector)
        if parts is None or parts.digest or parts.version or parts.alias not in ("", DEFAULT):
            return [self.get(selector)]
        return self.reachable(parts.name)

    def pinned(self) -> list[AdapterRecord]:
        """Returns the records that pinned names can resolve to."""
        return [
            version.record(entry.name, self._element_bytes)
            for entry in self._catalog.pinned()
            for version in entry.reachable()
        ]

    def usage(self) -> StoreUsage:
        """Returns the number of names and the stored bytes."""
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
        """Changes the arguments that are not None. Raises AdapterNotFound or AdapterInvalid."""

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
        """Points an alias to a version, or to several by weight, atomically.

        Raises AdapterNotFound or AdapterInvalid.
        """
        split = checked_split(targets)
        return self._change(name, lambda entry: entry.set_alias(alias, split, origin))

    def delete_alias(self, name: str, alias: str, origin: Origin) -> NameRecord:
        """Removes an alias. Raises AdapterNotFound or AdapterInvalid."""
        return self._change(name, lambda entry: entry.set_alias(alias, (), origin))

    def rollback(self, name: str, alias: str, origin: Origin) -> NameRecord:
        """Points an alias, if empty `default`, to its previous targets; see NameRecord.rollback.

        Raises AdapterNotFound or AdapterInvalid.
        """
        return self._change(name, lambda entry: entry.rollback(alias or DEFAULT, origin))

    def delete(self, selector: str, origin: Origin) -> Deleted:
        """Deletes a name, or one version of it. Content is removed once no name and no lease
        refers to it.

        Raises AdapterNotFound, AdapterInvalid while an alias points to the version, or StoreFull
        if the disk has no space for the change.
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
        """Returns the entry of a name from a client, None for an invalid name."""
        return self._catalog.get(name) if NAME.fullmatch(name) else None

    @full_disk_is_store_full()
    def _change(self, name: str, change: Callable[[NameRecord], NameRecord]) -> NameRecord:
        """Changes the entry of a name that has a version. Raises AdapterNotFound."""
        if not NAME.fullmatch(name):
            raise AdapterNotFound(f"no adapter {name!r:.200}")
        return self._catalog.update(name, lambda entry: change(_alive(name, entry)))


def _alive(name: str, entry: NameRecord | None) -> NameRecord:
    """Returns `entry` if it has a version, else raises AdapterNotFound."""
    if entry is None or not entry.alive:
        raise AdapterNotFound(f"no adapter {name!r:.200}")
    return entry

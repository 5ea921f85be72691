"""NameRecord: versions, aliases, labels and history of one name, immutable.

Methods that change a name return a new record. Catalogs store one record for each name, their
entries, and replace it atomically.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound, StoreFull, listed
from adaplex.adapters.storage.alias_split import Split, Target, choose_version
from adaplex.adapters.storage.event import Event, Origin
from adaplex.adapters.storage.selector import ALIAS, DEFAULT, LATEST
from adaplex.adapters.storage.version import Version

MAX_EVENTS = 500
"""Newest events in the history of a name; older ones are dropped."""
MAX_ALIASES = 64
MAX_LABELS = 64
MAX_LABEL_KEY, MAX_LABEL_VALUE = 63, 256
"""Characters."""
MAX_DESCRIPTION = 1024
"""Characters."""


@dataclass(frozen=True)
class NameRecord:
    """A name. A deleted one stays as a tombstone, so that no version number is given twice."""

    name: str
    last_version: int = 0
    """Highest version number ever given."""
    versions: tuple[Version, ...] = ()
    """Ordered by number."""
    aliases: Mapping[str, Split] = field(default_factory=dict)
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    pinned: bool = False
    history: tuple[Event, ...] = ()
    """Oldest first."""

    @property
    def alive(self) -> bool:
        """True if the name has a version."""
        return bool(self.versions)

    @property
    def latest(self) -> Version:
        """The newest version. The name must have one."""
        return self.versions[-1]

    @property
    def updated(self) -> datetime:
        """Time of the last change."""
        return self.history[-1].time

    def version(self, number: int) -> Version:
        """Returns a version by number. Raises AdapterNotFound."""
        for version in reversed(self.versions):
            if version.number == number:
                return version
        newest = listed(version.number for version in reversed(self.versions))
        raise AdapterNotFound(f"{self.name} has no version {number}; it has {newest}")

    def resolve(self, alias: str, routing_key: str = "") -> tuple[Version, str]:
        """Returns the version that an alias, or the bare name if empty, leads to, and the alias
        followed. `routing_key` is the key of `choose_version`. Raises AdapterNotFound.
        """
        if not self.alive:
            raise AdapterNotFound(f"no adapter {self.name}")
        followed = alias or (DEFAULT if DEFAULT in self.aliases else LATEST)
        if followed == LATEST:
            return self.latest, LATEST
        if followed not in self.aliases:
            raise self._no_alias(followed)
        scope = f"{self.name}@{followed}"
        return self.version(choose_version(self.aliases[followed], routing_key, scope)), followed

    def reachable(self) -> tuple[Version, ...]:
        """Returns the versions that the bare name can lead to."""
        split = self.aliases.get(DEFAULT)
        return tuple(self.version(t.version) for t in split) if split else (self.latest,)

    def add(self, version: Version, *, max_versions: int) -> NameRecord:
        """Returns the record with a new version, numbered next. Raises StoreFull."""
        if len(self.versions) >= max_versions:
            raise StoreFull(
                f"{self.name} has {len(self.versions)} versions, the limit is {max_versions}; "
                "delete some",
                field="max_versions",
            )
        numbered = replace(version, number=self.last_version + 1)
        event = Event(
            time=version.created,
            kind="upload",
            version=numbered.number,
            digest=version.digest,
            actor=version.actor,
            source=version.source,
        )
        grown = replace(self, last_version=numbered.number, versions=(*self.versions, numbered))
        return grown._with_event(event)

    def set_alias(self, alias: str, split: Split, origin: Origin) -> NameRecord:
        """Returns the record with an alias that points to `split`, or without it if that is empty.

        Raises AdapterInvalid or AdapterNotFound.
        """
        self._check_alias(alias)
        for target in split:
            self.version(target.version)
        before = self.aliases.get(alias, ())
        if not split and not before:
            raise self._no_alias(alias, field="alias")
        if before == split:
            return self
        rest = {name: kept for name, kept in self.aliases.items() if name != alias}
        if len(rest) >= MAX_ALIASES:
            raise AdapterInvalid.because(
                "alias", f"{self.name} has {MAX_ALIASES} aliases already, the limit; delete one"
            )
        event = Event(
            origin.time, "alias", alias=alias, before=before, after=split, actor=origin.actor
        )
        return replace(self, aliases=rest | ({alias: split} if split else {}))._with_event(event)

    def rollback(self, alias: str, origin: Origin) -> NameRecord:
        """Returns the record with an alias as it was before its last change; a second rollback
        undoes the first.

        A `default` that was never set goes to the version before the newest.
        Raises AdapterInvalid if there is no earlier target, or its version was deleted.
        """
        self._check_alias(alias)
        changes: list[Event] = []
        for event in self.history:
            if event.kind == "delete":  # earlier events are of the deleted adapter
                changes.clear()
            elif event.kind == "alias" and event.alias == alias:
                changes.append(event)
        if changes and (changes[-1].before or alias in self.aliases):
            split = changes[-1].before
        elif alias == DEFAULT and alias not in self.aliases and len(self.versions) > 1:
            split = (Target(self.versions[-2].number),)
        else:
            raise AdapterInvalid.because("alias", f"{self.name}@{alias} has no earlier target")
        known = {version.number for version in self.versions}
        if lost := [str(t.version) for t in split if t.version not in known]:
            reason = f"{self.name}@{alias} pointed to version {', '.join(lost)}, which was deleted"
            raise AdapterInvalid.because("alias", reason)
        return self.set_alias(alias, split, origin)

    def remove_version(self, number: int, origin: Origin) -> NameRecord:
        """Returns the record without a version.

        Raises AdapterNotFound, or AdapterInvalid while an alias points to the version.
        """
        gone = self.version(number)
        for alias, split in self.aliases.items():
            if any(target.version == number for target in split):
                reason = f"{self.name}@{alias} points to version {number}; point it elsewhere first"
                raise AdapterInvalid.because("name", reason)
        if len(self.versions) == 1:
            return self.remove(origin)
        left = tuple(version for version in self.versions if version != gone)
        event = Event(origin.time, "delete_version", number, gone.digest, actor=origin.actor)
        return replace(self, versions=left)._with_event(event)

    def remove(self, origin: Origin) -> NameRecord:
        """Returns the tombstone. Raises AdapterNotFound if this is one."""
        if not self.alive:
            raise AdapterNotFound(f"no adapter {self.name}")
        event = Event(
            origin.time, "delete", actor=origin.actor, detail=f"{len(self.versions)} versions"
        )
        return NameRecord(self.name, self.last_version, history=self.history)._with_event(event)

    def update_metadata(
        self,
        origin: Origin,
        *,
        description: str | None = None,
        labels: Mapping[str, str] | None = None,
        pinned: bool | None = None,
    ) -> NameRecord:
        """Returns the record with every argument that is not None. Raises AdapterInvalid."""
        updated = replace(
            self,
            description=self.description if description is None else description,
            labels=self.labels if labels is None else labels,
            pinned=self.pinned if pinned is None else pinned,
        )
        fields = ("description", "labels", "pinned")
        changed = [name for name in fields if getattr(updated, name) != getattr(self, name)]
        if not changed:
            return self
        _check_description(updated.description)
        _check_labels(updated.labels)
        event = Event(origin.time, "update", actor=origin.actor, detail=", ".join(changed))
        return updated._with_event(event)

    def check_integrity(self) -> None:
        """Asserts the invariants of the operations above."""
        numbers = [version.number for version in self.versions]
        assert numbers == sorted(set(numbers))
        assert not numbers or numbers[-1] <= self.last_version
        targets = {target.version for split in self.aliases.values() for target in split}
        assert targets <= set(numbers)
        assert self.history, "every record begins with an event"

    def _with_event(self, event: Event) -> NameRecord:
        return replace(self, history=(*self.history, event)[-MAX_EVENTS:])

    def _no_alias(self, alias: str, *, field: str = "adapter") -> AdapterNotFound:
        aliases = listed([LATEST, *sorted(self.aliases)])
        return AdapterNotFound(f"{self.name} has no alias {alias}; it has {aliases}", field=field)

    def _check_alias(self, alias: str) -> None:
        if not self.alive:
            raise AdapterNotFound(f"no adapter {self.name}")
        if not ALIAS.fullmatch(alias):
            reason = f"{alias!r:.100} does not match ^{ALIAS.pattern}$"
            raise AdapterInvalid.because("alias", reason)
        if alias == LATEST:
            raise AdapterInvalid.because(
                "alias", f"{LATEST} is always the newest version and cannot be set"
            )


def _check_description(description: str) -> None:
    if len(description) > MAX_DESCRIPTION:
        reason = f"has {len(description)} characters, the limit is {MAX_DESCRIPTION}"
        raise AdapterInvalid.because("description", reason)


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        reason = f"would make {len(labels)} labels, must be at most {MAX_LABELS}; remove some"
        raise AdapterInvalid.because("set_labels", reason)
    for key, value in labels.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY or len(value) > MAX_LABEL_VALUE:
            raise AdapterInvalid.because(
                "set_labels",
                f"{key!r:.100} has {len(key)} characters and a value of {len(value)}; "
                f"keys have 1 to {MAX_LABEL_KEY}, values at most {MAX_LABEL_VALUE}",
            )

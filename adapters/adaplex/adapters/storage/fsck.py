"""fsck: whether every adapter that is named is there, whole, and what it says it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.errors import AdapterError, AdapterNotFound
from adaplex.adapters.formats import FORMATS, identity, kind_of
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.storage.catalog import Catalog
from adaplex.adapters.storage.content_store import ContentStore


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be. `adapter` is `name@version`, or empty."""

    kind: str
    """`catalog`, `missing`, `damaged` or `orphan`; the last loses nothing."""
    digest: str
    adapter: str
    reason: str

    @property
    def harmless(self) -> bool:
        """Whether every adapter can be served all the same."""
        return self.kind == "orphan"


def check_store(catalog: Catalog, contents: ContentStore) -> Iterator[Problem]:
    """Reads every stored adapter whole and says what is wrong. Needs no base model, and may run
    beside servers on the same store.
    """
    try:
        catalog.check_integrity()
    except (AssertionError, AdapterError) as error:
        yield Problem("catalog", "", "", str(error) or "its index does not fit its entries")
    for digest in sorted(catalog.digests()):
        if (reason := _damage(contents, digest)) is None:
            continue
        found = catalog.by_digest(digest)
        if found is None:  # deleted meanwhile
            continue
        entry, version = found
        kind = "damaged" if contents.has(digest) else "missing"
        yield Problem(kind, digest, f"{entry.name}@{version.number}", reason)
    for digest in sorted(contents.digests() - catalog.digests()):
        if not catalog.is_referenced(digest):
            yield Problem("orphan", digest, "", "no name points to it")


def _damage(contents: ContentStore, digest: str) -> str | None:
    """What is wrong with stored content; None when its files and its identity are right."""
    try:
        checkpoint = read_checkpoint(contents.open(digest), AdapterLimits().for_stored())
    except AdapterNotFound:
        return "its files are gone"
    except AdapterError as error:
        return str(error)
    kind = kind_of(checkpoint.config)
    if not isinstance(kind, str) or kind not in FORMATS:
        return f"it is of family {kind!r:.40}, which this version does not know"
    found = identity(checkpoint)
    return None if found in (None, digest) else f"it holds the content of {found}"

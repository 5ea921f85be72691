"""fsck: reads a whole store, and reports content that is missing, damaged or without a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adaplex.adapters.checkpoint import read_checkpoint
from adaplex.adapters.errors import AdapterError, AdapterNotFound
from adaplex.adapters.formats import FORMATS, identity, kind_of
from adaplex.adapters.limits import AdapterLimits
from adaplex.adapters.storage.catalog import RESTORE, Catalog
from adaplex.adapters.storage.content_store import ContentStore


@dataclass(frozen=True)
class Problem:
    """One fault of a store."""

    kind: str
    """`catalog`, `missing`, `damaged`, `lost` or `orphan`."""
    digest: str
    adapter: str
    """`name@version`, or empty."""
    reason: str

    @property
    def harmless(self) -> bool:
        """True for an orphan: every named adapter can still be served."""
        return self.kind == "orphan"


def check_store(catalog: Catalog, contents: ContentStore) -> Iterator[Problem]:
    """Reads every stored adapter and yields the problems found.

    Needs no base model. May run while servers use the same store.
    """
    try:
        catalog.check_integrity()
    except (AssertionError, AdapterError) as error:
        yield Problem("catalog", "", "", str(error) or "its index does not match its entries")
        if catalog.damage():
            return
    if doubt := catalog.doubt():
        yield Problem("catalog", "", "", f"{doubt}; {RESTORE}")
    for digest in sorted(catalog.digests()):
        if (reason := _damage(contents, digest)) is None:
            continue
        found = catalog.by_digest(digest)
        if found is None:  # deleted since
            continue
        entry, version = found
        kind = "damaged" if contents.has(digest) else "missing"
        yield Problem(kind, digest, f"{entry.name}@{version.number}", reason)
    orphans = contents.digests() - catalog.digests()
    if orphans and catalog.is_empty():
        yield Problem("catalog", "", "", f"it is empty, and there are {len(orphans)} contents")
    for digest in sorted(orphans):
        if catalog.protects(digest):
            yield Problem("lost", digest, "", f"only a copy of its name refers to it; {RESTORE}")
        elif not catalog.is_referenced(digest):
            yield Problem("orphan", digest, "", "no name refers to it")


def _damage(contents: ContentStore, digest: str) -> str | None:
    """Returns why content cannot be served; None if its files and its digest are right."""
    try:
        checkpoint = read_checkpoint(contents.open(digest), AdapterLimits().for_stored())
    except AdapterNotFound:
        return "its files are missing"
    except AdapterError as error:
        return str(error)
    kind = kind_of(checkpoint.config)
    if not isinstance(kind, str) or kind not in FORMATS:
        return f"its family {kind!r:.40} is unknown to this version"
    found = identity(checkpoint)
    return None if found in (None, digest) else f"its files have the digest {found}"

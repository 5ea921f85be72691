"""Errors of adaplex: the root and those about adapters.

AdaplexError
├── AdapterError
│   ├── AdapterInvalid      the checkpoint cannot be served; holds every refusal
│   ├── AdapterNotFound     the name, version, alias or digest does not exist
│   ├── AdapterExists       the name has other content, or is the base model's
│   ├── AdapterTooLarge     a size or rank limit is exceeded
│   ├── BaseMismatch        the adapter was made for another base
│   ├── StoreFull           a quota of the store is exhausted, or its disk full
│   ├── SourceUnavailable   the hub or bucket cannot be reached
│   ├── StoreCorrupt        stored content is missing or does not match its digest
│   ├── CatalogCorrupt      the catalog is damaged or gone
│   └── CatalogOutdated     the catalog lacks changes of a name that its copy has
└── RequestError            (adaplex.engine.errors)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LISTED = 10
"""Values that an error message lists."""


class AdaplexError(Exception):
    """Base class of every error that callers see."""


class AdapterError(AdaplexError):
    """An error about an adapter. `field` names the request field, file or setting at fault."""

    def __init__(self, message: str, *, field: str = "adapter") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Refusal:
    """One reason not to serve a checkpoint. `where` is a file, a config field or a tensor."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class AdapterInvalid(AdapterError):
    """The checkpoint cannot be served. `refusals` has every reason found, not only the first."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        super().__init__("; ".join(map(str, refusals)), field=refusals[0].where)
        self.refusals = tuple(refusals)

    @classmethod
    def because(cls, where: str, reason: str) -> AdapterInvalid:
        """Returns the error for a single refusal."""
        return cls([Refusal(where, reason)])


class AdapterNotFound(AdapterError):
    """No adapter has this name, version, alias or digest."""


class AdapterExists(AdapterError):
    """The name already has other content, or is a name of the base model."""


class AdapterTooLarge(AdapterError):
    """The adapter exceeds a byte, rank or count limit of this server."""


class BaseMismatch(AdapterError):
    """The adapter was made for another base than the served one, and --base-policy refuses that."""


class StoreFull(AdapterError):
    """A quota of the store is exhausted, or its disk is full: adapters must be deleted first."""

    retry_after = 30.0
    """Seconds after which a retry makes sense."""


class SourceUnavailable(AdapterError):
    """The hub or bucket cannot be reached, or its answer cannot be used."""

    retry_after = 5.0
    """Seconds after which a retry makes sense."""


class StoreCorrupt(AdapterError):
    """Stored content does not match its digest, or is missing. Uploading it again repairs it."""


class CatalogCorrupt(AdapterError):
    """The catalog is damaged or gone. `adaplex adapters restore` makes it anew from its copies."""

    def __init__(self, message: str) -> None:
        super().__init__(message, field="store_dir")


class CatalogOutdated(AdapterError):
    """The catalog is new or older than the copies of its names, so this name is not changed."""


def listed(values: Iterable[object]) -> str:
    """Returns the first MAX_LISTED values for an error message, `none` if there are none."""
    words = [str(value) for value in values]
    more = ", ..." if len(words) > MAX_LISTED else ""
    return ", ".join(words[:MAX_LISTED]) + more or "none"

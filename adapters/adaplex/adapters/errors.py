"""Errors of adaplex, from the bottom up.

AdaplexError
├── AdapterError
│   ├── AdapterInvalid      the checkpoint cannot be served; lists every refusal
│   ├── AdapterNotFound     no such name, version or digest
│   ├── AdapterExists       the name is taken
│   ├── AdapterTooLarge     a size or rank limit is exceeded
│   ├── BaseMismatch        the adapter was checked against another base
│   ├── StoreFull           a quota of the store, or its disk, is used up
│   ├── SourceUnavailable   the hub or bucket that holds it cannot be reached
│   └── StoreCorrupt        stored content is lost, or does not match its digest
└── RequestError            (adaplex.engine.errors)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class AdaplexError(Exception):
    """Root of every error that a caller can be told about."""


class AdapterError(AdaplexError):
    """Something is wrong with an adapter; `field` names what the caller sent."""

    def __init__(self, message: str, *, field: str = "adapter") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Refusal:
    """One reason not to serve a checkpoint: where (file, config field or tensor) and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class AdapterInvalid(AdapterError):
    """The checkpoint cannot be served. Holds every refusal found, not only the first."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        super().__init__("; ".join(map(str, refusals)), field=refusals[0].where)
        self.refusals = tuple(refusals)

    @classmethod
    def because(cls, where: str, reason: str) -> AdapterInvalid:
        """Builds the error from a single refusal."""
        return cls([Refusal(where, reason)])


class AdapterNotFound(AdapterError):
    """No adapter has this name, version or digest."""


class AdapterExists(AdapterError):
    """The name is taken by other content, or by the base model."""


class AdapterTooLarge(AdapterError):
    """The adapter exceeds a byte or rank limit of this server."""


class BaseMismatch(AdapterError):
    """The adapter was checked against another base than is served, and policy refuses that."""


class StoreFull(AdapterError):
    """A quota of the store, or its disk, is used up: something must be deleted first."""

    retry_after = 30.0
    """Seconds."""


class SourceUnavailable(AdapterError):
    """The place that holds the adapter cannot be reached, or does not answer as it should."""

    retry_after = 5.0
    """Seconds."""


class StoreCorrupt(AdapterError):
    """Stored content does not match the digest it is stored under, or is gone from the disk.

    Uploading it again repairs it.
    """

"""Event: one change of a name, in its history."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from adaplex.adapters.storage.alias_split import Split

EventKind = Literal["upload", "alias", "update", "delete_version", "delete"]


@dataclass(frozen=True)
class Origin:
    """Requester, time and content source of a change."""

    time: datetime
    actor: str = ""
    """Caller's self-reported identity (unauthenticated)."""
    source: str = ""
    """`upload`, `merge` or a URI; empty for changes without content."""


@dataclass(frozen=True)
class Event:
    """One change. `before` and `after` are an alias's targets, empty where it is not set."""

    time: datetime
    kind: EventKind
    version: int = 0
    digest: str = ""
    alias: str = ""
    before: Split = ()
    after: Split = ()
    actor: str = ""
    source: str = ""
    detail: str = ""

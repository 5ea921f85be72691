"""Principal: who calls, and the scopes that decide what it may call."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """A right. ADMIN includes the others."""

    GENERATE = "generate"
    READ = "adapters:read"
    WRITE = "adapters:write"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """A caller that has shown a credential."""

    name: str
    """Recorded as the actor in the history of adapters."""
    tenant: str
    scopes: frozenset[Scope]

    def has(self, scope: Scope) -> bool:
        """True if the principal has a scope, or all."""
        return bool(self.scopes & {scope, Scope.ADMIN})

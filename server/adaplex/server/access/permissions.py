"""The scope that each RPC needs once the server knows its callers."""

from __future__ import annotations

from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE

from adaplex.server.access.principal import Scope

ADAPTERS, GENERATION, SERVER = (
    f"adaplex.v1.{name}Service" for name in ("Adapter", "Generation", "Server")
)
SCOPES: dict[str, Scope | None] = {
    f"{GENERATION}/Generate": Scope.GENERATE,
    f"{GENERATION}/GenerateStream": Scope.GENERATE,
    f"{ADAPTERS}/GetAdapter": Scope.READ,
    f"{ADAPTERS}/ListAdapters": Scope.READ,
    f"{ADAPTERS}/GetAdapterHistory": Scope.READ,
    f"{ADAPTERS}/ValidateAdapter": Scope.WRITE,
    f"{ADAPTERS}/UploadAdapter": Scope.WRITE,
    f"{ADAPTERS}/LoadAdapter": Scope.WRITE,
    f"{ADAPTERS}/MergeAdapters": Scope.WRITE,
    f"{ADAPTERS}/UpdateAdapter": Scope.WRITE,
    f"{ADAPTERS}/SetAlias": Scope.WRITE,
    f"{ADAPTERS}/DeleteAlias": Scope.WRITE,
    f"{ADAPTERS}/RollbackAlias": Scope.WRITE,
    f"{ADAPTERS}/UnloadAdapter": Scope.WRITE,
    f"{ADAPTERS}/DeleteAdapter": Scope.WRITE,
    f"{SERVER}/GetServerInfo": None,
}
"""service/method -> scope; None lets every principal in. What is not listed needs ADMIN."""
METRICS = Scope.ADMIN
"""Scope of /metrics, which names the adapters of everybody."""
OPEN_SERVICES = frozenset({HEALTH_SERVICE})
"""Services that nobody needs a credential for: probes have none."""


def scope_of(service: str, method: str) -> Scope | None:
    """Returns the scope that an RPC needs, None if every principal may call it."""
    if service == REFLECTION_SERVICE:
        return None
    return SCOPES.get(f"{service}/{method}", Scope.ADMIN)

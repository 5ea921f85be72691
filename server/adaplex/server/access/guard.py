"""Guard: admits calls on both ports by the principal's scopes."""

from __future__ import annotations

from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE

from adaplex.server.access.authenticator import Authenticator, Credential, require
from adaplex.server.access.oidc import OidcSettings, OidcVerifier
from adaplex.server.access.permissions import METRICS, OPEN_SERVICES, scope_of
from adaplex.server.access.principal import Principal
from adaplex.server.access.token_file import TokenFile
from adaplex.server.config import ServerConfig


class Guard:
    """Knows the callers; whatever is not open needs a principal, and by default ADMIN."""

    def __init__(
        self, authenticator: Authenticator, *, open_reflection: bool, open_metrics: bool
    ) -> None:
        self._authenticator, self._open_metrics = authenticator, open_metrics
        self._open = OPEN_SERVICES | ({REFLECTION_SERVICE} if open_reflection else set())

    @classmethod
    def of(cls, config: ServerConfig) -> Guard | None:
        """Returns the guard that the settings ask for, None if they name neither tokens nor a
        provider. Raises ConfigError.
        """
        provider = OidcSettings.of(config)
        if config.tokens_file is None and provider is None:
            return None
        return cls(
            Authenticator(
                None if config.tokens_file is None else TokenFile(config.tokens_file),
                None if provider is None else OidcVerifier(provider),
            ),
            open_reflection=config.public_reflection,
            open_metrics=config.public_metrics,
        )

    async def admit(self, service: str, method: str, credential: Credential) -> Principal | None:
        """Returns who calls an RPC, None if everybody may. Raises Unauthenticated, ScopeMissing and
        AuthenticationBusy.
        """
        if service in self._open:
            return None
        principal = await self._authenticator.authenticate(credential)
        require(principal, scope_of(service, method))
        return principal

    def admit_to_metrics(self, credential: Credential) -> None:
        """Raises the same for a caller that may not read /metrics. Blocks."""
        if not self._open_metrics:
            require(self._authenticator.authenticate_blocking(credential), METRICS)

    def close(self) -> None:
        """Ends the authenticator's thread."""
        self._authenticator.close()

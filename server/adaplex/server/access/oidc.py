"""OidcVerifier: principals from the signed tokens (JWT) of an identity provider.

PyJWT is the extra `oidc`, imported within functions: a server without an issuer does not need it.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaplex.server.access.principal import Principal, Scope
from adaplex.server.errors import ConfigError, Unauthenticated
from adaplex.server.file_stamp import FileStamp, file_stamp
from adaplex.server.network_config import NetworkConfig

if TYPE_CHECKING:
    from jwt import PyJWK, PyJWKClient, PyJWKSet

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
"""Signatures by a private key: with a shared secret, whoever can check a token could make one."""
LEEWAY_SECONDS = 10
FETCH_SECONDS = 5
"""Time that the provider has to answer."""
KEYS_SECONDS = 300
"""Age at which keys of a URL are fetched again."""
MAX_TOKEN_CHARS = 16 * 1024


@dataclass(frozen=True)
class OidcSettings:
    """The provider, the audience that tokens must name, and the claims that are read."""

    issuer: str
    audience: str
    keys: str
    """File or https URL of the key set; empty asks the issuer."""
    name_claim: str
    tenant_claim: str
    scope_claim: str

    @classmethod
    def of(cls, config: NetworkConfig) -> OidcSettings | None:
        """Returns what the settings say, None without an issuer. Raises ConfigError."""
        if not config.oidc_issuer:
            if config.oidc_audience or config.oidc_jwks:
                raise ConfigError("oidc_issuer: oidc_audience and oidc_jwks need it; set both")
            return None
        if not config.oidc_audience:
            raise ConfigError("oidc_audience: needed with oidc_issuer; set what tokens name as aud")
        keys = config.oidc_jwks or ""
        for name, address in (
            ("oidc_issuer", "" if keys else config.oidc_issuer),
            ("oidc_jwks", keys),
        ):
            if "://" in address and not _is_safe(address):
                raise ConfigError(
                    f"{name}: {address} is not https; keys must not come in the clear"
                )
        if keys and "://" not in keys and not Path(keys).is_file():
            raise ConfigError(f"oidc_jwks: no such file: {keys}; give a JSON key set or its URL")
        try:
            import jwt  # noqa: F401
        except ImportError as error:
            remedy = "pip install 'adaplex[oidc]'"
            raise ConfigError(f"oidc_issuer: PyJWT is not installed; {remedy}") from error
        return cls(
            config.oidc_issuer,
            config.oidc_audience,
            keys,
            config.oidc_name_claim,
            config.oidc_tenant_claim,
            config.oidc_scope_claim,
        )


class OidcVerifier:
    """Checks signature, issuer, audience and times of tokens. Blocks while it fetches keys."""

    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._client: PyJWKClient | None = None
        self._file: tuple[FileStamp, PyJWKSet] | None = None

    def principal(self, token: str) -> Principal:
        """Returns the principal that a token names. Raises Unauthenticated."""
        import jwt

        settings = self._settings
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthenticated(f"the token is longer than {MAX_TOKEN_CHARS} characters")
        try:
            claims = jwt.decode(
                token,
                self._key_of(token),
                algorithms=ALGORITHMS,
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", settings.name_claim]},
            )
        except jwt.PyJWKClientConnectionError as error:
            raise Unauthenticated(f"the keys of {settings.issuer} cannot be read now") from error
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token is not valid: {error}") from error
        return self._principal_of(claims)

    def _principal_of(self, claims: Mapping[str, Any]) -> Principal:
        settings = self._settings
        tenant = claims.get(settings.tenant_claim, "default")
        scopes = claims.get(settings.scope_claim, ())
        words = scopes.split() if isinstance(scopes, str) else list(scopes)
        known = {scope.value: scope for scope in Scope}
        return Principal(
            str(claims[settings.name_claim]),
            str(tenant),
            frozenset(known[word] for word in words if isinstance(word, str) and word in known),
        )

    def _key_of(self, token: str) -> PyJWK:
        """Returns the key that a token says it is signed with. Raises PyJWTError."""
        import jwt

        keys = self._settings.keys
        if keys and "://" not in keys:
            wanted = jwt.get_unverified_header(token).get("kid")
            found = [
                key for key in self._read_file(Path(keys)).keys if wanted in (None, key.key_id)
            ]
            if len(found) != 1:
                raise jwt.InvalidTokenError("it is signed by a key that the server does not know")
            return found[0]
        if self._client is None:
            self._client = jwt.PyJWKClient(
                keys or _discover(self._settings.issuer),
                cache_keys=True,
                lifespan=KEYS_SECONDS,
                timeout=FETCH_SECONDS,
            )
        return self._client.get_signing_key_from_jwt(token)

    def _read_file(self, path: Path) -> PyJWKSet:
        """Returns the key set of a file, read again if it has changed. Raises PyJWTError."""
        import jwt

        stamp = file_stamp(path)
        if self._file is None or self._file[0] != stamp:
            try:
                self._file = (stamp, jwt.PyJWKSet.from_json(path.read_text()))
            except (OSError, ValueError) as error:
                raise jwt.PyJWKClientConnectionError(f"{path}: {error}") from error
        return self._file[1]


def _is_safe(address: str) -> bool:
    """True for https, and for http on loopback, as tests and sidecars use it."""
    return address.startswith(("https://", "http://127.0.0.1:", "http://localhost:"))


def _discover(issuer: str) -> str:
    """Returns the address of an issuer's keys, by OpenID Connect Discovery 1.0. Raises
    PyJWTError.
    """
    import jwt

    address = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
    try:
        with urllib.request.urlopen(address, timeout=FETCH_SECONDS) as answer:
            keys = str(json.load(answer)["jwks_uri"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise jwt.PyJWKClientConnectionError(f"{address}: {error}") from error
    if not _is_safe(keys):
        raise jwt.InvalidTokenError(f"the keys of the issuer are not at an https address: {keys}")
    return keys

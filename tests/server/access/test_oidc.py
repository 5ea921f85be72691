"""Tokens of an identity provider, whose keys are in a file or on a server of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from grpc import StatusCode

from adaplex.server.access.guard import Guard
from adaplex.server.access.oidc import OidcSettings, OidcVerifier
from adaplex.server.access.principal import Principal, Scope
from adaplex.server.access.token_file import TokenFile
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError, Unauthenticated
from server.calls import status
from server.server_rig import rig

ISSUER, AUDIENCE = "https://login.example.com", "adaplex"


class Provider:
    """Keys of an issuer, and tokens that they sign."""

    def __init__(self, kid: str = "k1") -> None:
        self.kid, self._key = kid, ec.generate_private_key(ec.SECP256R1())

    @property
    def keys(self) -> dict[str, Any]:
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self._key.public_key()))
        return {"keys": [public | {"kid": self.kid, "use": "sig", "alg": "ES256"}]}

    def token(self, **changes: Any) -> str:
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "alice",
            "tenant": "acme",
            "scope": "generate openid adapters:read",
            "exp": time.time() + 600,
        }
        whole = {name: value for name, value in (claims | changes).items() if value is not None}
        return jwt.encode(whole, self._key, algorithm="ES256", headers={"kid": self.kid})


@pytest.fixture
def provider() -> Provider:
    return Provider()


@pytest.fixture
def keys(provider: Provider, tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(provider.keys))
    return path


@pytest.fixture
def issuer(provider: Provider) -> Iterator[str]:
    """Address of a provider that serves its discovery document and its keys."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            documents = {
                "/.well-known/openid-configuration": {"jwks_uri": f"{address}/keys"},
                "/keys": provider.keys,
            }
            body = json.dumps(documents[self.path]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


def verifier(keys: Path | str | None, **settings: Any) -> OidcVerifier:
    given = {"oidc_issuer": ISSUER, "oidc_audience": AUDIENCE, **settings}
    found = OidcSettings.of(ServerConfig(oidc_jwks=None if keys is None else str(keys), **given))
    assert found is not None
    return OidcVerifier(found)


def test_a_signed_token_names_its_principal(provider: Provider, keys: Path) -> None:
    rights = frozenset([Scope.GENERATE, Scope.READ])
    it = verifier(keys)
    assert it.principal(provider.token()) == Principal("alice", "acme", rights)
    assert it.principal(provider.token(tenant=None)).tenant == "default"
    listed = provider.token(scope=None, roles=["admin", "other", 3], email="a@example.com")
    other = verifier(keys, oidc_scope_claim="roles", oidc_name_claim="email")
    assert other.principal(listed) == Principal("a@example.com", "acme", frozenset([Scope.ADMIN]))


def unsigned(provider: Provider) -> str:
    claims = jwt.decode(provider.token(), options={"verify_signature": False})
    return jwt.encode(claims, None, algorithm="none", headers={"kid": provider.kid})


def signed_by_the_public_key(provider: Provider) -> str:
    claims = jwt.decode(provider.token(), options={"verify_signature": False})
    secret = provider.keys["keys"][0]["x"]  # a part of what everybody may read
    return jwt.encode(claims, secret, algorithm="HS256", headers={"kid": provider.kid})


def of_another_kind_of_key(provider: Provider) -> str:
    claims = jwt.decode(provider.token(), options={"verify_signature": False})
    key = rsa.generate_private_key(65537, 2048)
    return jwt.encode(claims, key, algorithm="RS256", headers={"kid": provider.kid})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: p.token(exp=time.time() - 60), "expired"),
        (lambda p: p.token(exp=None), "exp"),
        (lambda p: p.token(nbf=time.time() + 600), "not yet valid"),
        (lambda p: p.token(aud="others"), "[Aa]udience"),
        (lambda p: p.token(iss="https://evil.example.com"), "[Ii]ssuer"),
        (lambda p: p.token(sub=None), "sub"),
        (lambda p: Provider("k1").token(), "[Ss]ignature"),
        (lambda p: Provider("k2").token(), "a key that the server does not know"),
        (unsigned, "not valid"),
        (signed_by_the_public_key, "not valid"),
        (of_another_kind_of_key, "not valid"),
        (lambda p: "a.b.c", "not valid"),
        (lambda p: "x" * 20_000, "longer than 16384 characters"),
    ],
)
def test_other_tokens_are_refused(make: Any, told: str, provider: Provider, keys: Path) -> None:
    with pytest.raises(Unauthenticated, match=told):
        verifier(keys).principal(make(provider))


def test_keys_of_a_file_are_read_again_when_it_changes(provider: Provider, keys: Path) -> None:
    it, successor = verifier(keys), Provider("k2")
    assert it.principal(provider.token()).name == "alice"
    keys.write_text(json.dumps(successor.keys))
    assert it.principal(successor.token()).name == "alice"
    with pytest.raises(Unauthenticated):
        it.principal(provider.token())


def test_the_issuer_says_where_its_keys_are(provider: Provider, issuer: str) -> None:
    token = provider.token(iss=issuer)
    assert verifier(None, oidc_issuer=issuer).principal(token).name == "alice"
    assert verifier(f"{issuer}/keys", oidc_issuer=issuer).principal(token).name == "alice"


def test_a_provider_that_is_away_is_named(provider: Provider) -> None:
    gone = "http://127.0.0.1:9"
    with pytest.raises(Unauthenticated, match=f"the keys of {gone} cannot be read now"):
        verifier(None, oidc_issuer=gone).principal(provider.token(iss=gone))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"oidc_issuer": ISSUER}, "oidc_audience: needed with oidc_issuer"),
        ({"oidc_audience": AUDIENCE}, "oidc_issuer: "),
        ({"oidc_issuer": "http://login.example.com", "oidc_audience": "a"}, "is not https"),
        (
            {"oidc_issuer": ISSUER, "oidc_audience": "a", "oidc_jwks": "/no/file"},
            "oidc_jwks: no such file: /no/file",
        ),
    ],
)
def test_settings_that_cannot_be_served_are_named(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Guard.of(ServerConfig(**settings))  # type: ignore[arg-type]


async def test_a_server_takes_both_kinds_of_token(
    provider: Provider, keys: Path, tmp_path: Path
) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    own = file.create("ci", tenant="t", scopes=frozenset([Scope.GENERATE]))[1]
    settings = {"oidc_issuer": ISSUER, "oidc_audience": AUDIENCE, "oidc_jwks": str(keys)}
    async with rig(tmp_path, tokens_file=file.path, **settings) as server:
        for token in (own, provider.token()):
            shown = (("authorization", f"Bearer {token}"),)
            assert (await server.generate(metadata=shown)).text
        for token, code in (
            (provider.token(scope="adapters:read"), StatusCode.PERMISSION_DENIED),
            (provider.token(exp=time.time() - 60), StatusCode.UNAUTHENTICATED),
        ):
            shown = (("authorization", f"Bearer {token}"),)
            assert (await status(server.generate(metadata=shown)))[0] is code

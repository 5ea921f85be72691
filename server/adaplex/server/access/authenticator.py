"""Authenticator: from the credential of a call to its principal."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import NamedTuple

from adaplex.server.access.oidc import OidcVerifier
from adaplex.server.access.principal import Principal, Scope
from adaplex.server.access.token_file import Entry, TokenFile
from adaplex.server.access.tokens import SALT_BYTES, Token, hash_secret, matches
from adaplex.server.errors import (
    AuthenticationBusy,
    ScopeMissing,
    Unauthenticated,
)
from adaplex.server.followed_files import FollowedFiles

REMEMBERED = 10_000
"""Tokens, right and wrong ones, whose entries are remembered by the number of the file's change and
the SHA-256 of the token."""
MAX_WAITING = 100
"""Tokens that wait to be hashed; each takes some 10 ms."""
NOT_VALID = "the token is not valid; ask the operator for another"
NONE_SENT = (
    "no credential was sent; send a bearer token (--token, ADAPLEX_TOKEN), or a client certificate "
    "that the server knows"
)


class Credential(NamedTuple):
    """The authorization header of a call, and the common name of its certificate, which TLS has
    verified; empty if absent.
    """

    authorization: str
    certificate: str


class _Known(NamedTuple):
    """The entries of the file as it was last read."""

    by_id: dict[str, Entry]
    by_certificate: dict[str, Entry]


class Authenticator:
    """Knows the principals of a token file, whose changes it follows, and those that an identity
    provider vouches for. Thread-safe.
    """

    def __init__(self, file: TokenFile | None, provider: OidcVerifier | None = None) -> None:
        """Raises ConfigError if the file cannot be read."""
        self._provider = provider
        paths = [] if file is None else [file.path]
        self._followed = FollowedFiles("tokens", paths, lambda: _known(file))
        self._lock = threading.Lock()
        self._remembered: OrderedDict[tuple[int, bytes], str] = OrderedDict()
        self._salt = secrets.token_bytes(SALT_BYTES)
        # One thread: a flood of wrong tokens must not take the cores of the model.
        self._hashing = ThreadPoolExecutor(1, "authenticate")
        self._asking = ThreadPoolExecutor(1, "provider")
        self._waiting = 0

    async def authenticate(self, credential: Credential) -> Principal:
        """Returns the principal of a credential. Raises Unauthenticated and AuthenticationBusy."""
        found = self._begin(credential)
        return found if isinstance(found, Principal) else await asyncio.wrap_future(found)

    def authenticate_blocking(self, credential: Credential) -> Principal:
        """Does the same for callers on a thread of their own."""
        found = self._begin(credential)
        return found if isinstance(found, Principal) else found.result()

    def close(self) -> None:
        """Ends the threads."""
        for threads in (self._hashing, self._asking):
            threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, credential: Credential) -> Principal | Future[Principal]:
        """Returns the principal at once, or where a token must be hashed or the provider asked, as
        soon as that is done.
        """
        token = _bearer(credential)
        if not token:
            return self._principal(credential, "")
        provider = self._provider
        if provider is not None and Token.parse(token) is None:
            return self._start(self._asking, lambda: provider.principal(token))
        generation, _ = self._followed.current()
        with self._lock:
            found = self._remembered.get((generation, _digest(token)))
        if found is not None:
            return self._principal(credential, found)
        return self._start(self._hashing, lambda: self._principal(credential, self._hash(token)))

    def _principal(self, credential: Credential, found: str) -> Principal:
        """Returns the principal of the entry `found`, or of the certificate without a token."""
        _, known = self._followed.current()
        if credential.authorization:
            entry = known.by_id.get(found)
            if entry is None:
                raise Unauthenticated(NOT_VALID)
        elif credential.certificate:
            entry = known.by_certificate.get(credential.certificate)
            if entry is None:
                raise Unauthenticated(
                    f"the server knows no principal {credential.certificate!r}, the name of the "
                    "certificate; the operator adds it by `adaplex tokens create --certificate`"
                )
        else:
            raise Unauthenticated(NONE_SENT)
        if (state := entry.state(datetime.now(UTC))) != "valid":
            raise Unauthenticated(f"the credential of {entry.name} is {state}; ask for another")
        return entry.principal

    def _start(
        self, threads: ThreadPoolExecutor, work: Callable[[], Principal]
    ) -> Future[Principal]:
        """Starts work on a token, or raises AuthenticationBusy if too much waits."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise AuthenticationBusy(MAX_WAITING)
            self._waiting += 1

        def run() -> Principal:
            try:
                return work()
            finally:
                with self._lock:
                    self._waiting -= 1

        return threads.submit(run)

    def _hash(self, text: str) -> str:
        """Hashes a token; returns and remembers the id of its entry, empty if it has none. A token
        with an unknown id takes as long as one with a wrong secret.
        """
        generation, known = self._followed.current()
        token = Token.parse(text) or Token("", text[:100])
        entry = known.by_id.get(token.id)
        if entry is None or entry.salt is None or entry.hash is None:
            hash_secret(token.secret, self._salt)
            found = ""
        else:
            found = entry.id if matches(token.secret, entry.salt, entry.hash) else ""
        with self._lock:
            self._remembered[generation, _digest(text)] = found
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return found


def _known(file: TokenFile | None) -> _Known:
    """Returns the entries of a file. Raises ConfigError."""
    entries = [] if file is None else file.read()
    named = {e.name: e for e in entries if e.is_certificate}
    return _Known({e.id: e for e in entries}, named)


def require(principal: Principal, scope: Scope | None) -> None:
    """Raises ScopeMissing if the principal lacks a scope; None is no scope."""
    if scope is not None and not principal.has(scope):
        has = ", ".join(sorted(principal.scopes))
        raise ScopeMissing(f"needs the scope {scope}; {principal.name} has {has}")


def _bearer(credential: Credential) -> str:
    """Returns the token of a credential, empty without one. Raises Unauthenticated."""
    kind, _, token = credential.authorization.partition(" ")
    if credential.authorization and (kind.lower() != "bearer" or not token.strip()):
        raise Unauthenticated("authorization: must be `Bearer TOKEN`")
    return token.strip()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

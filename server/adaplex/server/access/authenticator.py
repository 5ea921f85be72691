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
from typing import NamedTuple, TypeVar

import structlog

from adaplex.server.access.oidc import OidcVerifier
from adaplex.server.access.principal import Principal, Scope
from adaplex.server.access.token_file import Entry, TokenFile
from adaplex.server.access.tokens import SALT_BYTES, Token, hash_secret, matches
from adaplex.server.errors import (
    AuthenticationBusy,
    ConfigError,
    ScopeMissing,
    Unauthenticated,
)
from adaplex.server.file_stamp import FileStamp, file_stamp

R = TypeVar("R")

log = structlog.get_logger("adaplex.access")

REMEMBERED = 10_000
"""Tokens, right and wrong ones, whose entries are remembered by the SHA-256 of the token."""
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

    stamp: FileStamp
    by_id: dict[str, Entry]
    by_certificate: dict[str, Entry]


class Authenticator:
    """Knows the principals of a token file, whose changes it follows, and those that an identity
    provider vouches for. Thread-safe.
    """

    def __init__(self, file: TokenFile | None, provider: OidcVerifier | None = None) -> None:
        """Raises ConfigError if the file cannot be read."""
        self._file, self._provider = file, provider
        self._lock = threading.Lock()
        self._known = self._load(self._stamp())
        self._remembered: OrderedDict[bytes, str] = OrderedDict()
        self._salt = secrets.token_bytes(SALT_BYTES)
        # One thread: a flood of wrong tokens must not take the cores of the model.
        self._hashing = ThreadPoolExecutor(1, "authenticate")
        self._asking = ThreadPoolExecutor(1, "provider")
        self._waiting = 0

    async def authenticate(self, credential: Credential) -> Principal:
        """Returns the principal of a credential. Raises Unauthenticated and AuthenticationBusy."""
        token = _bearer(credential)
        if self._is_foreign(token):
            return await asyncio.wrap_future(self._start(self._asking, self._ask, token))
        if (found := self._recall(token)) is None:
            found = await asyncio.wrap_future(self._start(self._hashing, self._hash, token))
        return self._principal(credential, found)

    def authenticate_blocking(self, credential: Credential) -> Principal:
        """Does the same for callers on a thread of their own."""
        token = _bearer(credential)
        if self._is_foreign(token):
            return self._start(self._asking, self._ask, token).result()
        if (found := self._recall(token)) is None:
            found = self._start(self._hashing, self._hash, token).result()
        return self._principal(credential, found)

    def close(self) -> None:
        """Ends the threads."""
        for threads in (self._hashing, self._asking):
            threads.shutdown(wait=False, cancel_futures=True)

    def _principal(self, credential: Credential, found: str) -> Principal:
        """Returns the principal of the entry `found`, or of the certificate without a token."""
        known = self._current()
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

    def _recall(self, token: str) -> str | None:
        """Returns the id of a token's entry, empty if it has none; None if it is to be hashed."""
        if not token:
            return ""
        self._current()  # forgets what a change of the file may have made wrong
        with self._lock:
            return self._remembered.get(_key(token))

    def _is_foreign(self, token: str) -> bool:
        """True if a token is for the provider to judge."""
        return bool(token) and self._provider is not None and Token.parse(token) is None

    def _ask(self, token: str) -> Principal:
        assert self._provider is not None
        return self._provider.principal(token)

    def _start(
        self, threads: ThreadPoolExecutor, work: Callable[[str], R], token: str
    ) -> Future[R]:
        """Starts work on a token, or raises AuthenticationBusy if too much waits."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise AuthenticationBusy(MAX_WAITING)
            self._waiting += 1

        def run() -> R:
            try:
                return work(token)
            finally:
                with self._lock:
                    self._waiting -= 1

        return threads.submit(run)

    def _hash(self, text: str) -> str:
        """Hashes a token; returns and remembers the id of its entry, empty if it has none. A token
        with an unknown id takes as long as one with a wrong secret.
        """
        token = Token.parse(text) or Token("", text[:100])
        entry = self._current().by_id.get(token.id)
        if entry is None or entry.salt is None or entry.hash is None:
            hash_secret(token.secret, self._salt)
            found = ""
        else:
            found = entry.id if matches(token.secret, entry.salt, entry.hash) else ""
        with self._lock:
            self._remembered[_key(text)] = found
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return found

    def _current(self) -> _Known:
        """Returns the entries, read again if the file has changed. A file that became unreadable is
        logged once, and the last entries stay in force.
        """
        stamp = self._stamp()
        with self._lock:
            if stamp != self._known.stamp:
                try:
                    self._known = self._load(stamp)
                    self._remembered.clear()
                    log.info("tokens changed", entries=len(self._known.by_id))
                except ConfigError as error:
                    self._known = self._known._replace(stamp=stamp)
                    log.error("tokens not changed", error=str(error))
            return self._known

    def _stamp(self) -> FileStamp:
        return (0, 0, 0) if self._file is None else file_stamp(self._file.path)

    def _load(self, stamp: FileStamp) -> _Known:
        entries = [] if self._file is None else self._file.read()
        named = {e.name: e for e in entries if e.is_certificate}
        return _Known(stamp, {e.id: e for e in entries}, named)


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


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

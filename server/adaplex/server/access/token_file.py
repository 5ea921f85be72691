"""TokenFile: the principals of a server, in a JSON file that `adaplex tokens` edits."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import filelock
from pydantic import AwareDatetime, Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from adaplex.server.access.principal import Principal, Scope
from adaplex.server.access.tokens import SALT_BYTES, Token, hash_secret
from adaplex.server.errors import ConfigError

LOCK_SECONDS = 30.0
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@/:-]{0,127}$")]


class Entry(BaseModel):
    """A principal, known by a token, or by the common name of a client certificate: then it has no
    hash.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: Name
    tenant: Name
    scopes: frozenset[Scope] = Field(min_length=1)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    salt: Base64Bytes | None = None
    hash: Base64Bytes | None = None

    @property
    def is_certificate(self) -> bool:
        """True if the principal shows a certificate instead of a token."""
        return self.hash is None

    @property
    def principal(self) -> Principal:
        """The caller that the entry makes known."""
        return Principal(self.name, self.tenant, self.scopes)

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        """Returns whether the entry is accepted at a time."""
        if self.revoked is not None and self.revoked <= now:
            return "revoked"
        if self.expires is not None and self.expires <= now:
            return "expired"
        return "valid"


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    entries: list[Entry] = []


class TokenFile:
    """The entries of a file. Changes are written whole, beside the file, and renamed over it, under
    a lock; so readers never see half a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Entry]:
        """Returns the entries. Raises ConfigError for a file that is missing or damaged."""
        try:
            return _Document.model_validate_json(self.path.read_bytes()).entries
        except FileNotFoundError:
            remedy = "make it with `adaplex tokens create`"
            raise ConfigError(f"tokens_file: no such file: {self.path}; {remedy}") from None
        except OSError as error:
            raise ConfigError(f"tokens_file: cannot read {self.path}: {error.strerror}") from error
        except ValidationError as error:
            at = ".".join(map(str, error.errors()[0]["loc"])) or "the document"
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"tokens_file: {self.path}: {at}: {reason}") from error

    def create(
        self,
        name: str,
        *,
        tenant: str,
        scopes: frozenset[Scope],
        expires: datetime | None = None,
        certificate: bool = False,
    ) -> tuple[Entry, Token | None]:
        """Adds a principal. Returns its entry, and its token, which exists nowhere else; None for
        one that is known by its certificate. Raises ConfigError for a name that is taken or unfit.
        """
        token = None if certificate else Token.new()
        salt = None if token is None else secrets.token_bytes(SALT_BYTES)
        with self._editing() as entries:
            taken = [e for e in entries if e.name == name and e.state(datetime.now(UTC)) == "valid"]
            if taken:
                remedy = "revoke it first, or choose another name"
                raise ConfigError(f"name: {name} has the valid entry {taken[0].id}; {remedy}")
            try:
                entry = Entry(
                    id=secrets.token_hex(6) if token is None else token.id,
                    name=name,
                    tenant=tenant,
                    scopes=scopes,
                    created=datetime.now(UTC),
                    expires=expires,
                )
            except ValidationError as error:
                first = error.errors()[0]
                raise ConfigError(
                    f"{first['loc'][0]}: {first['input']!r}: {first['msg']}"
                ) from None
            if token is not None and salt is not None:
                secret = {"salt": salt, "hash": hash_secret(token.secret, salt)}
                entry = entry.model_copy(update=secret)
            entries.append(entry)
        return entry, token

    def change(
        self, which: str, *, expires: datetime | None = None, revoked: datetime | None = None
    ) -> list[Entry]:
        """Sets the end of the entry with an id, or of all entries with a name. Returns them. Raises
        ConfigError if there are none.
        """
        ends = {"expires": expires, "revoked": revoked}
        update = {field: time for field, time in ends.items() if time is not None}
        with self._editing() as entries:
            changed = []
            for at, entry in enumerate(entries):
                if which in (entry.id, entry.name):
                    entries[at] = entry.model_copy(update=update)
                    changed.append(entries[at])
            if not changed:
                raise ConfigError(f"{which}: no such id or name; see `adaplex tokens list`")
        return changed

    @contextmanager
    def _editing(self) -> Iterator[list[Entry]]:
        """Yields the entries, and writes them at the end of the block unless it raises."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS, mode=0o600)
            with lock:
                entries = self.read() if self.path.exists() else []
                yield entries
                self._write(_Document(entries=entries))
        except filelock.Timeout as error:
            raise ConfigError(f"tokens_file: {self.path} is locked by another process") from error
        except OSError as error:
            raise ConfigError(f"tokens_file: cannot write {self.path}: {error.strerror}") from error

    def _write(self, document: _Document) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        try:
            with os.fdopen(handle, "w") as file:  # mkstemp's mode is 0600
                file.write(document.model_dump_json(indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

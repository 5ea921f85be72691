"""Bearer tokens: their text, and the salted hash that is all the server keeps.

A token is `adx_<id>_<secret>`. The secret has 256 random bits, so guessing it is hopeless at any
cost of the hash; scrypt's cost here keeps a stolen file useless and a call below 10 ms.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

PREFIX = "adx"
ID_BYTES, SECRET_BYTES, SALT_BYTES = 6, 32, 16
COST, BLOCK_SIZE, PARALLEL = 2**12, 8, 1
"""Parameters n, r and p of scrypt: 4 MiB of memory."""
_FORM = re.compile(rf"{PREFIX}_([0-9a-f]{{{2 * ID_BYTES}}})_([A-Za-z0-9_-]{{20,100}})")


class Token(NamedTuple):
    """The public id, by which the server finds the hash, and the secret."""

    id: str
    secret: str

    @classmethod
    def new(cls) -> Token:
        """Makes a random token."""
        return cls(secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> Token | None:
        """Returns the token that a text is, None for another text."""
        found = _FORM.fullmatch(text)
        return cls(*found.groups()) if found else None

    def __str__(self) -> str:
        return f"{PREFIX}_{self.id}_{self.secret}"


def hash_secret(secret: str, salt: bytes) -> bytes:
    """Returns the 64-byte scrypt hash of a secret."""
    return hashlib.scrypt(secret.encode(), salt=salt, n=COST, r=BLOCK_SIZE, p=PARALLEL)


def matches(secret: str, salt: bytes, expected: bytes) -> bool:
    """True if the hash of the secret is the expected one; compares in constant time."""
    return hmac.compare_digest(hash_secret(secret, salt), expected)

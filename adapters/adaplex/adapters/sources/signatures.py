"""SignatureVerifier: checks signatures of adapters, in the OpenSSF model signing format, EC keys.

`model_signing sign key` writes `model.sig`, a sigstore bundle over the SHA-256 of every file in a
directory. Verification is offline. https://github.com/sigstore/model-transparency
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from adaplex.adapters.checkpoint import FILES, SIGNATURE
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.limits import MIB

if TYPE_CHECKING:
    from model_signing import verifying

MAX_SIGNATURE_BYTES = MIB
FINGERPRINT_DIGITS = 16
"""Hex digits of a key's fingerprint."""
MAX_REASON = 500
"""Characters of a verdict's problem."""


class SignaturePolicy(StrEnum):
    """Treatment of unsigned adapters: accept, accept with a warning, or refuse."""

    OFF = "off"
    WARN = "warn"
    REQUIRE = "require"


@dataclass(frozen=True)
class Verdict:
    """Result of verifying an adapter."""

    signed: bool = False
    """True if a configured key signed exactly these files."""
    signer: str = ""
    """Fingerprint of that public key: the first 16 hex digits of the SHA-256 of its DER."""
    problem: str = ""
    """Why the adapter is not signed; empty if it is, or if the policy is off."""


class SignatureVerifier:
    """Verifies adapter directories against a set of public keys. Thread-safe."""

    def __init__(self, policy: SignaturePolicy, *, public_keys: Sequence[Path] = ()) -> None:
        """`public_keys` has PEM files of P-256, P-384 or P-521 keys; a signature by any is valid.

        Unless the policy is off, raises ValueError without a key, for an invalid key file, and if
        the package model-signing is not installed.
        """
        self._policy = SignaturePolicy(policy)
        self._keys: Mapping[str, verifying.Config] = {}
        if self._policy is not SignaturePolicy.OFF:
            if not public_keys:
                raise ValueError(f"public_keys: the signature policy {policy} needs at least one")
            _check_installed(self._policy)
            self._keys = dict(_load_key(path) for path in public_keys)

    def verify(self, directory: Path) -> Verdict:
        """Returns whether `model.sig` in the directory signs exactly its other files.

        Raises AdapterInvalid if the policy requires that and it does not. Reads nothing if the
        policy is off.
        """
        if self._policy is SignaturePolicy.OFF:
            return Verdict()
        verdict = self._verify(directory)
        if self._policy is SignaturePolicy.REQUIRE and not verdict.signed:
            raise AdapterInvalid.because(SIGNATURE, verdict.problem)
        return verdict

    def _verify(self, directory: Path) -> Verdict:
        path = directory / SIGNATURE
        if not path.is_file():
            return Verdict(problem="the file is missing: the adapter is not signed")
        if (size := path.stat().st_size) > MAX_SIGNATURE_BYTES:
            return Verdict(problem=f"has {size} bytes, the limit is {MAX_SIGNATURE_BYTES}")
        problems = []
        for fingerprint, key in self._keys.items():
            try:
                _verify_with(key, directory)
            except Exception as error:  # parsers may raise anything for untrusted bytes
                reason = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"key {fingerprint}: {reason}")
            else:
                return Verdict(signed=True, signer=fingerprint)
        return Verdict(problem=f"is not valid; {'; '.join(problems)}"[:MAX_REASON])


def _check_installed(policy: SignaturePolicy) -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the signature policy {policy} needs the package model-signing, "
            f"which adaplex[signatures] installs: {error}"
        ) from error


def _load_key(path: Path) -> tuple[str, verifying.Config]:
    """Returns a public key's fingerprint and its verifier. Raises ValueError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
    )
    from model_signing import verifying

    try:
        key = load_pem_public_key(path.read_bytes())
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        config = verifying.Config()  # type: ignore[no-untyped-call]
        config.use_elliptic_key_verifier(public_key=path)
    except (AttributeError, OSError, UnsupportedAlgorithm, ValueError) as error:
        # a key that is not elliptic has no `curve`
        raise ValueError(
            f"public_keys: {path} is not an elliptic-curve public key: {error}"
        ) from error
    return hashlib.sha256(der).hexdigest()[:FINGERPRINT_DIGITS], config


def _verify_with(key: verifying.Config, directory: Path) -> None:
    """Raises unless the key signed all files but the signature, among them the adapter's.

    Works on a copy of `key`: verifying adds the paths that the signer ignored to a configuration.
    """
    from model_signing import hashing

    config = copy(key)
    hasher = hashing.Config()  # type: ignore[no-untyped-call]
    config.set_hashing_config(hasher.set_ignored_paths(paths=[SIGNATURE]))
    config.verify(directory, directory / SIGNATURE)
    if left_out := set(FILES) - _signed_files(directory / SIGNATURE):
        raise ValueError(f"it does not cover {', '.join(sorted(left_out))}")


def _signed_files(signature: Path) -> set[str]:
    """Returns the file names in a verified bundle."""
    envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {resource["name"] for resource in statement["predicate"]["resources"]}

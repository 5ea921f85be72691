"""SignatureVerifier: who signed an adapter, by the OpenSSF model signing format, with EC keys.

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
MAX_REASON = 500
"""Characters told of a failure."""


class SignaturePolicy(StrEnum):
    """What is asked of an adapter: nothing, a warning if it is not signed, or a signature."""

    OFF = "off"
    WARN = "warn"
    REQUIRE = "require"


@dataclass(frozen=True)
class Verdict:
    """What is known of an adapter's origin."""

    signed: bool = False
    """Whether a configured key signed exactly these files."""
    signer: str = ""
    """The first 16 hex digits of the SHA-256 of that public key, in DER."""
    problem: str = ""
    """Why it does not count as signed; empty when it does, or when the policy is off."""


class SignatureVerifier:
    """Verifies adapter directories against a set of public keys. Thread-safe."""

    def __init__(self, policy: SignaturePolicy, *, public_keys: Sequence[Path] = ()) -> None:
        """`public_keys` are PEM files of P-256, P-384 or P-521 keys; any of them may have signed.

        Raises ValueError, unless the policy is off, without a key, for a file that is none, and
        without the package model-signing.
        """
        self._policy = SignaturePolicy(policy)
        self._keys: Mapping[str, verifying.Config] = {}
        if self._policy is not SignaturePolicy.OFF:
            if not public_keys:
                raise ValueError(f"public_keys: the signature policy {policy} needs at least one")
            _check_installed(self._policy)
            self._keys = dict(_load_key(path) for path in public_keys)

    def verify(self, directory: Path) -> Verdict:
        """Whether `model.sig` in the directory signs all its other files, and no more.

        Raises AdapterInvalid when the policy requires that and it does not. A policy that is off
        reads nothing.
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
            except Exception as error:  # whatever a parser makes of a stranger's bytes is a no
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
    """The fingerprint of a public key, and the verifier for it. Raises ValueError."""
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
        raise ValueError(f"public_keys: {path} is no elliptic public key: {error}") from error
    return hashlib.sha256(der).hexdigest()[:FINGERPRINT_DIGITS], config


def _verify_with(key: verifying.Config, directory: Path) -> None:
    """Raises unless the key signed all files but the signature, and the adapter is among them.

    A configuration is used once: verifying adds the paths that the signer ignored to it.
    """
    from model_signing import hashing

    config = copy(key)
    hasher = hashing.Config()  # type: ignore[no-untyped-call]
    config.set_hashing_config(hasher.set_ignored_paths(paths=[SIGNATURE]))
    config.verify(directory, directory / SIGNATURE)
    if left_out := set(FILES) - _signed_files(directory / SIGNATURE):
        raise ValueError(f"it does not cover {', '.join(sorted(left_out))}")


def _signed_files(signature: Path) -> set[str]:
    """Names in a bundle that has been verified."""
    envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {resource["name"] for resource in statement["predicate"]["resources"]}

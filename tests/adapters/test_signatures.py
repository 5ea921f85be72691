"""Signatures of adapters, made by the library that publishers use."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.adapters.checkpoint import CONFIG, WEIGHTS
from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.sources.signatures import (
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    SignaturePolicy,
    SignatureVerifier,
)
from adapters.handmade import files, write

pytest.importorskip("model_signing")

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from model_signing import hashing, signing

OFF, WARN, REQUIRE = SignaturePolicy.OFF, SignaturePolicy.WARN, SignaturePolicy.REQUIRE
PEM, DER = Encoding.PEM, Encoding.DER
SPKI = PublicFormat.SubjectPublicKeyInfo


class Key:
    """Writes a key pair to two PEM files."""

    def __init__(self, where: Path, curve: ec.EllipticCurve) -> None:
        private = ec.generate_private_key(curve)
        self.private, self.public = where.with_suffix(".key"), where.with_suffix(".pub")
        self.private.write_bytes(private.private_bytes(PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.public.write_bytes(private.public_key().public_bytes(PEM, SPKI))
        self.fingerprint = hashlib.sha256(private.public_key().public_bytes(DER, SPKI)).hexdigest()[
            :16
        ]

    def sign(self, directory: Path, *ignored: str, into: Path | None = None) -> Path:
        """Writes model.sig as `model_signing sign key --signature DIRECTORY/model.sig` does."""
        hasher = hashing.Config().set_ignored_paths(paths=[SIGNATURE, *ignored])
        config = signing.Config().use_elliptic_key_signer(private_key=self.private)
        config.set_hashing_config(hasher).sign(directory, into or directory / SIGNATURE)
        return directory


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("keys") / "ours", ec.SECP256R1())


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("keys") / "theirs", ec.SECP384R1())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", files())


def assert_refused(adapter: Path, reason: str, *keys: Key) -> None:
    """Asserts that `require` refuses an adapter, and `warn` reports a problem."""
    paths = [key.public for key in keys]
    with pytest.raises(AdapterInvalid, match=f"^model.sig: .*{reason}"):
        SignatureVerifier(REQUIRE, public_keys=paths).verify(adapter)
    verdict = SignatureVerifier(WARN, public_keys=paths).verify(adapter)
    assert not verdict.signed
    assert verdict.signer == ""
    assert verdict.problem
    assert len(verdict.problem) <= 500


@pytest.mark.parametrize("policy", [WARN, REQUIRE])
def test_a_signed_adapter_is_known_by_its_key(
    policy: SignaturePolicy, key: Key, stranger: Key, adapter: Path
) -> None:
    both = SignatureVerifier(policy, public_keys=[stranger.public, key.public])
    for signer in (key, stranger):
        verdict = both.verify(signer.sign(adapter))
        assert verdict.signed
        assert verdict.signer == signer.fingerprint
        assert verdict.problem == ""
    assert key.fingerprint != stranger.fingerprint


def test_the_command_of_publishers_signs_what_is_accepted(key: Key, adapter: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "sign", "key", "."]
    subprocess.run(
        [*command, "--private_key", str(key.private)], cwd=adapter, check=True, capture_output=True
    )
    assert (adapter / SIGNATURE).is_file()
    assert SignatureVerifier(REQUIRE, public_keys=[key.public]).verify(adapter).signed


def test_a_signature_made_elsewhere_and_moved_in_is_accepted(
    key: Key, adapter: Path, tmp_path: Path
) -> None:
    config = signing.Config().use_elliptic_key_signer(private_key=key.private)
    config.sign(adapter, tmp_path / "made.sig")
    (tmp_path / "made.sig").rename(adapter / SIGNATURE)
    assert SignatureVerifier(REQUIRE, public_keys=[key.public]).verify(adapter).signed


def test_an_unsigned_adapter(key: Key, adapter: Path) -> None:
    assert_refused(adapter, "the file is missing", key)


def test_off_reads_nothing(tmp_path: Path) -> None:
    verdict = SignatureVerifier(OFF).verify(tmp_path / "nowhere")
    assert (verdict.signed, verdict.signer, verdict.problem) == (False, "", "")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_changed_or_missing_files_are_found(name: str, key: Key, adapter: Path) -> None:
    key.sign(adapter)
    content = bytearray((adapter / name).read_bytes())
    content[-1] ^= 1
    (adapter / name).write_bytes(content)
    assert_refused(adapter, f"Hash mismatch for '{name}'", key)
    (adapter / name).unlink()
    assert_refused(adapter, f"Missing files in model 'adapter': {name}", key)


def test_a_file_beside_the_signed_ones_is_found(key: Key, adapter: Path) -> None:
    key.sign(adapter)
    (adapter / "more.bin").write_bytes(b"more")
    assert_refused(adapter, "Extra files found in model 'adapter': more.bin", key)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_signature_that_leaves_the_adapter_out_is_none(
    name: str, key: Key, adapter: Path
) -> None:
    assert_refused(key.sign(adapter, name), f"it does not cover {name}", key)


def test_what_one_signer_ignored_is_not_ignored_for_the_next(
    key: Key, adapter: Path, tmp_path: Path
) -> None:
    verifier = SignatureVerifier(REQUIRE, public_keys=[key.public])
    noted = write(tmp_path / "noted", files() | {"notes.txt": b"not part of it"})
    assert verifier.verify(key.sign(noted, "notes.txt")).signed
    key.sign(adapter)
    (adapter / "notes.txt").write_bytes(b"not signed")
    with pytest.raises(AdapterInvalid, match=r"Extra files .* notes.txt"):
        verifier.verify(adapter)


def test_another_key_does_not_count(key: Key, stranger: Key, adapter: Path) -> None:
    assert_refused(stranger.sign(adapter), f"key {key.fingerprint}: Key mismatch", key)


def forged(bundle: dict[str, dict[str, dict[str, str]]], key: Key) -> None:
    """Sets the hint to the trusted key's."""
    hint = hashlib.sha256(key.public.read_bytes()).hexdigest()
    bundle["verificationMaterial"]["publicKey"]["hint"] = hint


def unhinted(bundle: dict[str, dict[str, dict[str, str]]], key: Key) -> None:
    """Removes the hint, as the first releases wrote none."""
    del bundle["verificationMaterial"]["publicKey"]["hint"]


@pytest.mark.parametrize("claim", [forged, unhinted])
def test_a_false_claim_to_a_key_does_not_count(
    claim: Callable[[dict[str, dict[str, dict[str, str]]], Key], None],
    key: Key,
    stranger: Key,
    adapter: Path,
) -> None:
    stranger.sign(adapter)
    bundle = json.loads((adapter / SIGNATURE).read_text())
    claim(bundle, key)
    (adapter / SIGNATURE).write_text(json.dumps(bundle))
    assert_refused(adapter, f"key {key.fingerprint}: InvalidSignature", key)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"[]",
        b'"text"',
        b'{"verificationMaterial": null}',
        b'{"verificationMaterial": {}, "mediaType": 1}',
        b"[" * 100_000,
        b'{"verificationMaterial": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_garbage_is_no_signature(content: bytes, key: Key, adapter: Path) -> None:
    (adapter / SIGNATURE).write_bytes(content)
    assert_refused(adapter, f"is not valid; key {key.fingerprint}: ", key)


def test_a_bundle_changed_anywhere_that_counts_is_refused(key: Key, adapter: Path) -> None:
    key.sign(adapter)
    whole = json.loads((adapter / SIGNATURE).read_text())
    for spoil in (
        lambda e: e.update(payload="AAAA" + e["payload"][4:]),
        lambda e: e.update(payloadType="text/plain"),
        lambda e: e["signatures"][0].update(sig="AAAA" + e["signatures"][0]["sig"][4:]),
        lambda e: e.update(signatures=[]),
    ):
        bundle = json.loads(json.dumps(whole))
        spoil(bundle["dsseEnvelope"])
        (adapter / SIGNATURE).write_text(json.dumps(bundle))
        assert_refused(adapter, "is not valid", key)


def test_an_oversized_signature_is_not_read(key: Key, adapter: Path) -> None:
    signature = key.sign(adapter) / SIGNATURE
    signature.write_bytes(signature.read_bytes() + b" " * MAX_SIGNATURE_BYTES)
    assert_refused(adapter, f"bytes, the limit is {MAX_SIGNATURE_BYTES}", key)


@pytest.mark.parametrize("policy", [WARN, REQUIRE])
def test_a_policy_needs_keys_that_are_keys(policy: SignaturePolicy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"public_keys: .* needs at least one"):
        SignatureVerifier(policy)
    missing, text, other = (tmp_path / name for name in ("missing.pub", "text.pub", "rsa.pub"))
    text.write_text("no key")
    public = rsa.generate_private_key(65537, 2048).public_key()
    other.write_bytes(public.public_bytes(PEM, SPKI))
    curve = Key(tmp_path / "curve", ec.SECP256K1()).public
    for path in (missing, text, other, curve):
        with pytest.raises(
            ValueError, match=f"public_keys: {path} is not an elliptic-curve public key"
        ):
            SignatureVerifier(policy, public_keys=[path])


def test_without_the_library_only_off_can_be_held(
    key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ValueError, match="policy require needs the package model-signing"):
        SignatureVerifier(REQUIRE, public_keys=[key.public])
    assert not SignatureVerifier(OFF).verify(Path("nowhere")).signed


def test_the_library_is_not_loaded_with_the_module() -> None:
    script = (
        "import sys; from adaplex.adapters.sources.signatures import SignatureVerifier;"
        "SignatureVerifier('off'); sys.exit('model_signing' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

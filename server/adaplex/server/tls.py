"""Certificates: the TLS identity of both ports, read again when its files change.

grpc is imported within functions, since checking the files before a start does not need it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.followed_files import FollowedFiles

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the server's certificate chain and key, and the roots of clients' certificates."""

    cert: Path
    key: Path
    client_ca: Path | None

    @classmethod
    def of(cls, config: ServerConfig) -> TlsFiles | None:
        """Returns the files that the settings name, None without TLS. Raises ConfigError for
        settings of which one lacks another.
        """
        cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
        if cert and key:
            return cls(cert, key, client_ca)
        if cert:
            raise ConfigError("tls_key: tls_cert needs a key; set --tls-key")
        if key or client_ca:
            name = "tls_key" if key else "tls_client_ca"
            raise ConfigError(f"tls_cert: {name} needs a certificate; set --tls-cert and --tls-key")
        return None

    @property
    def paths(self) -> dict[str, Path]:
        """Setting -> file, of those that are set."""
        named = {"tls_cert": self.cert, "tls_key": self.key, "tls_client_ca": self.client_ca}
        return {name: path for name, path in named.items() if path is not None}


@dataclass(frozen=True)
class Identity:
    """The content of the files, and what HTTP makes of it."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext

    def for_grpc(self) -> grpc.ServerCertificateConfiguration:
        """Returns the same for gRPC."""
        import grpc

        pair = (self.key, self.chain)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=self.client_ca)


class Certificates:
    """The current identity. Connections that are open keep theirs; every handshake looks whether
    the files have changed; see FollowedFiles. Thread-safe.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError, a line for each file that is missing or wrong."""
        self.files = files
        self._followed = FollowedFiles(
            "certificates", [*files.paths.values()], lambda: _read(files)
        )

    @property
    def context(self) -> ssl.SSLContext:
        """The context of the next HTTP handshake."""
        return self._followed.current()[1].context

    def for_grpc(self) -> grpc.ServerCredentials:
        """Returns credentials of a gRPC port, which follow the files."""
        import grpc

        last, identity = self._followed.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal last
            generation, identity = self._followed.current()
            if generation == last:
                return None
            last = generation
            return identity.for_grpc()

        return grpc.dynamic_ssl_server_credentials(
            identity.for_grpc(),
            fetch,  # type: ignore[arg-type]  # grpc-stubs do not know that None keeps the last one
            require_client_authentication=self.files.client_ca is not None,
        )


def _read(files: TlsFiles) -> Identity:
    """Reads and checks the files. Raises ConfigError, a line for each file at fault."""
    contents, problems = {}, []
    for name, path in files.paths.items():
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            problems.append(f"{name}: cannot read {path}: {error.strerror}")
    if problems:
        raise ConfigError("\n".join(problems))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(f"tls_cert: {files.cert} with key {files.key}", lambda: _load_pair(context, files))
    if files.client_ca is not None:
        roots = contents["tls_client_ca"]
        _load(
            f"tls_client_ca: {files.client_ca}",
            lambda: context.load_verify_locations(cadata=roots.decode("ascii")),
        )
        # Probes of /health have no certificate; http.py asks for one elsewhere.
        context.verify_mode = ssl.CERT_OPTIONAL
    return Identity(
        contents["tls_cert"], contents["tls_key"], contents.get("tls_client_ca"), context
    )


def _load_pair(context: ssl.SSLContext, files: TlsFiles) -> None:
    context.load_cert_chain(files.cert, files.key, password=_refuse_password)


def _refuse_password() -> str:
    raise ValueError("the key is encrypted; write it without a passphrase, readable by the server")


def _load(what: str, load: Callable[[], None]) -> None:
    """Calls `load`; raises ConfigError that names the files and what is wrong with them."""
    try:
        load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or str(error) or "no PEM certificates"
        readable = str(reason).replace("_", " ").lower() if str(reason).isupper() else str(reason)
        raise ConfigError(f"{what}: {readable}; give PEM files that belong together") from error

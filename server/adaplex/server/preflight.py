"""Preflight: checks of ports and paths that fail in milliseconds, before torch is imported."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from adaplex.model.base.source import check_model
from adaplex.model.errors import ModelSourceError
from adaplex.model.kernels.native.instruction_sets import UnknownInstructionSet, chosen_set
from adaplex.server.access.oidc import OidcSettings
from adaplex.server.access.token_file import TokenFile
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.tls import Certificates, TlsFiles


def check(config: ServerConfig) -> None:
    """Raises ConfigError, a line for each setting that the server could not start with."""
    checks = (
        *(
            _ports(config),
            _exposed(config),
            _tls(config),
            _tokens(config),
            _model(config),
            _folders(config),
            _files(config),
        ),
        _instruction_set(),
    )
    if problems := [*chain(*checks)]:
        raise ConfigError("\n".join(problems))


def _ports(config: ServerConfig) -> Iterator[str]:
    yield from _port("host", config.host, "port", config.port)
    if config.port and (config.host, config.port) == (config.http_host, config.http_port):
        yield f"http_port: {config.port} is the port of gRPC too; choose another, or 0 for any"
    else:
        yield from _port("http_host", config.http_host, "http_port", config.http_port)


def _port(host_name: str, host: str, port_name: str, port: int) -> Iterator[str]:
    """Yields why a port cannot be bound. Port 0 tests the address."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        yield f"{host_name}: {host} is no address: {error.strerror}"
        return
    with socket.socket(family, kind, protocol) as probe:
        # As gRPC and HTTP bind: connections of an earlier server that are closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                remedy = f"end what listens there, or set --{port_name.replace('_', '-')}"
                yield f"{port_name}: {host}:{port} is in use; {remedy} (0 picks a free port)"
            elif error.errno == errno.EACCES:
                yield f"{port_name}: {port} needs privileges; choose a port from 1024 on"
            else:
                yield f"{host_name}: cannot bind {host}: {error.strerror}"


def _exposed(config: ServerConfig) -> Iterator[str]:
    """Yields which address other machines reach, without TLS or without tokens."""
    if config.insecure:
        return
    lacking = [
        setting
        for setting, value in (
            ("tls_cert", config.tls_cert),
            ("tokens_file", config.tokens_file or config.oidc_issuer),
        )
        if value is None
    ]
    flags = " and ".join(f"--{setting.replace('_', '-')}" for setting in lacking)
    for name, host in (("host", config.host), ("http_host", config.http_host)):
        if lacking and not _is_loopback(host):
            yield (
                f"{name}: {host} is not loopback, where others can call and listen; set {flags}, "
                "or --insecure where every peer is trusted"
            )


def _is_loopback(host: str) -> bool:
    """True if all addresses of a host are of this machine alone; a host that is none is told by
    _port.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)


def _tokens(config: ServerConfig) -> Iterator[str]:
    try:
        OidcSettings.of(config)
        if config.tokens_file is not None:
            TokenFile(config.tokens_file).read()
    except ConfigError as error:
        yield str(error)


def _tls(config: ServerConfig) -> Iterator[str]:
    try:
        if files := TlsFiles.of(config):
            Certificates(files)
    except ConfigError as error:
        yield str(error)


def _model(config: ServerConfig) -> Iterator[str]:
    try:
        check_model(config.model)
    except ModelSourceError as error:
        yield str(error)


def _instruction_set() -> Iterator[str]:
    try:
        chosen_set()
    except UnknownInstructionSet as error:
        yield str(error)


def _folders(config: ServerConfig) -> Iterator[str]:
    yield from _folder("store_dir", config.store_dir, writable=True)
    if config.cache is not None:  # may be read-only if it holds everything
        yield from _folder("cache", config.cache, writable=False)


def _folder(name: str, folder: Path, *, writable: bool) -> Iterator[str]:
    """Yields why a folder, or the nearest of its parents that exists, cannot be used."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        yield f"{name}: {there} is a file, not a folder; set --{name.replace('_', '-')}"
    elif writable and not os.access(there, os.W_OK | os.X_OK):
        yield (
            f"{name}: {there} cannot be written by this user; change its permissions or set "
            f"--{name.replace('_', '-')}"
        )


def _files(config: ServerConfig) -> Iterator[str]:
    for key in config.signature_keys:
        if not key.is_file():
            yield f"signature_keys: no such file: {key}"
    for name, path in config.adapters.items():
        if not path.exists():
            yield f"adapters: {name}={path}: no such directory or .gguf file"

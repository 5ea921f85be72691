"""TLS on both ports: who is let in, who is told what, and certificates that change."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest

from adaplex.client import AsyncClient, Client, Unavailable
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.tls import Certificates, TlsFiles
from server.certificates import Authority, Pair
from server.server_rig import ServerRig, rig
from time_limits import WAIT_SECONDS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("server")


def settings(pair: Pair, **more: Any) -> dict[str, Any]:
    return {"tls_cert": pair.cert, "tls_key": pair.key, **more}


async def ask(server: ServerRig, **options: Any) -> str:
    """Returns the name of the model, asked by a client of its own."""

    def call() -> str:
        target = f"127.0.0.1:{server.server.port}"
        with Client(target, timeout=WAIT_SECONDS, **options) as client:
            return client.server_info().model.name

    return await asyncio.to_thread(call)


async def fetch(
    server: ServerRig, path: str, context: ssl.SSLContext | None
) -> tuple[int, str, bytes]:
    """Returns status, text and the server's certificate of a GET on the HTTP port."""

    def get() -> tuple[int, str, bytes]:
        where = ("127.0.0.1", server.server.http_port)
        connection: Any = (
            http.client.HTTPConnection(*where, timeout=WAIT_SECONDS)
            if context is None
            else http.client.HTTPSConnection(*where, timeout=WAIT_SECONDS, context=context)
        )
        try:
            connection.connect()
            shown = b"" if context is None else connection.sock.getpeercert(binary_form=True)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), shown
        finally:
            connection.close()

    return await asyncio.to_thread(get)


async def test_clients_that_trust_the_root_are_served_on_both_ports(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    trusting = ssl.create_default_context(cafile=authority.roots)
    async with rig(tmp_path, **settings(pair)) as server:
        assert await ask(server, tls=authority.roots) == "toy"
        status, text, _ = await fetch(server, "/health", trusting)
        assert (status, text) == (200, "serving\n")
        assert "adaplex_" in (await fetch(server, "/metrics", trusting))[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "if the server speaks TLS, set tls"),
        ({"tls": True}, "not of a trusted root"),
    ],
)
async def test_other_clients_are_told_what_is_missing(
    options: dict[str, Any], told: str, tmp_path: Path, pair: Pair
) -> None:
    async with rig(tmp_path, **settings(pair)) as server:
        with pytest.raises(Unavailable, match=told):
            await ask(server, **options)


async def test_a_tls_client_of_a_plain_server_is_told(tmp_path: Path, authority: Authority) -> None:
    async with rig(tmp_path) as server:
        with pytest.raises(Unavailable, match="the server does not speak TLS"):
            await ask(server, tls=authority.roots)


async def test_plain_http_is_told_to_use_https(tmp_path: Path, pair: Pair) -> None:
    async with rig(tmp_path, **settings(pair)) as server:
        status, text, _ = await fetch(server, "/metrics", None)
        assert (status, text) == (400, "this port speaks HTTPS; use https://\n")


async def test_a_client_ca_demands_certificates_except_for_health(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    known = authority.issue("client")
    stranger = Authority(tmp_path, "other").issue("stranger")
    context = ssl.create_default_context(cafile=authority.roots)
    async with rig(tmp_path, **settings(pair, tls_client_ca=authority.roots)) as server:
        shown = {"client_cert": known.cert, "client_key": known.key}
        assert await ask(server, tls=authority.roots, **shown) == "toy"
        for options in ({}, {"client_cert": stranger.cert, "client_key": stranger.key}):
            with pytest.raises(Unavailable):
                await ask(server, tls=authority.roots, **options)
        assert (await fetch(server, "/health", context))[0] == 200
        status, text, _ = await fetch(server, "/metrics", context)
        assert (status, text) == (403, "needs a certificate signed by tls_client_ca\n")
        context.load_cert_chain(known.cert, known.key)
        assert (await fetch(server, "/metrics", context))[0] == 200


async def test_a_tls_version_below_1_2_is_refused(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    old = ssl.create_default_context(cafile=authority.roots)
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.maximum_version = ssl.TLSVersion.TLSv1_1

    def shake_hands(port: int) -> None:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", port, context=old, timeout=WAIT_SECONDS
        )
        with pytest.raises((ssl.SSLError, ConnectionError)):
            connection.connect()

    async with rig(tmp_path, **settings(pair)) as server:
        for port in (server.server.port, server.server.http_port):
            await asyncio.to_thread(shake_hands, port)


async def test_changed_files_serve_new_connections_and_keep_running_streams(
    tmp_path: Path, authority: Authority
) -> None:
    used = authority.issue("before", files="used")
    successor = Authority(tmp_path, "successor")
    trusting = ssl.create_default_context(cafile=authority.roots)
    async with rig(tmp_path, **settings(used)) as server:
        target = f"127.0.0.1:{server.server.port}"
        server.runner.gate.clear()
        async with (
            AsyncClient(target, tls=authority.roots) as client,
            client.stream("hello", max_tokens=200, ignore_eos=True) as stream,
        ):
            await anext(aiter(stream))
            first = (await fetch(server, "/health", trusting))[2]

            after = successor.issue("after")
            shutil.copy(after.cert, used.cert)  # does not fit the key yet
            assert (await fetch(server, "/health", trusting))[2] == first
            assert await ask(server, tls=authority.roots) == "toy"
            shutil.copy(after.key, used.key)

            assert await ask(server, tls=successor.roots) == "toy"
            trusting.load_verify_locations(successor.roots)
            assert (await fetch(server, "/health", trusting))[2] != first
            server.runner.gate.set()
            async for _ in stream:
                pass
        assert len(stream.generation.token_ids) == 200


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"tls_cert": "server.crt"}, "tls_key: tls_cert needs a key"),
        ({"tls_key": "server.key"}, "tls_cert: tls_key needs a certificate"),
        ({"tls_client_ca": "root.pem"}, "tls_cert: tls_client_ca needs a certificate"),
        ({"tls_cert": "server.crt", "tls_key": "none"}, "tls_key: cannot read .*none: No such"),
        ({"tls_cert": "server.crt", "tls_key": "other.key"}, "key values mismatch"),
        ({"tls_cert": "server.key", "tls_key": "server.key"}, "tls_cert: .*server.key"),
        (
            {"tls_cert": "server.crt", "tls_key": "server.key", "tls_client_ca": "server.key"},
            "tls_client_ca: .*server.key",
        ),
    ],
)
def test_files_that_cannot_serve_are_named(
    named: dict[str, str], told: str, authority: Authority, pair: Pair
) -> None:
    authority.issue("other")
    config = ServerConfig(**{name: authority.folder / file for name, file in named.items()})

    def read() -> Certificates | None:
        files = TlsFiles.of(config)
        return files and Certificates(files)

    with pytest.raises(ConfigError, match=told):
        read()

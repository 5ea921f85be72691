from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from adaplex.client import AdaptableModule, AsyncClient, Client, InvalidArgument, Unavailable
from adaplex.client._connection import CHANNEL_OPTIONS, DIRECT, Connection, is_loopback
from adaplex.v1 import server_pb2, server_pb2_grpc
from client.fake_server import FakeServer
from grpc_arguments import unknown_arguments
from time_limits import WAIT_SECONDS


def connection_to(target: str | None = None, **options: Any) -> Connection:
    defaults: dict[str, Any] = {"timeout": None, "token": None, "metadata": None, "tls": False}
    return Connection.from_options(target, **defaults | options)


def test_the_target_is_the_argument_the_environment_or_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ADAPLEX_TARGET", raising=False)
    assert connection_to().target == "127.0.0.1:50051"
    monkeypatch.setenv("ADAPLEX_TARGET", "gpu-1:50051")
    assert connection_to().target == "gpu-1:50051"
    assert connection_to("gpu-2:50051").target == "gpu-2:50051"


LOOPBACK = [
    "127.0.0.1:50051",
    "127.8.9.10:1",
    "localhost:50051",
    "LocalHost",
    "localhost.:50051",
    "adaplex.localhost:50051",
    "[::1]:50051",
    "::1",
    "[::ffff:127.0.0.1]:50051",
    "[::1%lo]:50051",
    "ipv6:[::1%25lo]:50051",
    "0.0.0.0:50051",
    "[::]:50051",
    "dns:localhost:50051",
    "dns:///localhost:50051",
    "dns://8.8.8.8/127.0.0.1:50051",
    "ipv4:127.0.0.1:1,127.0.0.2:2",
    "ipv6:[::1]:50051",
    "ipv6:%5B::1%5D:50051",
    "unix:/run/adaplex",
    "unix:///run/adaplex",
    "unix-abstract:adaplex",
]
REMOTE = [
    "gpu-1:50051",
    "localhost.example.com:50051",
    "127.0.0.1.example.com:50051",
    "10.0.0.1:50051",
    "[2001:db8::1]:50051",
    "dns:///gpu-1:50051",
    "ipv4:127.0.0.1:1,10.0.0.1:2",
    "xds:///localhost",
]


@pytest.mark.parametrize("target", LOOPBACK)
def test_loopback_is_reached_without_a_proxy(target: str) -> None:
    assert is_loopback(target)
    assert ("grpc.enable_http_proxy", 0) in connection_to(target).channel_options


@pytest.mark.parametrize("target", REMOTE)
def test_other_targets_are_reached_as_the_environment_says(target: str) -> None:
    assert not is_loopback(target)
    assert "grpc.enable_http_proxy" not in dict(connection_to(target).channel_options)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_server_on_loopback_is_reached_whatever_proxy_is_named(
    monkeypatch: pytest.MonkeyPatch, connect: Any, server: FakeServer, variable: str
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    call = connect(server.target)
    assert call("server_info", timeout=WAIT_SECONDS).version == "0.1.0"
    call("wait_ready", timeout=WAIT_SECONDS)
    with grpc.insecure_channel(server.target) as channel:
        plain = server_pb2_grpc.ServerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            plain.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=WAIT_SECONDS)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_grpc_knows_every_option_of_the_client() -> None:
    unknown = unknown_arguments([*CHANNEL_OPTIONS, *DIRECT])
    assert unknown == []


def test_a_call_has_its_own_timeout_or_the_clients() -> None:
    connection = connection_to(timeout=30.0)
    assert connection.call_options().timeout == 30.0
    assert connection.call_options(timeout=0.5).timeout == 0.5
    assert connection_to().call_options().timeout is None


def test_token_and_metadata_go_with_every_call(connect: Any, server: FakeServer) -> None:
    call = connect(server.target, token="s3cret", metadata={"X-Team": "blue"})
    call("generate", "hello")
    call("server_info")
    for sent in server.metadata:
        assert sent["authorization"] == "Bearer s3cret"
        assert sent["x-team"] == "blue"


@pytest.mark.parametrize("options", [{"token": "caf\xe9"}, {"metadata": {"x-team": "a\r\nb"}}])
def test_metadata_that_grpc_cannot_send_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="printable ASCII"):
        Client(**options)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """A private key, and the path of its self-signed certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.fail("needs the openssl command: apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "key.pem").read_bytes(), folder / "cert.pem"


def test_tls_with_own_roots(connect: Any, certificate: tuple[bytes, Path]) -> None:
    key, roots = certificate
    credentials = grpc.ssl_server_credentials([(key, roots.read_bytes())])
    with FakeServer(credentials) as server:
        assert connect(server.target, tls=roots)("generate", "hello").model == "tiny"
        assert connect(server.target, tls=roots.read_bytes())("server_info").version == "0.1.0"
        for distrusting in (True, False):
            with pytest.raises(Unavailable):
                connect(server.target, tls=distrusting)("server_info", timeout=WAIT_SECONDS)


def test_clients_close_with_their_block(server: FakeServer) -> None:
    with Client(server.target) as client:
        assert client.server_info().model.name == "tiny"
    with pytest.raises(RuntimeError, match="closed"):
        client.server_info()


async def test_async_clients_close_with_their_block(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        assert (await client.server_info()).model.name == "tiny"
    with pytest.raises(RuntimeError, match="closed"):
        await client.server_info()


def test_server_info_is_converted_whole(call: Any) -> None:
    info = call("server_info")
    assert (info.version, info.uptime_seconds) == ("0.1.0", 61.5)
    assert (info.model.quantization, info.model.max_model_len) == ("int4-group", 2048)
    assert info.model.vocab_size == 300
    assert info.model.modules == (AdaptableModule("lm_head", "linear", 64, 300, is_head=True),)
    assert (info.capacity.requests_running, info.capacity.kv_blocks_used) == (2, 9)
    assert (info.limits.max_concurrent_sequences, info.limits.max_adapter_rank) == (16, 256)

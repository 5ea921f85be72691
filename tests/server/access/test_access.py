"""Every RPC and HTTP path against every kind of credential."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from adaplex.client import Client, Unauthenticated
from adaplex.server.access import authenticator as authentication
from adaplex.server.access.authenticator import Authenticator, Credential
from adaplex.server.access.permissions import SCOPES, scope_of
from adaplex.server.access.principal import Scope
from adaplex.server.access.token_file import TokenFile
from adaplex.server.access.tokens import Token
from adaplex.server.app import SERVICES
from adaplex.server.errors import AuthenticationBusy
from adaplex.server.errors import Unauthenticated as Refused
from adaplex.v1 import adapters_pb2, generation_pb2, server_pb2
from server.adapter_uploads import adapter_files, upload_messages
from server.calls import rich_status
from server.certificates import Authority
from server.server_rig import ServerRig, rig

METHODS = {
    f"{service.full_name}/{method.name}": method
    for file in (generation_pb2, adapters_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
EVERY = frozenset(Scope)


@dataclass
class Guarded:
    """A server that knows its callers, and a token of each kind."""

    server: ServerRig
    file: TokenFile
    tokens: dict[str, str]

    async def call(self, method: str, token: str | None) -> StatusCode:
        """Calls an RPC with an empty message. Returns its status."""
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        described = METHODS[method]
        request = described.input_type._concrete_class()
        answer = described.output_type._concrete_class
        streams = (described.client_streaming, described.server_streaming)
        kind = {
            (False, False): "unary_unary",
            (False, True): "unary_stream",
            (True, False): "stream_unary",
        }[streams]

        def run() -> StatusCode:
            with grpc.insecure_channel(f"127.0.0.1:{self.server.server.port}") as channel:
                make = getattr(channel, kind)
                stub = make(
                    f"/{method}",
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=answer.FromString,
                )
                sent = iter([request]) if described.client_streaming else request
                try:
                    result = stub(sent, metadata=metadata)
                    if described.server_streaming:
                        list(result)
                except grpc.RpcError as error:
                    return error.code()  # type: ignore[no-any-return]
                return StatusCode.OK

        return await asyncio.to_thread(run)

    async def get(self, path: str, token: str | None = None) -> tuple[int, str]:
        """Returns status and text of an HTTP path."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = f"http://127.0.0.1:{self.server.server.http_port}{path}"

        def run() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as got:
                    return got.status, got.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(run)


@asynccontextmanager
async def guarded(folder: Path, **settings: Any) -> AsyncIterator[Guarded]:
    file = TokenFile(folder / "tokens.json")
    tokens = {}
    for scope in Scope:
        tokens[scope.value] = str(file.create(scope.name, tenant="t", scopes=frozenset([scope]))[1])
    past = datetime.now(UTC) - timedelta(seconds=1)
    tokens["expired"] = str(file.create("old", tenant="t", scopes=EVERY, expires=past)[1])
    tokens["revoked"] = str(file.create("gone", tenant="t", scopes=EVERY)[1])
    file.change("gone", revoked=past)
    known = Token.parse(tokens["admin"])
    assert known is not None
    tokens["wrong secret"] = str(Token(known.id, Token.new().secret))
    tokens["unknown"] = str(Token.new())
    tokens["no token"] = "letmein"
    async with rig(folder, tokens_file=file.path, **settings) as server:
        yield Guarded(server, file, tokens)


REFUSED = ("expired", "revoked", "wrong secret", "unknown", "no token")


async def test_every_rpc_admits_its_scope_and_admin_alone(tmp_path: Path) -> None:
    async with guarded(tmp_path) as it:
        for method in METHODS:
            for kind in (None, *REFUSED):
                got = await it.call(method, None if kind is None else it.tokens[kind])
                assert got is StatusCode.UNAUTHENTICATED, (method, kind)
            needed = scope_of(*method.split("/"))
            for scope in Scope:
                got = await it.call(method, it.tokens[scope])
                passes = needed is None or scope in (needed, Scope.ADMIN)
                assert (got is not StatusCode.PERMISSION_DENIED) == passes, (method, scope)
                assert got is not StatusCode.UNAUTHENTICATED, (method, scope)


def test_every_rpc_has_a_line_in_the_table() -> None:
    assert set(SCOPES) == set(METHODS)
    assert {method.split("/")[0] for method in METHODS} == set(SERVICES)
    assert scope_of("adaplex.v1.AdapterService", "Unheard") is Scope.ADMIN


@pytest.mark.parametrize("public", [True, False])
async def test_http_paths_and_open_services(public: bool, tmp_path: Path) -> None:
    settings = {"public_metrics": public, "public_reflection": public}
    async with guarded(tmp_path, **settings) as it:
        assert await it.get("/health") == (200, "serving\n")
        for kind in (None, *REFUSED, *Scope):
            status, text = await it.get("/metrics", None if kind is None else it.tokens[kind])
            if public or kind is Scope.ADMIN:
                assert (status, "adaplex_" in text) == (200, True), kind
            else:
                assert status == (403 if kind in list(Scope) else 401), kind
        stub = health_pb2_grpc.HealthStub(it.server.channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == 1
        reflect = reflection_pb2_grpc.ServerReflectionStub(it.server.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflect.ServerReflectionInfo(iter([asked]))
        if public:
            listed = (await call.read()).list_services_response.service
            assert set(SERVICES) < {service.name for service in listed}
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is StatusCode.UNAUTHENTICATED


async def test_refusals_name_what_is_missing_and_reveal_nothing(tmp_path: Path) -> None:
    async with guarded(tmp_path) as it:

        async def refusal(token: str | None) -> tuple[str, str]:
            metadata = () if token is None else (("authorization", f"Bearer {token}"),)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await it.server.generate(metadata=metadata)
            details = rich_status(caught.value)
            return details["ErrorInfo"].reason, str(caught.value.details())

        assert "send a bearer token" in (await refusal(None))[1]
        unknown, wrong = (
            await refusal(it.tokens["unknown"]),
            await refusal(it.tokens["wrong secret"]),
        )
        assert unknown == wrong
        assert unknown[0] == "UNAUTHENTICATED"
        assert "old is expired" in (await refusal(it.tokens["expired"]))[1]
        reason, text = await refusal(it.tokens["adapters:read"])
        assert (reason, text) == (
            "SCOPE_MISSING",
            "needs the scope generate; READ has adapters:read",
        )


async def test_the_history_records_the_principal_and_not_what_it_says(tmp_path: Path) -> None:
    async with guarded(tmp_path) as it:

        def upload() -> Any:
            sent = (
                ("authorization", f"Bearer {it.tokens['adapters:write']}"),
                ("x-adaplex-actor", "somebody-else"),
            )
            with grpc.insecure_channel(f"127.0.0.1:{it.server.server.port}") as channel:
                stub = channel.stream_unary(
                    "/adaplex.v1.AdapterService/UploadAdapter",
                    request_serializer=adapters_pb2.UploadAdapterRequest.SerializeToString,
                    response_deserializer=adapters_pb2.UploadAdapterResponse.FromString,
                )
                return stub(iter(upload_messages(adapter_files(0), name="a")), metadata=sent)

        assert (await asyncio.to_thread(upload)).adapter.actor == "WRITE"


async def test_running_servers_follow_the_file(tmp_path: Path) -> None:
    method = "adaplex.v1.ServerService/GetServerInfo"
    async with guarded(tmp_path) as it:
        token = it.tokens["generate"]
        assert await it.call(method, token) is StatusCode.OK
        it.file.change("GENERATE", revoked=datetime.now(UTC))
        assert await it.call(method, token) is StatusCode.UNAUTHENTICATED
        fresh = it.file.create("GENERATE", tenant="t", scopes=EVERY)[1]
        assert await it.call(method, str(fresh)) is StatusCode.OK
        whole = it.file.path.read_text()
        it.file.path.write_text("{")
        assert await it.call(method, str(fresh)) is StatusCode.OK, "the last entries stay in force"
        assert await it.call(method, token) is StatusCode.UNAUTHENTICATED
        it.file.path.write_text(whole)
        assert await it.call(method, str(fresh)) is StatusCode.OK


async def test_a_certificate_is_a_principal_if_the_file_names_it(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, known, other = (authority.issue(name) for name in ("server", "node-1", "node-2"))
    TokenFile(tmp_path / "tokens.json").create(
        "node-1", tenant="t", scopes=frozenset([Scope.GENERATE]), certificate=True
    )
    tls = {"tls_cert": server.cert, "tls_key": server.key, "tls_client_ca": authority.roots}
    async with rig(tmp_path, tokens_file=tmp_path / "tokens.json", **tls) as it:

        def ask(pair: Any, token: str | None = None) -> str:
            with Client(
                f"127.0.0.1:{it.server.port}",
                tls=authority.roots,
                client_cert=pair.cert,
                client_key=pair.key,
                token=token,
            ) as client:
                return client.server_info().model.name

        assert await asyncio.to_thread(ask, known) == "toy"
        with pytest.raises(Unauthenticated, match="knows no principal 'node-2'"):
            await asyncio.to_thread(ask, other)
        with pytest.raises(Unauthenticated, match="not valid"):
            await asyncio.to_thread(ask, known, str(Token.new()))


def test_a_token_is_hashed_once_and_a_flood_of_others_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    token = file.create("ci", tenant="t", scopes=EVERY)[1]
    it = Authenticator(file)
    hashed: list[str] = []
    original = it._hash
    monkeypatch.setattr(it, "_hash", lambda text: (hashed.append(text), original(text))[1])
    shown = Credential(f"bearer {token}", "")
    assert [it.authenticate_blocking(shown).name for _ in range(3)] == ["ci"] * 3
    for _ in range(2):
        with pytest.raises(Refused):
            it.authenticate_blocking(Credential("Bearer nonsense", ""))
    assert hashed == [str(token), "nonsense"]
    monkeypatch.setattr(authentication, "MAX_WAITING", 0)
    assert it.authenticate_blocking(shown).name == "ci", "known tokens do not wait"
    with pytest.raises(AuthenticationBusy):
        it.authenticate_blocking(Credential("Bearer other", ""))
    it.close()

"""What is asked, how a call failed, and waiting for what happens elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from adaplex.v1 import adapters_pb2
from adaplex.v1.generation_pb2 import GenerateRequest, GenerationSpec

if TYPE_CHECKING:
    from server.toy import Rig

ACTOR = (("x-adaplex-actor", "ci-bot"),)


def spec(text: str = "hello", **fields: Any) -> GenerationSpec:
    return GenerationSpec(**({"text": text} | fields))


def ask(adapter: str = "", **fields: Any) -> GenerateRequest:
    return GenerateRequest(spec=GenerationSpec(text="x", adapter=adapter, **fields))


async def applied(toy: Rig, adapter: str = "", **fields: Any) -> Any:
    """What a request for the adapter says was applied."""
    answer = await toy.generation.Generate(ask(adapter, **fields))
    return answer.started.adapter


async def versions(toy: Rig, count: int = 2, name: str = "a") -> list[str]:
    """Digests of new versions under a name."""
    return [(await toy.upload(name, seed, replace=True)).adapter.digest for seed in range(count)]


def target(version: int, weight: float = 1.0) -> adapters_pb2.AliasTarget:
    return adapters_pb2.AliasTarget(version=version, weight=weight)


async def point(toy: Rig, alias: str, *targets: adapters_pb2.AliasTarget, name: str = "a") -> Any:
    """Points an alias elsewhere."""
    request = adapters_pb2.SetAliasRequest(name=name, alias=alias, targets=targets)
    return (await toy.adapters.SetAlias(request, metadata=ACTOR)).adapter


async def status(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """How a call failed: code, and the rich details by their short type name."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value.code(), rich_status(caught.value)


def rich_status(error: Any) -> dict[str, Any]:
    trailing = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailing, error
    raw = trailing["grpc-status-details-bin"]
    found = Status.FromString(raw)
    assert found.code == error.code().value[0]
    assert found.message == error.details()
    details = {}
    for detail in found.details:
        kind = detail.TypeName().rpartition(".")[2]
        details[kind] = getattr(error_details_pb2, kind)()
        detail.Unpack(details[kind])
    return details


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition of another thread or task."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

"""Requests to a toy server, how calls failed, and waiting for conditions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from adaplex.v1 import adapters_pb2
from adaplex.v1.generation_pb2 import GenerationSpec

if TYPE_CHECKING:
    from server.server_rig import ServerRig

ACTOR = (("x-adaplex-actor", "ci-bot"),)


def spec(text: str = "hello", **fields: Any) -> GenerationSpec:
    return GenerationSpec(**({"text": text} | fields))


async def applied(toy: ServerRig, adapter: str = "", **fields: Any) -> Any:
    """Returns the proof of a request for the adapter."""
    response = await toy.generate("x", adapter=adapter, **fields)
    return response.started.adapter


async def versions(toy: ServerRig, count: int = 2, name: str = "a") -> list[str]:
    """Uploads versions of a name. Returns their digests."""
    return [(await toy.upload(name, seed, replace=True)).adapter.digest for seed in range(count)]


def target(version: int, weight: float = 1.0) -> adapters_pb2.AliasTarget:
    return adapters_pb2.AliasTarget(version=version, weight=weight)


async def point(
    toy: ServerRig, alias: str, *targets: adapters_pb2.AliasTarget, name: str = "a"
) -> Any:
    """Points an alias to targets."""
    request = adapters_pb2.SetAliasRequest(name=name, alias=alias, targets=targets)
    return (await toy.adapters.SetAlias(request, metadata=ACTOR)).adapter


async def status(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Returns how a call failed: code, and the details by their short type names."""
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
    """Waits for a condition that another thread or task fulfils."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

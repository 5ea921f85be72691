"""How a call failed, and waiting for what happens elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status


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

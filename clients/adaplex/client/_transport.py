"""The channel of a client, and how a call is made on it: blocking and for asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, TypeVar

import grpc
import grpc.aio

from adaplex.client._connection import CHANNEL_OPTIONS, Call, Connection
from adaplex.client.errors import translated

R = TypeVar("R")


class Transport:
    """A blocking channel; grpc's errors come out as the client's."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel = connection.blocking_channel()
        self._closed = False

    def call(self, method: Callable[..., R], request: object, call: Call, **how: Any) -> R:
        """Makes a call. RuntimeError when the client is closed, else what `translated` raises."""
        if self._closed:
            raise RuntimeError("the client is closed")
        with translated(call.request_id):
            return method(request, timeout=call.timeout, metadata=call.metadata, **how)

    def close(self) -> None:
        """Ends all calls. Idempotent."""
        self._closed = True
        self.channel.close()


class AsyncTransport:
    """As Transport, for asyncio."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        target, credentials = connection.target, connection.credentials
        self.channel = (
            grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, CHANNEL_OPTIONS)
        )
        self._closed = False

    @cached_property
    def blocking_channel(self) -> grpc.Channel:
        """A second channel, made when it is first used."""
        return self.connection.blocking_channel()

    def start(self, method: Callable[..., R], request: object, call: Call, **how: Any) -> R:
        """Begins a call; what it returns is awaited, or read, by the caller."""
        if self._closed:
            raise RuntimeError("the client is closed")
        return method(request, timeout=call.timeout, metadata=call.metadata, **how)

    async def call(
        self, method: Callable[..., Awaitable[R]], request: object, call: Call, **how: Any
    ) -> R:
        """Makes a call. RuntimeError when the client is closed, else what `translated` raises."""
        with translated(call.request_id):
            return await self.start(method, request, call, **how)

    async def close(self) -> None:
        """Ends all calls. Idempotent."""
        self._closed = True
        if "blocking_channel" in vars(self):
            self.blocking_channel.close()
        await self.channel.close(None)

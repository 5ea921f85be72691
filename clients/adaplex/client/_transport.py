"""Transport, AsyncTransport: a client's channel, and calls on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, TypeVar

import grpc
import grpc.aio

from adaplex.client._connection import CallOptions, Connection
from adaplex.client.errors import translate_errors

R = TypeVar("R")


class Transport:
    """A blocking channel; raises grpc's errors as the client's."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel = connection.blocking_channel()
        self._closed = False

    def call(
        self, method: Callable[..., R], request: object, call: CallOptions, **grpc_options: Any
    ) -> R:
        """Makes a call and returns its response, or the iterator of a stream.

        Raises RuntimeError if the client is closed, AdaplexClientError if the call fails.
        """
        if self._closed:
            raise RuntimeError("the client is closed")
        with translate_errors(call.request_id):
            return method(request, timeout=call.timeout, metadata=call.metadata, **grpc_options)

    def close(self) -> None:
        """Ends all calls. Idempotent."""
        self._closed = True
        self.channel.close()


class AsyncTransport:
    """A channel for asyncio; raises grpc's errors as the client's."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        target, credentials = connection.target, connection.credentials
        options = connection.channel_options
        self.channel = (
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._closed = False

    @cached_property
    def blocking_channel(self) -> grpc.Channel:
        """A channel of grpc's blocking API to the same server, opened on first use."""
        return self.connection.blocking_channel()

    def start(
        self, method: Callable[..., R], request: object, call: CallOptions, **grpc_options: Any
    ) -> R:
        """Starts a call and returns grpc's call object, to be awaited or read.

        Raises RuntimeError if the client is closed.
        """
        if self._closed:
            raise RuntimeError("the client is closed")
        return method(request, timeout=call.timeout, metadata=call.metadata, **grpc_options)

    async def call(
        self,
        method: Callable[..., Awaitable[R]],
        request: object,
        call: CallOptions,
        **grpc_options: Any,
    ) -> R:
        """Makes a call and returns its response.

        Raises RuntimeError if the client is closed, AdaplexClientError if the call fails.
        """
        with translate_errors(call.request_id):
            return await self.start(method, request, call, **grpc_options)

    async def close(self) -> None:
        """Ends all calls. Idempotent."""
        self._closed = True
        if "blocking_channel" in vars(self):
            self.blocking_channel.close()
        await self.channel.close(None)

"""GenerationService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from adaplex.server.generator import Event, Generator
from adaplex.server.rpc_context import current_rpc
from adaplex.v1 import generation_pb2, generation_pb2_grpc
from adaplex.v1.generation_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GenerateStreamRequest,
    GenerateStreamResponse,
)

UNARY_INTERVAL = 16
"""Tokens that are taken in at once where nobody sees them one by one: often enough for metrics."""


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Text generation."""

    def __init__(self, generator: Generator, stream_interval: int) -> None:
        """`stream_interval`: tokens in a message of a stream."""
        self._generator, self._stream_interval = generator, stream_interval

    async def Generate(self, request: GenerateRequest, context: Any) -> GenerateResponse:
        """The stream's messages in one."""
        response = GenerateResponse()
        # What comes after a stop string would be computed for nothing.
        interval = 1 if request.spec.sampling.stop else UNARY_INTERVAL
        answer = self._generator.generate(request.spec, current_rpc(), interval=interval)
        async with aclosing(answer) as events:
            async for event in events:
                _add(response, event)
        return response

    async def GenerateStream(
        self, request: GenerateStreamRequest, context: Any
    ) -> AsyncIterator[GenerateStreamResponse]:
        """One `started`, deltas, one `finished`."""
        interval = self._stream_interval
        answer = self._generator.generate(request.spec, current_rpc(), interval=interval)
        async with aclosing(answer) as events:
            async for event in events:
                yield _wrapped(event)


def _add(response: GenerateResponse, event: Event) -> None:
    """Adds one event of the stream to the whole answer."""
    match event:
        case generation_pb2.GenerationStarted():
            response.started.CopyFrom(event)
        case generation_pb2.GenerationDelta():
            response.text += event.text
            response.token_ids.extend(event.token_ids)
            response.logprobs.extend(event.logprobs)
        case generation_pb2.GenerationFinished():
            response.finished.CopyFrom(event)


def _wrapped(event: Event) -> GenerateStreamResponse:
    """One event as a message of the stream."""
    match event:
        case generation_pb2.GenerationStarted():
            return GenerateStreamResponse(started=event)
        case generation_pb2.GenerationDelta():
            return GenerateStreamResponse(delta=event)
        case generation_pb2.GenerationFinished():
            return GenerateStreamResponse(finished=event)

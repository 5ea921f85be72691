"""GenerationService: text generation, whole or streamed."""

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
"""Tokens per delta of a unary response, which nobody sees one by one; small enough for metrics."""


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Converts requests and events; the Generator does the work."""

    def __init__(self, generator: Generator, stream_interval: int) -> None:
        """`stream_interval` is the number of tokens per message of a stream."""
        self._generator, self._stream_interval = generator, stream_interval

    async def Generate(self, request: GenerateRequest, context: Any) -> GenerateResponse:
        """Returns the messages of a stream as one."""
        response = GenerateResponse()
        # Tokens after a stop string would be computed for nothing.
        interval = 1 if request.spec.sampling.stop else UNARY_INTERVAL
        generation = self._generator.generate(request.spec, current_rpc(), interval=interval)
        async with aclosing(generation) as events:
            async for event in events:
                _add(response, event)
        return response

    async def GenerateStream(
        self, request: GenerateStreamRequest, context: Any
    ) -> AsyncIterator[GenerateStreamResponse]:
        """Yields one `started`, deltas and one `finished`."""
        interval = self._stream_interval
        generation = self._generator.generate(request.spec, current_rpc(), interval=interval)
        async with aclosing(generation) as events:
            async for event in events:
                yield _wrapped(event)


def _add(response: GenerateResponse, event: Event) -> None:
    """Adds one event of the stream to the unary response."""
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
    """Wraps one event in a message of the stream."""
    match event:
        case generation_pb2.GenerationStarted():
            return GenerateStreamResponse(started=event)
        case generation_pb2.GenerationDelta():
            return GenerateStreamResponse(delta=event)
        case generation_pb2.GenerationFinished():
            return GenerateStreamResponse(finished=event)

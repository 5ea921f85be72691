"""GenerationService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from adaplex.server.calls import current_call
from adaplex.server.generator import Event, Generator
from adaplex.v1 import generation_pb2, generation_pb2_grpc
from adaplex.v1.generation_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GenerateStreamRequest,
    GenerateStreamResponse,
)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Text generation."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def Generate(self, request: GenerateRequest, context: Any) -> GenerateResponse:
        """The stream's messages in one."""
        response = GenerateResponse()
        async with aclosing(self._generator.generate(request.spec, current_call())) as events:
            async for event in events:
                _add(response, event)
        return response

    async def GenerateStream(
        self, request: GenerateStreamRequest, context: Any
    ) -> AsyncIterator[GenerateStreamResponse]:
        """One `started`, deltas, one `finished`."""
        async with aclosing(self._generator.generate(request.spec, current_call())) as events:
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

"""StreamState: the events of a generation received so far, shared by both clients."""

from __future__ import annotations

from adaplex.client import _wire
from adaplex.client.errors import Cancelled, Internal
from adaplex.client.generation_types import Delta, Finished, Generation, GenerationEvent, Started
from adaplex.v1 import generation_pb2


class StreamState:
    """Collects the events of a stream and checks their order: started, deltas, finished."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        """The id sent with the call."""
        self.started: Started | None = None
        """The first event: model and adapter that answer. None until it has been read."""
        self._deltas: list[Delta] = []
        self._finished: Finished | None = None
        self._closed = False

    @property
    def generation(self) -> Generation:
        """The whole answer. Raises RuntimeError before the last event has been read."""
        if self.started is None or self._finished is None:
            raise RuntimeError("the stream has not been read to its end")
        return _wire.assemble(self.started, self._deltas, self._finished)

    def _check_open(self) -> None:
        if self._closed and self._finished is None:
            raise Cancelled("the stream was closed", request_id=self.request_id)

    def _received(self, message: generation_pb2.GenerateStreamResponse) -> GenerationEvent | None:
        event = _wire.event(message)
        if isinstance(event, Started):
            in_order = self.started is None
            self.started = event
        else:
            in_order = self.started is not None and self._finished is None
        if not in_order:
            raise Internal("the server's events are out of order", request_id=self.request_id)
        if isinstance(event, Delta):
            self._deltas.append(event)
        elif isinstance(event, Finished):
            self._finished = event
        return event

    def _ended(self) -> None:
        if self._finished is None:
            raise Internal("the stream ended without its last event", request_id=self.request_id)

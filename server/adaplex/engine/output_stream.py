"""OutputStream: the outputs of one request, from the engine thread to its reader."""

from __future__ import annotations

import asyncio

from adaplex.engine.request import Request, StepOutput


class OutputStream:
    """Outputs that one caller of `AsyncEngine.generate` has not read yet. All but `request` belongs
    to the event loop.

    The engine thread identifies a request by its stream, not by its id: an id may be used again
    while the last request of that id is being aborted.
    """

    def __init__(self, request: Request, interval: int = 1) -> None:
        """`interval`: see `AsyncEngine.generate`."""
        self.request = request
        self._interval, self._has_tokens = interval, False
        self.ended = False
        """True if the last output was put."""
        self._outputs: list[StepOutput] = []
        self._ready = asyncio.Event()

    def put(self, output: StepOutput) -> None:
        """Appends an output; outputs after the last are ignored."""
        if not self.ended:
            self.ended = output.last
            self._outputs.append(output)
            if self.ended or not self._has_tokens or len(self._outputs) >= self._interval:
                self._ready.set()
            self._has_tokens = self._has_tokens or bool(output.tokens)

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error."""
        self.put(StepOutput(self.request.request_id, error=error))

    async def collect(self) -> list[StepOutput]:
        """Waits for `interval` outputs, or the last; returns all there are, in order of steps."""
        await self._ready.wait()
        self._ready.clear()
        outputs, self._outputs = self._outputs, []
        return outputs

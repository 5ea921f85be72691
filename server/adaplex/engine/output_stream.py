"""OutputStream: the outputs of one request, from the engine thread to who reads them."""

from __future__ import annotations

import asyncio

from adaplex.engine.request import Request, StepOutput


class OutputStream:
    """What one caller of `generate` has yet to see. The engine thread knows a request by its
    stream, not by its id: an id may be used again while its last owner is being aborted.
    """

    def __init__(self, request: Request, interval: int = 1) -> None:
        """`interval`: see `AsyncEngine.generate`."""
        self.request = request
        self._interval, self._begun = interval, False
        self.ended = False
        """Whether the last output has come; on the event loop, as all but `request`."""
        self._waiting: list[StepOutput] = []
        self._came = asyncio.Event()

    def put(self, output: StepOutput) -> None:
        """Takes an output in; after the last one there is no other."""
        if not self.ended:
            self.ended = output.last
            self._waiting.append(output)
            if self.ended or not self._begun or len(self._waiting) >= self._interval:
                self._came.set()
            self._begun = self._begun or bool(output.tokens)

    def fail(self, error: Exception) -> None:
        """Ends the stream."""
        self.put(StepOutput(self.request.request_id, error=error))

    async def take(self) -> list[StepOutput]:
        """All that waits once there is enough, in the order of the steps."""
        await self._came.wait()
        self._came.clear()
        outputs, self._waiting = self._waiting, []
        return outputs

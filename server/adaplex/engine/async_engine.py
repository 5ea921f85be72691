"""AsyncEngine: the engine on a thread of its own, seen from asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from adaplex.adapters.errors import AdaplexError
from adaplex.engine.engine import Engine
from adaplex.engine.errors import EngineFailed, ServerUnavailable
from adaplex.engine.output_stream import OutputStream
from adaplex.engine.request import Request, StepOutput
from adaplex.engine.stats import EngineStats

T = TypeVar("T")
HEARTBEAT_SECONDS = 1.0
"""The longest that the engine thread sleeps."""


class AsyncEngine:
    """Owns the engine thread. All methods but `stats` belong to one event loop and never block
    it: calls travel to the thread through an inbox, the outputs of a step travel back in one go.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = threading.Event()
        self._beat = time.monotonic()
        self._stopping = False
        self._failure: BaseException | None = None
        self._unavailable: str | None = "the server is starting"
        self._open: set[OutputStream] = set()
        """On the event loop: streams that somebody reads."""
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._calls: set[asyncio.Future[Any]] = set()
        self._streams: dict[str, OutputStream] = {}
        """On the engine thread: requests in work."""
        self._rejected: list[tuple[OutputStream, StepOutput]] = []
        engine.on_load = self._wake.set

    async def start(self) -> None:
        """Starts the thread; from now on requests are taken."""
        self._loop = asyncio.get_running_loop()
        self._unavailable = None
        self._thread.start()

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses new work, lets what runs finish for `grace` seconds, ends the rest, joins."""
        self.drain()
        if grace > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._all_closed.wait(), grace)
        for stream in tuple(self._open):
            self._post(partial(self._abort, stream))
            stream.fail(ServerUnavailable("the server has stopped"))
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def drain(self) -> None:
        """From now on new work raises ServerUnavailable; what is in work goes on."""
        if self._unavailable is None:
            self._unavailable = "the server is shutting down"

    async def generate(
        self, request: Request, *, interval: int = 1
    ) -> AsyncGenerator[list[StepOutput], None]:
        """Runs a request; yields what steps have given it since the last time, an output each, and
        raises what ends it badly once all before it is out. What comes before the second token is
        yielded at once, then `interval` outputs at a time, or more where the caller is slow.

        Raises ServerUnavailable, QueueFull, RequestInvalid, AdapterTooLarge or NoRoomBesidePins at
        its first step.
        Closing it, or cancelling its task, aborts the request before the next step.
        """
        self._check_available()
        stream = OutputStream(request, interval)
        self._open.add(stream)
        self._all_closed.clear()
        try:
            self._post(partial(self._add, stream))
            ended = False
            while not ended:
                outputs = await stream.take()
                ended, error = outputs[-1].last, outputs[-1].error
                if given := outputs if error is None else outputs[:-1]:
                    yield given
                if error is not None:
                    raise error
        finally:
            if not stream.ended:
                self._post(partial(self._abort, stream))
            self._open.discard(stream)
            if not self._open:
                self._all_closed.set()

    async def unload(self, digest: str) -> bool:
        """Drops an adapter from memory as soon as nothing runs with it; whether it was there."""
        return await self._ask(partial(self._engine.unload, digest))

    async def pin(self, digest: str, packed_bytes: int, name: str) -> None:
        """Brings an adapter into the arena and keeps it there; returns before it has come. Raises
        PinsFull.
        """
        await self._ask(partial(self._engine.pin, digest, packed_bytes, name))

    async def unpin(self, digest: str) -> None:
        """Makes a pinned adapter one like others."""
        await self._ask(partial(self._engine.unpin, digest))

    def stats(self) -> EngineStats:
        """How full the engine was after its last step; from any thread."""
        return self._engine.stats()

    @property
    def healthy(self) -> bool:
        """Whether the engine thread runs and is to go on."""
        return self._thread.is_alive() and self._failure is None and not self._stopping

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine thread last completed a turn of its loop."""
        return time.monotonic() - self._beat

    async def _ask(self, call: Callable[[], T]) -> T:
        """What a call on the engine thread returns or raises."""
        if not self.healthy:
            raise ServerUnavailable("the engine does not run")
        answer: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(answer)
        self._post(partial(self._reply, call, answer))
        try:
            return await answer
        finally:
            self._calls.discard(answer)

    def _check_available(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has died: {self._failure}") from self._failure
        if self._unavailable is not None:
            raise ServerUnavailable(self._unavailable)

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.put(call)
        self._wake.set()

    def _close_all(self) -> None:
        """The thread has ended: nobody else will answer those who still wait."""
        for stream in tuple(self._open):
            error = EngineFailed(f"the engine has died: {self._failure}")
            error.__cause__ = self._failure
            stream.fail(error)
        for answer in tuple(self._calls):
            _answer(answer, ServerUnavailable("the engine has stopped"))

    # On the engine thread.

    def _work(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._take_calls()  # the aborts that stop() has posted
        except BaseException as failure:
            self._failure = failure
        finally:
            self._hand_over(self._close_all)
            self._engine.close()

    def _turn(self) -> None:
        self._wake.clear()
        self._take_calls()
        outputs = self._engine.step()
        self._deliver(outputs)
        self._beat = time.monotonic()
        if self._engine.stalled:
            self._wake.wait(self._sleep_seconds())

    def _take_calls(self) -> None:
        try:
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """Pairs outputs with their streams and hands them to the event loop at once."""
        delivery = self._rejected
        self._rejected = []
        for output in outputs:
            stream = self._streams[output.request_id]
            if output.last:
                del self._streams[output.request_id]
            delivery.append((stream, output))
        if delivery:
            self._hand_over(partial(_put_all, delivery))

    def _sleep_seconds(self) -> float:
        """Until the next deadline, at most a heartbeat."""
        deadline = self._engine.next_deadline
        left = HEARTBEAT_SECONDS if deadline is None else deadline - time.monotonic()
        return min(max(left, 0.0), HEARTBEAT_SECONDS)

    def _hand_over(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop is closed: nobody is left to hear it
            self._stopping = True

    def _add(self, stream: OutputStream) -> None:
        request_id = stream.request.request_id
        try:
            self._engine.add(stream.request)
        except AdaplexError as error:
            self._rejected.append((stream, StepOutput(request_id, error=error)))
        else:
            self._streams[request_id] = stream

    def _abort(self, stream: OutputStream) -> None:
        request_id = stream.request.request_id
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _reply(self, call: Callable[[], T], answer: asyncio.Future[T]) -> None:
        value: T | Exception
        try:
            value = call()
        except AdaplexError as error:
            value = error
        self._hand_over(partial(_answer, answer, value))


def _put_all(delivery: list[tuple[OutputStream, StepOutput]]) -> None:
    for stream, output in delivery:
        stream.put(output)


def _answer(answer: asyncio.Future[T], value: T | Exception) -> None:
    """Settles a call unless its caller has gone."""
    if answer.done():
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)

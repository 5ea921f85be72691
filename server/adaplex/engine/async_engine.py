"""AsyncEngine: runs the engine on a thread of its own, for callers in asyncio."""

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
"""Longest sleep of the engine thread."""


class AsyncEngine:
    """Owns the engine thread. All methods but `stats` belong to one event loop and never block it:
    calls reach the thread through an inbox, and all outputs of a step reach the loop in one call.
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
        """Streams that have a reader; of the event loop."""
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._calls: set[asyncio.Future[Any]] = set()
        self._streams: dict[str, OutputStream] = {}
        """Streams of requests in the engine, by id; of the engine thread."""
        self._rejected: list[tuple[OutputStream, StepOutput]] = []
        engine.on_load = self._wake.set

    async def start(self) -> None:
        """Starts the thread; from then on requests are accepted."""
        self._loop = asyncio.get_running_loop()
        self._unavailable = None
        self._thread.start()

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses new requests, lets others finish for `grace` seconds, aborts the rest, and joins
        the thread.
        """
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
        """Makes new requests raise ServerUnavailable; requests in the engine continue."""
        if self._unavailable is None:
            self._unavailable = "the server is shutting down"

    async def generate(
        self, request: Request, *, interval: int = 1
    ) -> AsyncGenerator[list[StepOutput], None]:
        """Runs a request; yields its outputs, one per step, in lists, and raises its error after
        all outputs before it. Yields outputs up to the first token at once, then `interval` at a
        time, or more if the caller is slow.

        Raises ServerUnavailable, QueueFull, RequestInvalid, AdapterTooLarge or NoRoomBesidePins
        before the first output.
        Closing the generator, or cancelling its task, aborts the request before the next step.
        """
        self._check_available()
        stream = OutputStream(request, interval)
        self._open.add(stream)
        self._all_closed.clear()
        try:
            self._post(partial(self._add, stream))
            ended = False
            while not ended:
                outputs = await stream.collect()
                ended, error = outputs[-1].last, outputs[-1].error
                if regular := outputs if error is None else outputs[:-1]:
                    yield regular
                if error is not None:
                    raise error
        finally:
            if not stream.ended:
                self._post(partial(self._abort, stream))
            self._open.discard(stream)
            if not self._open:
                self._all_closed.set()

    async def unload(self, digest: str) -> bool:
        """Drops an adapter from memory once no request uses it; returns True if it was there."""
        return await self._call(partial(self._engine.unload, digest))

    async def pin(self, digest: str, packed_bytes: int, name: str) -> None:
        """Loads an adapter into the arena and exempts it from eviction; does not wait for it.

        Raises PinsFull.
        """
        await self._call(partial(self._engine.pin, digest, packed_bytes, name))

    async def unpin(self, digest: str) -> None:
        """Makes a pinned adapter evictable."""
        await self._call(partial(self._engine.unpin, digest))

    def stats(self) -> EngineStats:
        """Returns how full the engine was after its last step; safe from any thread."""
        return self._engine.stats()

    @property
    def healthy(self) -> bool:
        """True if the engine thread runs and was not stopped."""
        return self._thread.is_alive() and self._failure is None and not self._stopping

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine thread last completed an iteration of its loop."""
        return time.monotonic() - self._beat

    async def _call(self, call: Callable[[], T]) -> T:
        """Runs a call on the engine thread; returns or raises its result."""
        if not self.healthy:
            raise ServerUnavailable("the engine does not run")
        result: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(result)
        self._post(partial(self._run_call, call, result))
        try:
            return await result
        finally:
            self._calls.discard(result)

    def _check_available(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has died: {self._failure}") from self._failure
        if self._unavailable is not None:
            raise ServerUnavailable(self._unavailable)

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.put(call)
        self._wake.set()

    def _fail_all(self) -> None:
        """Fails open streams and pending calls after the thread has ended."""
        for stream in tuple(self._open):
            error = EngineFailed(f"the engine has died: {self._failure}")
            error.__cause__ = self._failure
            stream.fail(error)
        for result in tuple(self._calls):
            _set_result(result, ServerUnavailable("the engine has stopped"))

    # Methods of the engine thread.

    def _work(self) -> None:
        try:
            while not self._stopping:
                self._iterate()
            self._run_calls()  # the aborts that stop() has posted
        except BaseException as failure:
            self._failure = failure
        finally:
            self._run_on_loop(self._fail_all)
            self._engine.close()

    def _iterate(self) -> None:
        self._wake.clear()
        self._run_calls()
        outputs = self._engine.step()
        self._deliver(outputs)
        self._beat = time.monotonic()
        if self._engine.stalled:
            self._wake.wait(self._sleep_seconds())

    def _run_calls(self) -> None:
        try:
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """Puts outputs into their streams, in one call on the event loop."""
        delivery = self._rejected
        self._rejected = []
        for output in outputs:
            stream = self._streams[output.request_id]
            if output.last:
                del self._streams[output.request_id]
            delivery.append((stream, output))
        if delivery:
            self._run_on_loop(partial(_put_all, delivery))

    def _sleep_seconds(self) -> float:
        """Returns the seconds until the next deadline, at most HEARTBEAT_SECONDS."""
        deadline = self._engine.next_deadline
        left = HEARTBEAT_SECONDS if deadline is None else deadline - time.monotonic()
        return min(max(left, 0.0), HEARTBEAT_SECONDS)

    def _run_on_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop is closed: there are no readers left
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

    def _run_call(self, call: Callable[[], T], result: asyncio.Future[T]) -> None:
        value: T | Exception
        try:
            value = call()
        except AdaplexError as error:
            value = error
        self._run_on_loop(partial(_set_result, result, value))


def _put_all(delivery: list[tuple[OutputStream, StepOutput]]) -> None:
    for stream, output in delivery:
        stream.put(output)


def _set_result(result: asyncio.Future[T], value: T | Exception) -> None:
    """Sets the result of a call, unless its caller was cancelled."""
    if result.done():
        return
    if isinstance(value, Exception):
        result.set_exception(value)
    else:
        result.set_result(value)

from __future__ import annotations

import asyncio
import threading

import pytest

from adaplex.client import (
    AsyncClient,
    AsyncGenerationStream,
    Cancelled,
    Client,
    Delta,
    GenerationEvent,
    Started,
)
from client.fake_server import FakeServer
from time_limits import WAIT_SECONDS


@pytest.fixture
def held(server: FakeServer) -> FakeServer:
    server.hold = True
    return server


async def begin_reading(stream: AsyncGenerationStream) -> asyncio.Task[GenerationEvent]:
    """A task that waits for the stream's next event."""
    began = asyncio.Event()

    async def read() -> GenerationEvent:
        began.set()
        return await anext(stream)

    task = asyncio.create_task(read())
    await began.wait()
    return task


def test_leaving_a_stream_cancels_the_call(held: FakeServer) -> None:
    with Client(held.target) as client:
        with client.stream("hello") as stream:
            assert isinstance(next(stream), Started)
        assert held.cancelled.wait(WAIT_SECONDS)
        with pytest.raises(Cancelled):
            next(stream)
        with pytest.raises(RuntimeError, match="read to its end"):
            _ = stream.generation


def test_closing_from_another_thread_ends_a_blocked_read(held: FakeServer) -> None:
    with Client(held.target) as client, client.stream("hello") as stream:
        assert isinstance(next(stream), Started)
        assert isinstance(next(stream), Delta)
        reading = threading.Thread(target=stream.close)
        reading.start()
        with pytest.raises(Cancelled):
            next(stream)
        reading.join()
        assert held.cancelled.wait(WAIT_SECONDS)


def test_closing_the_client_cancels_its_streams(held: FakeServer) -> None:
    client = Client(held.target)
    stream = client.stream("hello")
    next(stream)
    client.close()
    client.close()
    assert held.cancelled.wait(WAIT_SECONDS)
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("hello")


def test_a_stream_read_to_its_end_survives_being_closed(server: FakeServer) -> None:
    with Client(server.target) as client, client.stream("hello") as stream:
        text = "".join(event.text for event in stream)
        stream.close()
        assert stream.generation.text == text
        assert list(stream) == []


async def test_leaving_an_async_stream_cancels_the_call(held: FakeServer) -> None:
    async with AsyncClient(held.target) as client:
        async with client.stream("hello") as stream:
            assert isinstance(await anext(stream), Started)
        assert await asyncio.to_thread(held.cancelled.wait, WAIT_SECONDS)
        with pytest.raises(Cancelled):
            await anext(stream)


async def test_closing_an_async_stream_ends_a_read_that_waits(held: FakeServer) -> None:
    async with AsyncClient(held.target) as client:
        stream = client.stream("hello")
        assert isinstance(await anext(stream), Started)
        assert isinstance(await anext(stream), Delta)
        reading = await begin_reading(stream)
        await stream.close()
        with pytest.raises(Cancelled):
            await reading


async def test_cancelling_the_task_cancels_the_call_and_stays_a_cancel(held: FakeServer) -> None:
    async with AsyncClient(held.target) as client:
        stream = client.stream("hello")
        assert isinstance(await anext(stream), Started)
        assert isinstance(await anext(stream), Delta)
        reading = await begin_reading(stream)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(held.cancelled.wait, WAIT_SECONDS)


async def test_a_closed_async_client_refuses_calls(server: FakeServer) -> None:
    client = AsyncClient(server.target)
    await client.close()
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("hello")
    with pytest.raises(RuntimeError, match="closed"):
        client.stream("hello")


async def test_many_async_calls_run_at_once(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        answers = await asyncio.gather(
            *(client.generate("hello", adapter=f"a{n}@{n + 1}") for n in range(20))
        )
    assert [answer.adapter.version for answer in answers if answer.adapter] == list(range(1, 21))

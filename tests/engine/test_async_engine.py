from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from itertools import chain
from typing import Any

import pytest

from adaplex.adapters.errors import AdapterTooLarge
from adaplex.engine.async_engine import HEARTBEAT_SECONDS, AsyncEngine
from adaplex.engine.engine import Engine
from adaplex.engine.errors import (
    AdapterLoadFailed,
    DeadlineExpired,
    EngineFailed,
    QueueFull,
    RequestInvalid,
    ServerUnavailable,
)
from adaplex.engine.request import Request
from engine.fakes import (
    UNIT,
    ManualExecutor,
    collect_tokens,
    make_adapter,
    make_config,
    make_request,
)
from fake_runner import FakeRunner, FakeSource, expected


class Gate:
    """Blocks the engine thread inside a step until the test opens it."""

    def __init__(self, runner: FakeRunner) -> None:
        self.entered = threading.Event()
        self._go = threading.Event()
        runner.on_run = self._wait

    def _wait(self) -> None:
        self.entered.set()
        assert self._go.wait(10)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)

    def open(self) -> None:
        self._go.set()


class Bench:
    def __init__(self, executor: ManualExecutor | None = None, **changes: Any) -> None:
        self.runner = FakeRunner()
        self.engine = Engine(
            make_config(**changes), self.runner, FakeSource(), base_digest="base", executor=executor
        )
        self.server = AsyncEngine(self.engine)

    async def collect(self, request: Request) -> list[int]:
        return await collect_tokens(self.server, request)

    def idle(self) -> bool:
        self.engine.check_integrity()
        return not self.engine.has_work


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[Bench]:
    bench = Bench(**changes)
    await bench.server.start()
    try:
        yield bench
    finally:
        bench.runner.on_run = lambda: None
        await bench.server.stop()
    assert bench.idle()


async def test_many_requests_at_once_get_their_own_answers() -> None:
    async with running(max_running=4) as bench:
        requests = [make_request(f"r{n}", [n], "abcdefg"[n % 7], max_tokens=6) for n in range(40)]
        answers = await asyncio.gather(*map(bench.collect, requests))
        assert answers == [expected(request) for request in requests]
        assert bench.server.healthy


async def test_outputs_of_a_step_cross_to_the_loop_in_one_call() -> None:
    async with running() as bench:
        gate = Gate(bench.runner)
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(bench.collect(make_request("first", max_tokens=1)))
        await gate.reached()
        rest = [
            asyncio.create_task(bench.collect(make_request(f"r{n}", [n], max_tokens=3)))
            for n in range(6)
        ]
        await asyncio.sleep(0)
        calls: list[Any] = []
        original = loop.call_soon_threadsafe

        def counted(call: Any, *args: Any) -> Any:
            calls.append(call)
            return original(call, *args)

        loop.call_soon_threadsafe = counted  # type: ignore[assignment, method-assign]
        gate.open()
        await asyncio.gather(first, *rest)
        loop.call_soon_threadsafe = original  # type: ignore[method-assign]
        assert len(calls) == len(bench.runner.batches) == 4


async def test_what_comes_some_at_a_time_is_all_there_is() -> None:
    async with running() as bench:
        request = make_request("r", max_tokens=12)
        groups = [group async for group in bench.server.generate(request, interval=4)]
    assert [t for group in groups for output in group for t in output.tokens] == expected(request)
    assert len(groups) <= 4


async def test_a_reader_who_is_behind_gets_all_that_waits() -> None:
    async with running() as bench:
        request = make_request("r", [1], max_tokens=12)
        groups = []
        async with aclosing(bench.server.generate(request)) as stream:
            async for outputs in stream:
                groups.append([token for output in outputs for token in output.tokens])
                while bench.engine.has_work:
                    time.sleep(0.001)  # noqa: ASYNC251  # holds up the event loop
        assert len(groups) <= 3
        assert list(chain.from_iterable(groups)) == expected(request)


@pytest.mark.parametrize("cancel", [False, True])
async def test_closing_or_cancelling_aborts_before_the_next_step(cancel: bool) -> None:
    async with running() as bench:
        gate = Gate(bench.runner)

        async def first_output() -> None:
            async with aclosing(bench.server.generate(make_request("r", max_tokens=50))) as stream:
                async for _ in stream:
                    if not cancel:
                        break

        task = asyncio.create_task(first_output())
        await gate.reached()
        if cancel:
            task.cancel()
        gate.open()
        await asyncio.wait([task])
        await bench.server.unload("sha256:none")  # the inbox has been read up to here
        steps = len(bench.runner.batches)
        assert not bench.engine.has_work
        await bench.collect(make_request("next", max_tokens=1))
        assert len(bench.runner.batches) == steps + 1


async def test_an_id_may_be_used_again_while_its_last_owner_is_aborted() -> None:
    async with running() as bench:
        gate = Gate(bench.runner)
        old = asyncio.create_task(bench.collect(make_request("same", [1], max_tokens=50)))
        await gate.reached()
        old.cancel()
        await asyncio.wait([old])
        request = make_request("same", [2], max_tokens=5)
        new = asyncio.create_task(bench.collect(request))
        await asyncio.sleep(0)
        gate.open()
        assert await new == expected(request)


async def test_errors_of_a_request_are_raised_from_its_stream() -> None:
    async with running() as bench:
        bench.runner.failing["sha256:bad"] = OSError("disk")
        for request, error in [
            (make_request(prompt=[]), RequestInvalid),
            (make_request(adapter=make_adapter(nbytes=UNIT * 9)), AdapterTooLarge),
            (make_request(adapter="bad"), AdapterLoadFailed),
            (make_request(deadline=time.monotonic() - 1), DeadlineExpired),
        ]:
            with pytest.raises(error):
                await bench.collect(request)
        assert await bench.collect(make_request()) == expected(make_request())


async def test_an_id_in_use_is_refused_and_its_owner_goes_on() -> None:
    async with running() as bench:
        gate = Gate(bench.runner)
        owner = asyncio.create_task(bench.collect(make_request("same")))
        await gate.reached()
        second, gone = (asyncio.create_task(bench.collect(make_request("same"))) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        gate.open()
        with pytest.raises(RequestInvalid, match="in use"):
            await second
        assert await owner == expected(make_request("same"))


async def test_a_full_queue_pushes_back_with_a_delay() -> None:
    async with running(max_running=1, max_waiting=2) as bench:
        gate = Gate(bench.runner)
        tasks = [asyncio.create_task(bench.collect(make_request("r0")))]
        await gate.reached()
        tasks += [asyncio.create_task(bench.collect(make_request(f"r{n}"))) for n in range(1, 6)]
        await asyncio.sleep(0)
        gate.open()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, QueueFull)]
        assert len(refused) == 3
        assert all(0.5 <= error.retry_after <= 30 for error in refused)


async def test_a_completed_load_wakes_the_thread() -> None:
    executor = ManualExecutor()
    async with running(executor=executor) as bench:
        request = make_request(adapter="a")
        task = asyncio.create_task(bench.collect(request))
        assert await asyncio.to_thread(executor.submitted.wait, 10)
        start = time.monotonic()
        executor.run_all()
        assert await task == expected(request)
        assert time.monotonic() - start < HEARTBEAT_SECONDS / 2


async def test_a_deadline_ends_a_request_whose_adapter_never_comes() -> None:
    async with running(executor=ManualExecutor()) as bench:
        start = time.monotonic()
        with pytest.raises(DeadlineExpired):
            await bench.collect(make_request(adapter="a", deadline=start + 0.05))
        assert time.monotonic() - start < HEARTBEAT_SECONDS / 2


async def test_the_heart_beats_when_idle_without_spinning() -> None:
    async with running() as bench:
        steps = 0
        step = bench.engine.step

        def counted() -> Any:
            nonlocal steps
            steps += 1
            return step()

        bench.engine.step = counted  # type: ignore[method-assign]
        await asyncio.sleep(1.2 * HEARTBEAT_SECONDS)
        assert 1 <= steps <= 4
        assert bench.server.heartbeat_age < 1.2 * HEARTBEAT_SECONDS


async def test_unload_tells_whether_the_adapter_was_there() -> None:
    async with running() as bench:
        assert not await bench.server.unload("sha256:a")
        await bench.collect(make_request(adapter="a"))
        assert await bench.server.unload("sha256:a")
        assert bench.server.stats().resident == frozenset()


async def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    bench = Bench()
    with pytest.raises(ServerUnavailable):
        await bench.collect(make_request())
    await bench.server.start()
    gate = Gate(bench.runner)
    request = make_request(max_tokens=20)
    task = asyncio.create_task(bench.collect(request))
    await gate.reached()
    stop = asyncio.create_task(bench.server.stop(grace=10))
    await asyncio.sleep(0)
    with pytest.raises(ServerUnavailable):
        await bench.collect(make_request("late"))
    gate.open()
    assert await task == expected(request)
    await stop
    assert bench.idle()
    assert not bench.server.healthy


async def test_stop_ends_what_outlasts_the_grace() -> None:
    bench = Bench(executor=ManualExecutor())
    await bench.server.start()
    task = asyncio.create_task(bench.collect(make_request(adapter="never")))
    await asyncio.sleep(0)
    await bench.server.stop(grace=0.01)
    with pytest.raises(ServerUnavailable):
        await task
    assert bench.idle()
    with pytest.raises(ServerUnavailable):
        await bench.server.unload("sha256:never")
    await bench.server.stop()


async def test_stop_before_start_does_nothing() -> None:
    await Bench().server.stop()


async def test_when_the_thread_dies_all_streams_fail() -> None:
    bench = Bench()
    await bench.server.start()
    gate = Gate(bench.runner)
    tasks = [asyncio.create_task(bench.collect(make_request("r0")))]
    await gate.reached()
    tasks += [asyncio.create_task(bench.collect(make_request(f"r{n}"))) for n in range(1, 4)]
    call = asyncio.create_task(bench.server.unload("sha256:a"))
    await asyncio.sleep(0)

    def broken() -> Any:
        raise ZeroDivisionError("a bug")

    bench.engine.add = broken  # type: ignore[assignment, method-assign]
    gate.open()
    for task in tasks:
        with pytest.raises(EngineFailed) as failure:
            await task
        assert failure.value.__cause__ is not None
    with pytest.raises(ServerUnavailable):
        await call
    assert not bench.server.healthy
    with pytest.raises(EngineFailed):
        await bench.collect(make_request("late"))
    await bench.server.stop()


async def test_random_cancels_under_load_leave_nothing_behind() -> None:
    async with running(max_running=4, num_blocks=17) as bench:
        requests = [
            make_request(f"r{n}", range(n, n + 1 + n % 9), "abcde"[n % 5], max_tokens=1 + n % 15)
            for n in range(80)
        ]
        tasks = [asyncio.create_task(bench.collect(request)) for request in requests]
        for number in range(0, 80, 3):
            await asyncio.sleep(0.001 * (number % 4))
            tasks[number].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for request, answer in zip(requests, answers, strict=True):
            assert answer == expected(request) or isinstance(answer, asyncio.CancelledError)

"""Loads and pins of adapters beside the engine thread, on real threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from adaplex.adapters.program.program import AdapterProgram
from adaplex.engine.async_engine import AsyncEngine
from adaplex.engine.engine import Engine
from adaplex.engine.errors import PinsFull, ServerUnavailable
from engine.fakes import UNIT, collect_tokens, digest, make_config, make_request
from fake_runner import FakeRunner, FakeSource, expected


class GatedRunner(FakeRunner):
    """Fetches of adapters whose name begins with "cold" hang until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.hanging = threading.Semaphore(0)
        self.arrived = threading.Event()

    def pack_adapter(self, program: AdapterProgram) -> None:
        if program.digest.startswith("sha256:cold"):
            self.hanging.release()
            assert self.gate.wait(10)
        super().pack_adapter(program)

    def _load(self, digest: str, offset: int, nbytes: int) -> None:
        super()._load(digest, offset, nbytes)
        self.arrived.set()

    async def hang(self, count: int) -> None:
        """Waits until `count` more fetches hang."""
        for _ in range(count):
            assert await asyncio.to_thread(self.hanging.acquire, timeout=10)


async def test_steps_and_copies_go_on_while_every_fetch_hangs() -> None:
    runner = GatedRunner()
    config = make_config(arena_bytes=2 * UNIT, host_bytes=16 * UNIT)
    server = AsyncEngine(Engine(config, runner, FakeSource(), base_digest="base"))
    await server.start()
    try:
        for name in "abc":  # the arena has room for two
            await collect_tokens(server, make_request(name, adapter=name))
        loads = len(runner.loads)
        cold = [make_request(f"c{i}", adapter=f"cold{i}") for i in range(4)]
        tasks = [asyncio.create_task(collect_tokens(server, request)) for request in cold]
        await runner.hang(2)
        base = make_request("base", max_tokens=20)
        assert await collect_tokens(server, base) == expected(base)
        warm = make_request("warm", adapter="a")
        assert await collect_tokens(server, warm) == expected(warm)
        assert runner.loads[loads:] == [digest("a")], "copied past the fetches that hang"
        assert not any(task.done() for task in tasks)
        runner.gate.set()
        assert await asyncio.gather(*tasks) == [expected(request) for request in cold]
    finally:
        runner.gate.set()
        await server.stop()


async def test_pins_cross_to_the_engine_thread_and_their_errors_come_back() -> None:
    runner = GatedRunner()
    config = make_config(arena_bytes=4 * UNIT, host_bytes=4 * UNIT)
    server = AsyncEngine(Engine(config, runner, FakeSource(), base_digest="base"))
    await server.start()
    try:
        await server.pin(digest("p"), 2 * UNIT, "p")
        assert await asyncio.to_thread(runner.arrived.wait, 10), "nobody asked for it"
        with pytest.raises(PinsFull):
            await server.pin(digest("q"), UNIT, "q")
        assert server.stats().pinned == {digest("p")}
        await server.unpin(digest("p"))
        await server.pin(digest("q"), UNIT, "q")
        assert server.stats().pinned == {digest("q")}
    finally:
        await server.stop()
    with pytest.raises(ServerUnavailable):
        await server.pin(digest("r"), UNIT, "r")

from __future__ import annotations

import asyncio
import threading

import pytest

from adaplex.server.threads import in_thread, owned


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(5)
        ended.set()

    task = asyncio.ensure_future(in_thread(work))
    await asyncio.to_thread(begun.wait, 5)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_what_opens_for_a_cancelled_caller_is_closed() -> None:
    begun, may_end = threading.Event(), threading.Event()
    closed: list[str] = []

    def open_() -> str:
        begun.set()
        may_end.wait(5)
        return "thing"

    async def use() -> None:
        async with owned(open_, closed.append):
            raise AssertionError("never opened")

    task = asyncio.ensure_future(use())
    await asyncio.to_thread(begun.wait, 5)
    task.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == ["thing"]


async def test_what_fails_to_open_is_not_closed() -> None:
    closed: list[str] = []

    def open_() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        async with owned(open_, closed.append):
            pass
    assert not closed


async def test_what_was_used_is_closed_also_after_an_error() -> None:
    closed: list[str] = []
    with pytest.raises(KeyError):
        async with owned(lambda: "thing", closed.append) as thing:
            raise KeyError(thing)
    assert closed == ["thing"]

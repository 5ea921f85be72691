"""Blocking work in threads. A thread cannot be cancelled, so a cancelled caller waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns the result of a function run in a thread of the shared pool.

    A cancelled caller waits until the function has ended.
    """
    return await _run(None, partial(function, *args, **kwargs))


async def _run(threads: Executor | None, function: Callable[[], T]) -> T:
    """Like in_thread, with a pool; None is the event loop's shared pool."""
    task = _start(threads, function)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _wait(task)
        raise


@asynccontextmanager
async def owned(
    open_: Callable[[], T], close: Callable[[T], None], threads: Executor | None = None
) -> AsyncIterator[T]:
    """Opens a resource in a thread and closes it in a thread at the end of the block.

    A resource whose caller is cancelled while it opens is closed too. `threads` None is the event
    loop's shared pool.
    """
    opening = _start(threads, open_)
    try:
        resource = await asyncio.shield(opening)
    except asyncio.CancelledError:
        await _wait(opening)
        if opening.exception() is None:
            await _run(threads, partial(close, opening.result()))
        raise
    try:
        yield resource
    finally:
        await _run(threads, partial(close, resource))


def _start(threads: Executor | None, function: Callable[[], T]) -> asyncio.Future[T]:
    """Starts a function in a thread, with the caller's context variables."""
    run: Callable[[], T] = partial(copy_context().run, function)
    return asyncio.get_running_loop().run_in_executor(threads, run)


async def _wait(task: asyncio.Future[T]) -> None:
    """Waits until a task is done, ignoring cancellations."""
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])

"""Blocking work off the event loop. A thread cannot be cancelled, so nobody leaves one behind."""

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
    """Runs a function in a thread. When cancelled, waits for the function to end first."""
    return await _finished(None, partial(function, *args, **kwargs))


async def _finished(threads: Executor | None, function: Callable[[], T]) -> T:
    """See in_thread; None is the pool that everybody shares."""
    task = _begun(threads, function)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _ended(task)
        raise


@asynccontextmanager
async def owned(
    open_: Callable[[], T], close: Callable[[T], None], threads: Executor | None = None
) -> AsyncIterator[T]:
    """A resource opened and closed in threads; closed also when cancelled while it opens.

    Without `threads` of its own, it waits behind everybody else.
    """
    opening = _begun(threads, open_)
    try:
        resource = await asyncio.shield(opening)
    except asyncio.CancelledError:
        await _ended(opening)
        if opening.exception() is None:
            await _finished(threads, partial(close, opening.result()))
        raise
    try:
        yield resource
    finally:
        await _finished(threads, partial(close, resource))


def _begun(threads: Executor | None, function: Callable[[], T]) -> asyncio.Future[T]:
    """Starts a function in a thread, in the caller's context."""
    run: Callable[[], T] = partial(copy_context().run, function)
    return asyncio.get_running_loop().run_in_executor(threads, run)


async def _ended(task: asyncio.Future[T]) -> None:
    """Waits for a task, however often the waiting is cancelled."""
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])

"""Blocking work off the event loop. A thread cannot be cancelled, so nobody leaves one behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a function in a thread. When cancelled, waits for the function to end first."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _ended(task)
        raise


@asynccontextmanager
async def owned(open_: Callable[[], T], close: Callable[[T], None]) -> AsyncIterator[T]:
    """A resource opened and closed in threads; closed also when cancelled while it opens."""
    opening = asyncio.ensure_future(asyncio.to_thread(open_))
    try:
        resource = await asyncio.shield(opening)
    except asyncio.CancelledError:
        await _ended(opening)
        if opening.exception() is None:
            await in_thread(close, opening.result())
        raise
    try:
        yield resource
    finally:
        await in_thread(close, resource)


async def _ended(task: asyncio.Future[T]) -> None:
    """Waits for a task, however often the waiting is cancelled."""
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])

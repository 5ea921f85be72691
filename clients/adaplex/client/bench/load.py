"""Load: runs asks against a server, closed or open loop, and keeps when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from adaplex.client.aio import AsyncClient
from adaplex.client.bench.workload import Ask
from adaplex.client.errors import AdaplexClientError
from adaplex.client.generation_types import Delta


@dataclass(frozen=True)
class Answer:
    """What became of an ask. Times are `time.perf_counter()` seconds."""

    ask: Ask
    sent: float
    arrivals: tuple[tuple[float, int], ...]
    """When tokens came, and how many at once."""
    ended: float
    error: str = ""
    """Why it was not answered to its end."""

    @property
    def tokens(self) -> int:
        """How many came."""
        return sum(count for _, count in self.arrivals)

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token, if one came."""
        return self.arrivals[0][0] - self.sent if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals, as who reads the stream waits for them."""
        times = [time for time, _ in self.arrivals]
        return [after - before for before, after in pairwise(times)]

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first arrival; None when nothing came after it."""
        later = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None


Target = Callable[[Ask], Awaitable[Answer]]
"""Answers one ask, whatever becomes of it: `adaplex_target`, or the API of another server."""


def adaplex_target(client: AsyncClient) -> Target:
    """Asks an adaplex server, greedily, to the asked length whatever the model says."""

    async def answer(ask: Ask) -> Answer:
        arrivals: list[tuple[float, int]] = []
        error, sent = "", time.perf_counter()
        try:
            async with client.stream(
                ask.prompt,
                adapter=ask.adapter,
                max_tokens=ask.output,
                temperature=0.0,
                ignore_eos=True,
            ) as events:
                async for event in events:
                    if isinstance(event, Delta) and event.token_ids:
                        # What came before an error counts, so no comprehension.
                        arrivals.append((time.perf_counter(), len(event.token_ids)))  # noqa: PERF401
        except AdaplexClientError as failure:
            error = failure.reason or type(failure).__name__
        return Answer(ask, sent, tuple(arrivals), time.perf_counter(), error)

    return answer


def unheard(_answer: Answer) -> None:
    """The default of `Load`: nobody watches."""


class Load:
    """The answers of one measurement, in the order of their ends."""

    def __init__(self, target: Target, on_answer: Callable[[Answer], None] = unheard) -> None:
        self.answers: list[Answer] = []
        self._target, self._on_answer = target, on_answer

    async def closed(self, streams: Iterable[Iterable[Ask]]) -> None:
        """Each stream asks one after the other, the next when the last has ended."""
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(self._stream(stream))

    async def open(self, asks: Iterable[Ask]) -> None:
        """Each ask goes out at its time, whatever becomes of those before it."""
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for ask in asks:
                await asyncio.sleep(begun + ask.at - time.perf_counter())
                group.create_task(self._ask(ask))

    async def _stream(self, asks: Iterable[Ask]) -> None:
        for ask in asks:
            await self._ask(ask)

    async def _ask(self, ask: Ask) -> None:
        answer = await self._target(ask)
        self.answers.append(answer)
        self._on_answer(answer)


def lasting(asks: Iterable[Ask], seconds: float) -> Iterable[Ask]:
    """Asks until this many seconds have passed since the first."""
    end = time.perf_counter() + seconds
    for ask in asks:
        if time.perf_counter() > end:
            return
        yield ask

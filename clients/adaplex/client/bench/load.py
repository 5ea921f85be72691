"""LoadGenerator: sends requests in closed or open loops and records when each token arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from adaplex.client.aio import AsyncClient
from adaplex.client.bench.workload import BenchRequest
from adaplex.client.errors import AdaplexClientError
from adaplex.client.generation_types import Delta


@dataclass(frozen=True)
class RequestResult:
    """The outcome of a request. Times are `time.perf_counter()` seconds."""

    request: BenchRequest
    sent: float
    arrivals: tuple[tuple[float, int], ...]
    """When tokens arrived, and how many at once."""
    ended: float
    error: str = ""
    """Why the request did not finish; empty if it did."""

    @property
    def tokens(self) -> int:
        """Number of tokens that arrived."""
        return sum(count for _, count in self.arrivals)

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token; None if none arrived."""
        return self.arrivals[0][0] - self.sent if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals."""
        times = [time for time, _ in self.arrivals]
        return [after - before for before, after in pairwise(times)]

    @property
    def per_token(self) -> float | None:
        """Mean seconds a token after the first arrival; None if none arrived after it."""
        later = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None


SendRequest = Callable[[BenchRequest], Awaitable[RequestResult]]
"""Sends a request to a server and reads its answer; errors are part of the result."""


def adaplex_sender(client: AsyncClient) -> SendRequest:
    """Returns the SendRequest of an adaplex server: greedy, and of the full length asked for."""

    async def send(request: BenchRequest) -> RequestResult:
        arrivals: list[tuple[float, int]] = []
        error, sent = "", time.perf_counter()
        try:
            async with client.stream(
                request.prompt,
                adapter=request.adapter,
                max_tokens=request.output,
                temperature=0.0,
                ignore_eos=True,
            ) as events:
                async for event in events:
                    if isinstance(event, Delta) and event.token_ids:
                        # Not a comprehension: tokens that arrive before an error count.
                        arrivals.append((time.perf_counter(), len(event.token_ids)))  # noqa: PERF401
        except AdaplexClientError as failure:
            error = failure.reason or type(failure).__name__
        return RequestResult(request, sent, tuple(arrivals), time.perf_counter(), error)

    return send


def ignore_result(_result: RequestResult) -> None:
    """Does nothing with a result."""


class LoadGenerator:
    """Sends the requests of one measurement; `results` are in the order of their ends."""

    def __init__(
        self, send: SendRequest, on_result: Callable[[RequestResult], None] = ignore_result
    ) -> None:
        self.results: list[RequestResult] = []
        self._send, self._on_result = send, on_result

    async def run_closed(self, streams: Iterable[Iterable[BenchRequest]]) -> None:
        """Runs a closed loop: each stream sends a request when its last one has ended."""
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(self._run_stream(stream))

    async def run_open(self, requests: Iterable[BenchRequest]) -> None:
        """Runs an open loop: sends each request at its time `at`, finished or not those before."""
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for request in requests:
                await asyncio.sleep(started + request.at - time.perf_counter())
                group.create_task(self._run(request))

    async def _run_stream(self, requests: Iterable[BenchRequest]) -> None:
        for request in requests:
            await self._run(request)

    async def _run(self, request: BenchRequest) -> None:
        result = await self._send(request)
        self.results.append(result)
        self._on_result(result)


def for_seconds(requests: Iterable[BenchRequest], seconds: float) -> Iterable[BenchRequest]:
    """Yields requests until `seconds` have passed since the first."""
    end = time.perf_counter() + seconds
    for request in requests:
        if time.perf_counter() > end:
            return
        yield request

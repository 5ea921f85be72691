"""adaplex: this project's server, through streams of the asyncio client.

It runs with its defaults, except for the given settings of `adaplex serve`.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Self

from adaplex.client import AdaplexClientError, AsyncClient, Delta, Finished
from adaplex.client.local import LocalServer

from .system import Inputs, PeerError, ReportProgress, StreamResult

TIMEOUT = 600.0


class Adaplex:
    """`adaplex serve` with a temporary store."""

    name = "adaplex"

    def __init__(self, settings: Mapping[str, str], inputs: Inputs) -> None:
        self._settings, self._inputs = settings, inputs

    def prepare(self, progress: ReportProgress) -> None:
        """Does nothing: adaplex is installed in this environment."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as started:
            store = started.enter_context(tempfile.TemporaryDirectory())
            log = started.enter_context((self._inputs.logs / f"{self.name}.log").open("w"))
            settings = {"model": self._inputs.model, "store_dir": store, **self._settings}
            server = LocalServer(on_log=lambda record: print(dict(record), file=log), **settings)
            started.callback(_end, server)
            try:
                await asyncio.to_thread(server.wait_ready)
                self._client = await started.enter_async_context(AsyncClient(server.target))
                for i, directory in enumerate(self._inputs.adapters):
                    await self._client.adapters.upload(f"a{i}", directory)
            except AdaplexClientError as error:
                raise PeerError(f"adaplex does not start: {error}") from error
            self._started = started.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._started.aclose()

    async def generate(
        self, prompt: Sequence[int], adapter: int | None, tokens: int
    ) -> StreamResult:
        """Makes one GenerateStream call."""
        name = None if adapter is None else f"a{adapter}"
        started, first, text, count = time.perf_counter(), 0.0, "", 0
        try:
            async with self._client.stream(
                list(prompt),
                adapter=name,
                max_tokens=tokens,
                temperature=0,
                ignore_eos=True,
                timeout=TIMEOUT,
            ) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        first = first or time.perf_counter() - started
                        text += event.text
                    elif isinstance(event, Finished):
                        count = event.usage.completion_tokens
        except AdaplexClientError as error:
            raise PeerError(f"adaplex: {error}") from error
        return StreamResult(text, count, first, time.perf_counter() - started)


def _end(server: LocalServer) -> None:
    """Drains the server; kills it if that takes too long."""
    try:
        server.stop()
    except subprocess.TimeoutExpired:
        server.kill()

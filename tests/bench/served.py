"""A server process for a benchmark, with adapters on it."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from adaplex.client import AsyncClient
from adaplex.client.bench.progress import ProgressReporter
from adaplex.client.bench.session import BenchConfig, Session, open_session
from adaplex.client.local import LocalServer


@asynccontextmanager
async def served(
    options: argparse.Namespace,
    *,
    arena: int,
    adapters: int,
    bandwidth: float | None = None,
    **settings: Any,
) -> AsyncIterator[Session]:
    """Opens a session on a new server with an arena of `arena` bytes and `adapters` adapters.

    `options` has model, quantization and rank; `settings` are others of `adaplex serve`;
    `bandwidth` is as in BenchConfig.
    """
    progress = ProgressReporter()
    with (
        tempfile.TemporaryDirectory() as store,
        LocalServer(
            model=options.model,
            quantization=options.quantization,
            store_dir=store,
            arena_bytes=arena,
            log_level="warning",
            on_log=lambda record: progress.print_line(f"server: {record['event']}"),
            **settings,
        ) as server,
    ):
        await asyncio.to_thread(server.wait_ready)
        config = BenchConfig(
            target=server.target,
            make_adapters=adapters,
            ranks=(options.rank,),
            keep_adapters=True,
            metrics=f"http://127.0.0.1:{server.http_port}/metrics",
            pid=server.process.pid,
            bandwidth=bandwidth,
        )
        async with (
            AsyncClient(server.target) as client,
            open_session(client, config, progress) as session,
        ):
            yield session

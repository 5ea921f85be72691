"""The process of a server: what it asks of the system, and the signals that end it."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import sys

import structlog

from adaplex.server.app import serve
from adaplex.server.components import Components

log = structlog.get_logger("adaplex.app")

SWITCH_SECONDS = 0.0005
"""How long one thread may keep the interpreter from another. Python's 5 ms is a whole step, which
the engine would wait for the event loop."""


async def run(parts: Components) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal cuts the drain short."""
    _raise_file_limit()
    gc.collect()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # a full collection over the model and its libraries stops everybody for 0.3 s
    stop, hard = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        if not stop.is_set():
            stop.set()
            return
        hard.set()
        for number in signals:  # a third one kills
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    config = parts.config
    async with serve(parts) as server:
        log.info(
            "serving",
            model=parts.model.name,
            grpc=f"{config.host}:{server.port}",
            http=f"{config.http_host}:{server.http_port}",
        )
        await stop.wait()
        await server.drain(hard)
    log.info("stopped")


def _raise_file_limit() -> None:
    """As many open files as the system lets us have: one a connection, one an adapter in use."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""The server process: interpreter and system settings, and the signals that end it."""

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
"""Interval at which threads exchange the interpreter lock. With Python's 5 ms, the engine would
wait for the event loop as long as a whole step takes.
"""


async def run(components: Components) -> None:
    """Serves until SIGTERM or SIGINT, then drains. A second signal ends the drain."""
    _raise_file_limit()
    gc.collect()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # a full collection over the model and its libraries takes 0.3 s
    stop, hard = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        if not stop.is_set():
            stop.set()
            return
        hard.set()
        for number in signals:  # a third signal kills
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    config = components.config
    async with serve(components) as server:
        log.info(
            "serving",
            model=components.model.name,
            grpc=f"{config.host}:{server.port}",
            http=f"{config.http_host}:{server.http_port}",
        )
        await stop.wait()
        await server.drain(hard)
    log.info("stopped")


def _raise_file_limit() -> None:
    """Raises the limit of open files as far as allowed: a connection or used adapter has one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

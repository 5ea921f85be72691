"""Progress of the start: a live line on a terminal, log lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console

log = structlog.get_logger("adaplex.start")


@contextmanager
def report_progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that reports the name of each step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: log.info(step)
        return
    with console.status("starting") as status:

        def show(step: str) -> None:
            status.update(step)
            console.log(step, highlight=False)

        yield show

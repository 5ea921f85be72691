"""Progress of the start: a live line on a terminal, log lines elsewhere, and the time of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console

log = structlog.get_logger("adaplex.start")

SHOWN_SECONDS = 0.05
"""Phases that took less are left out of the summary."""


class PhaseTimes:
    """Seconds of each phase of the start. A phase lasts from its line to the next line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._phases: list[tuple[str, float]] = []
        """Line and time of its beginning."""

    def begin(self, line: str) -> None:
        """Begins the phase of a line."""
        self._phases.append((line, self._clock()))

    def summary(self) -> str:
        """Returns one line with the seconds of all phases until now, each named by the first
        clause of its line.
        """
        now = self._clock()
        ends = [begun for _, begun in self._phases[1:]] + [now]
        seconds = [end - begun for (_, begun), end in zip(self._phases, ends, strict=True)]
        shown = [
            f"{line.partition(':')[0].partition(',')[0]} {spent:.1f}"
            for (line, _), spent in zip(self._phases, seconds, strict=True)
            if spent >= SHOWN_SECONDS
        ]
        return f"loaded in {now - self._begun:.1f} s: {', '.join(shown)}"


@contextmanager
def report_progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that reports the name of each phase; after the block, one line has their
    seconds, unless it raised.
    """
    times = PhaseTimes()
    console = Console(stderr=True)
    if not console.is_terminal:

        def write(line: str) -> None:
            times.begin(line)
            log.info(line)

        yield write
        log.info(times.summary())
        return
    with console.status("starting") as status:

        def show(line: str) -> None:
            times.begin(line)
            status.update(line)
            console.log(line, highlight=False)

        yield show
    console.log(times.summary(), highlight=False)

"""ProgressReporter: progress on standard error, as a bar on a terminal and as lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

LINE_SECONDS = 10.0
"""Interval of lines if standard error is not a terminal."""


class ProgressReporter:
    """Reports the progress of runs."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Yields a function to be called for each finished item, of `total` if known."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Bars(*columns, TimeElapsedColumn(), console=self._console, transient=True) as bars:
                bar = bars.add_task(what, total=total)
                yield lambda: bars.advance(bar)
        else:
            self.print_line(what)
            yield self._lines(what, total)

    def print_line(self, line: str) -> None:
        """Prints a line."""
        self._console.print(line, markup=False, soft_wrap=True)

    def _lines(self, what: str, total: int | None) -> Callable[[], None]:
        done, last = 0, time.monotonic()

        def advance() -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                self.print_line(f"{what}: {done}" + (f" of {total}" if total else ""))

        return advance

"""Progress: a bar on a terminal, a line now and then elsewhere; on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

LINE_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Progress:
    """Says how far a run has come."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Gives a function to call for each thing done; `total` of them, where that is known."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Bars(*columns, TimeElapsedColumn(), console=self._console, transient=True) as bars:
                bar = bars.add_task(what, total=total)
                yield lambda: bars.advance(bar)
        else:
            self.say(what)
            yield self._lines(what, total)

    def say(self, line: str) -> None:
        """Prints a line."""
        self._console.print(line, markup=False, soft_wrap=True)

    def _lines(self, what: str, total: int | None) -> Callable[[], None]:
        done, last = 0, time.monotonic()

        def advance() -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                self.say(f"{what}: {done}" + (f" of {total}" if total else ""))

        return advance

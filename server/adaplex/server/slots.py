"""Slots: a bound on how many of one kind of work run at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Slots:
    """A bounded number of slots. Belongs to one event loop."""

    def __init__(self, limit: int, full: Callable[[], Exception]) -> None:
        """`full` makes the error that is raised when every slot is occupied."""
        self._limit, self._full = limit, full
        self.occupied = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Occupies a slot for the block. Never waits: raises if every slot is occupied."""
        if self.occupied >= self._limit:
            raise self._full()
        self.occupied += 1
        try:
            yield
        finally:
            self.occupied -= 1

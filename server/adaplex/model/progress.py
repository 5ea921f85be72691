"""Progress: where a slow start reports what it does, one line at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[str], None]
"""Called with one line for each step of a start, and with one for each fallback."""


def silent(_line: str) -> None:
    """Discards the line."""


def print_progress(line: str) -> None:
    """Writes the line to stderr."""
    print(line, file=sys.stderr, flush=True)

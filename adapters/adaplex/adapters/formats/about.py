"""FormatRow: what users are told of a family. `adaplex adapters formats` and the README show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatRow:
    """One line of the table of families."""

    title: str
    """The method, as its authors call it, and its variants that are served."""
    served: str
    """The primitives it becomes."""
    refused: str = ""
    """What of it is refused."""

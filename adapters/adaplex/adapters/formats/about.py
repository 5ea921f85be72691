"""FormatRow: what users are told of a family. `adaplex adapters formats` and the README show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatRow:
    """One line of the table of families."""

    title: str
    """The methods, as their authors call them."""
    primitives: tuple[str, ...]
    """What it is served as: names that ModuleProgram.primitives gives."""
    refused: str = ""
    """What of it is refused."""
    extra: str = ""
    """What must be installed for it."""
    checkpoint: str = ""
    """Where it is not a PEFT directory: what it is."""

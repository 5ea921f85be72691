"""System: a server under measurement, whoever wrote it, and what it is asked with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

Progress = Callable[[str], None]


class PeerError(Exception):
    """A system cannot be installed, started or measured. The message says which step and why."""


@dataclass(frozen=True)
class Inputs:
    """The same for every system of a run."""

    model: Path
    """A Hugging Face directory in bf16."""
    adapters: tuple[Path, ...]
    """PEFT directories; adapter i of a cell is the i-th."""
    rank: int
    """Of every adapter."""
    threads: int
    """Compute threads of each system."""
    slots: int
    """Streams at once, at most."""
    context: int
    """Tokens of the longest stream, prompt and output together."""
    logs: Path
    """Folder for what the servers print."""


@dataclass(frozen=True)
class Answer:
    """One finished stream. Times in seconds since it was asked."""

    output: str
    """What was generated, in the system's own form: only compared with itself."""
    tokens: int
    first: float
    """The first token; that of the whole answer where a system does not stream."""
    total: float


class System(Protocol):
    """Between `async with` and its end a server runs, all adapters registered, and only then."""

    name: str

    def prepare(self, progress: Progress) -> None:
        """Installs what is not there yet and writes files in the system's formats. PeerError."""

    async def generate(self, prompt: Sequence[int], adapter: int | None, tokens: int) -> Answer:
        """Greedy, exactly `tokens` tokens, through the system's network API. PeerError."""

    async def __aenter__(self) -> Self:
        """Starts the server; PeerError when it does not come up."""

    async def __aexit__(self, *_: object) -> None:
        """Stops it, whatever happened."""

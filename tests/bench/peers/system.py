"""System: the protocol of a server under measurement, with its inputs and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

ReportProgress = Callable[[str], None]


class PeerError(Exception):
    """A system cannot be installed, started or measured. The message names step and reason."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, the same for every system."""

    model: Path
    """A Hugging Face directory in bf16."""
    adapters: tuple[Path, ...]
    """PEFT directories; adapter i of a cell is the i-th."""
    rank: int
    """Rank of every adapter."""
    threads: int
    """Compute threads of each system."""
    slots: int
    """Streams at once, at most."""
    context: int
    """Tokens of the longest stream, prompt and output together."""
    logs: Path
    """Folder of the servers' logs."""


@dataclass(frozen=True)
class StreamResult:
    """A finished stream. Times are in seconds from the request on."""

    output: str
    """The generated text or tokens, in the system's own form; compared within a system only."""
    tokens: int
    first: float
    """Time of the first token; of the whole answer if the system does not stream."""
    total: float


class System(Protocol):
    """A system whose server runs within `async with`, with all adapters loaded."""

    name: str

    def prepare(self, progress: ReportProgress) -> None:
        """Installs the system and converts the inputs, unless that is done. Raises PeerError."""

    async def generate(
        self, prompt: Sequence[int], adapter: int | None, tokens: int
    ) -> StreamResult:
        """Generates exactly `tokens` tokens, greedily, through the network. Raises PeerError."""

    async def __aenter__(self) -> Self:
        """Starts the server. Raises PeerError if it does not become ready."""

    async def __aexit__(self, *_: object) -> None:
        """Stops the server."""

"""Batch: the chunks that one step runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from adaplex.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The tokens [start, start + count) of one sequence; one token when it decodes."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        """Position after the last token of the chunk: the context length it attends to."""
        return self.start + self.count

    @property
    def base(self) -> int:
        """Number of its first tokens, those before the position from which the adapter applies."""
        return min(max(self.sequence.adapter_from - self.start, 0), self.count)

    @property
    def samples(self) -> bool:
        """True if the chunk reaches the last known token, so that a new one is sampled."""
        return self.end == len(self.sequence)


@dataclass(frozen=True)
class Batch:
    """Chunks of one step: decoding sequences first, then prompt chunks, each sorted by adapter."""

    chunks: tuple[Chunk, ...]

    @cached_property
    def tokens(self) -> int:
        """Rows of the step."""
        return sum(chunk.count for chunk in self.chunks)

    @cached_property
    def sampling(self) -> tuple[Chunk, ...]:
        """The chunks that sample a token, in order. First read before the tokens are appended."""
        return tuple(chunk for chunk in self.chunks if chunk.samples)

    @property
    def plain(self) -> bool:
        """True if every sampled token is the likeliest one of unchanged logits."""
        return all(chunk.sequence.request.sampling.plain for chunk in self.sampling)

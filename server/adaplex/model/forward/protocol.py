"""Forward: how a step gets its logits. By the modules of transformers, or by one call into C."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import chain
from typing import Protocol

from torch import Tensor

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterRef

Tables = Callable[[AdapterRef], int]
"""The address of what an adapter in memory does to each module, as kernels read it."""


class Forward(Protocol):
    """Runs the chunks of a batch."""

    def __call__(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """fp32 logits [len(batch.sampling), vocabulary] and the likeliest token of each row, -1 for
        a row that is not finite.
        """
        ...


def runs_of(chunks: Seq[Chunk], counts: Seq[int]) -> list[tuple[AdapterRef | None, int, int]]:
    """(adapter, first row, row after the last) of each run of rows with one adapter and mode; of
    each chunk there are the last `counts` rows.
    """
    runs: list[tuple[AdapterRef | None, int, int]] = []
    row, last = 0, None
    for adapter, rows in chain.from_iterable(map(_parts, chunks, counts)):
        key = adapter.key if adapter else ""
        begun = runs.pop()[1] if key == last else row
        row, last = row + rows, key
        runs.append((adapter, begun, row))
    return runs


def _parts(chunk: Chunk, count: int) -> list[tuple[AdapterRef | None, int]]:
    """The last `count` rows of a chunk: those before its adapter applies, and the others."""
    base = max(0, chunk.base - (chunk.count - count))
    parts = (None, base), (chunk.sequence.adapter, count - base)
    return [part for part in parts if part[1]]

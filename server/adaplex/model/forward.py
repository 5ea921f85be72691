"""Forward: how a step gets its logits. By the modules of transformers, or by one call into C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.request import AdapterRef

Tables = Callable[[AdapterRef], NDArray[np.int64]]
"""What an adapter in memory does to each module, as kernels read it."""


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
    runs, row = [], 0
    parts = (part for pair in zip(chunks, counts, strict=True) for part in _parts(*pair))
    for _, run in groupby(parts, key=lambda part: part[0].key if part[0] else ""):
        members = list(run)
        rows = sum(count for _, count in members)
        runs.append((members[0][0], row, row + rows))
        row += rows
    return runs


def _parts(chunk: Chunk, count: int) -> Iterator[tuple[AdapterRef | None, int]]:
    """The last `count` rows of a chunk: those before its adapter applies, and the others."""
    base = max(0, chunk.base - (chunk.count - count))
    if base:
        yield None, base
    if count > base:
        yield chunk.sequence.adapter, count - base

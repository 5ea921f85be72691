"""Forward: how a step computes its logits, by the modules of transformers or by one call into C."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain
from typing import NamedTuple, Protocol

from torch import Tensor

from adaplex.engine.batch import Batch, Chunk
from adaplex.engine.merge_cost_model import StepCosts
from adaplex.engine.request import AdapterRef
from adaplex.model.adapters.prefix import WriteKV
from adaplex.model.progress import Progress


class Forward(Protocol):
    """Runs the chunks of a batch, on a KV cache whose layout it decides."""

    @property
    def write_kv(self) -> WriteKV:
        """Function that writes keys and values to the cache in the forward's layout."""
        ...

    @property
    def reads_panels(self) -> bool:
        """True if adapters have to be packed in panels at every module; see Packer.whole_model."""
        ...

    @property
    def int8_head_bytes(self) -> int:
        """Bytes of the 8-bit copy of the output layer; 0 without one."""
        ...

    def __call__(self, batch: Batch, *, needs_logits: bool = True) -> tuple[Tensor, list[int]]:
        """Returns fp32 logits [len(batch.sampling), vocabulary], valid until the next step, and the
        argmax of each row, -1 for a row that is not finite. Without `needs_logits` the logits may
        be undefined.
        """
        ...

    def warm_up(self, batch: Batch, progress: Progress) -> None:
        """Compiles what later steps may launch and the steps of the base so far did not. May run
        the batch, in which no row has an adapter; later steps see nothing of it but the cache.
        """
        ...

    def step_costs(self) -> StepCosts:
        """Measures what linears and deltas cost here; see Runner."""
        ...


class RowRun(NamedTuple):
    """Neighbouring rows [start, stop) with one adapter and mode, None for the base."""

    adapter: AdapterRef | None
    start: int
    stop: int


def runs_of(chunks: Seq[Chunk], counts: Seq[int]) -> list[RowRun]:
    """Returns the runs of a step that has the last `counts` rows of each chunk."""
    runs: list[RowRun] = []
    row, last = 0, None
    for adapter, rows in chain.from_iterable(map(_parts, chunks, counts)):
        key = adapter.key if adapter else ""
        begun = runs.pop().start if key == last else row
        row, last = row + rows, key
        runs.append(RowRun(adapter, begun, row))
    return runs


def _parts(chunk: Chunk, count: int) -> list[tuple[AdapterRef | None, int]]:
    """Returns (adapter, rows) of the last `count` rows of a chunk: those before its adapter
    applies, and the others.
    """
    base = max(0, chunk.base - (chunk.count - count))
    parts = (None, base), (chunk.sequence.adapter, count - base)
    return [part for part in parts if part[1]]

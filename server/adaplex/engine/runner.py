"""Runner: the model as the engine uses it. `adaplex.model` implements it; tests fake it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

from adaplex.engine.batch import Batch
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import SampledToken

if TYPE_CHECKING:  # it imports torch, which the engine does not
    from adaplex.adapters.program.program import AdapterProgram


class Runner(Protocol):
    """Runs batches on tensors. `run` and the `remove_` methods are called on the engine thread; the
    other methods on the threads of LoadJobs, for several digests at once, but for one digest and
    kind of memory only once at a time.
    """

    def run(self, batch: Batch) -> Seq[SampledToken]:
        """Runs one step; returns one token for each chunk of `batch.sampling`, in order."""
        ...

    def step_costs(self) -> StepCosts:
        """Measures the seconds of linears and deltas. Called once, before the first step."""
        ...

    def pack_adapter(self, program: AdapterProgram) -> None:
        """Packs the adapter into host memory. After an error host memory has nothing of it."""
        ...

    def remove_host(self, digest: str) -> None:
        """Drops the host copy of an adapter; never called while `copy_adapter` may read it."""
        ...

    def copy_adapter(self, digest: str, offset: int, nbytes: int) -> None:
        """Copies the host copy of an adapter into arena bytes [offset, offset + nbytes).

        After an error the extent is free to reuse.
        """
        ...

    def load_adapter(self, program: AdapterProgram, offset: int, nbytes: int) -> None:
        """Packs the adapter into arena bytes [offset, offset + nbytes), without a host copy.

        After an error the extent is free to reuse.
        """
        ...

    def remove_adapter(self, digest: str) -> None:
        """Drops a resident adapter; its extent is about to be reused."""
        ...

    def build_merged(self, program: AdapterProgram) -> int:
        """Builds the merged weights of an adapter and returns their bytes, at most those that
        `measure_merge` returned. After an error no memory has anything of them.
        """
        ...

    def measure_merge(self, program: AdapterProgram) -> FoldedShare:
        """Returns what merging would make of the adapter."""
        ...

    def remove_merged(self, digest: str) -> None:
        """Drops the merged weights of an adapter."""
        ...

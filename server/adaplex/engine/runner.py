"""Runner: what the engine needs of a model. `adaplex.model` implements it; tests fake it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from adaplex.engine.batch import Batch
from adaplex.engine.merge_cost_model import FoldedShare, StepCosts
from adaplex.engine.request import SampledToken


class Runner(Protocol):
    """Runs batches on tensors. `run` and the `remove_` methods are called on the engine thread; the
    others on loader threads, for several digests at once, but for one digest and kind of memory
    only once at a time.
    """

    def run(self, batch: Batch) -> Seq[SampledToken]:
        """Runs one step; one token for each of `batch.sampling`, in order."""
        ...

    def step_costs(self) -> StepCosts:
        """Measures what linears and deltas take here. Called once, before the first step."""
        ...

    def fetch_adapter(self, digest: str) -> None:
        """Reads the adapter and keeps it packed in host memory.

        Raises an AdaplexError when it cannot; nothing of it is kept then.
        """
        ...

    def remove_host(self, digest: str) -> None:
        """Forgets the host copy of an adapter; never while `load_adapter` may read it."""
        ...

    def load_adapter(self, digest: str, offset: int, nbytes: int) -> None:
        """Packs the adapter into arena bytes [offset, offset + nbytes), from its host copy if there
        is one, else from where it is stored.

        Raises an AdaplexError when it cannot; the extent is then free to reuse.
        """
        ...

    def remove_adapter(self, digest: str) -> None:
        """Forgets a resident adapter; its extent is about to be reused."""
        ...

    def build_merged(self, digest: str) -> int:
        """Makes the merged weights of an adapter; returns their bytes, at most those that were
        measured. After an error nothing of them is kept.
        """
        ...

    def measure_merge(self, digest: str) -> FoldedShare:
        """What merging would make of this stored adapter."""
        ...

    def remove_merged(self, digest: str) -> None:
        """Drops the merged weights of an adapter."""
        ...

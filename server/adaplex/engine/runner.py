"""Runner: what the engine needs of a model. `adaplex.model` implements it; tests fake it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from adaplex.engine.batch import Batch
from adaplex.engine.request import SampledToken


class Runner(Protocol):
    """Runs batches on tensors. `run`, `remove_adapter` and `remove_merged` are called on the
    engine thread; `load_adapter`, `merged_bytes` and `build_merged` on loader threads, for
    several digests at once, but for one digest and kind of memory only once at a time.
    """

    def run(self, batch: Batch) -> Seq[SampledToken]:
        """Runs one step; one token for each of `batch.sampling`, in order."""
        ...

    def load_adapter(self, digest: str, offset: int, nbytes: int) -> None:
        """Reads the adapter and packs it into arena bytes [offset, offset + nbytes).

        Raises an AdaplexError when it cannot; the extent is then free to reuse.
        """
        ...

    def remove_adapter(self, digest: str) -> None:
        """Forgets a resident adapter; its extent is about to be reused."""
        ...

    def build_merged(self, digest: str) -> int:
        """Makes the dense merged weights of an adapter; returns their bytes, at most
        `merged_bytes`. After an error nothing of them is kept.
        """
        ...

    def merged_bytes(self, digest: str) -> int:
        """Bytes that merged weights of this stored adapter would take."""
        ...

    def remove_merged(self, digest: str) -> None:
        """Drops the merged weights of an adapter."""
        ...

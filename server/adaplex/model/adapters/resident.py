"""ResidentAdapters: every adapter in device memory, unmerged or merged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adaplex.engine.request import AdapterMode, AdapterRef
from adaplex.model.adapters.arena import Arena
from adaplex.model.adapters.fold import FoldedWeights
from adaplex.model.weights.adapter_weights import AdapterWeights


class ResidentAdapters:
    """Unmerged adapters, which the arena has, and the folded weights of merged ones."""

    def __init__(self, arena: Arena, modules: Mapping[str, int]) -> None:
        """`modules` numbers every module of the base."""
        self._arena, self._modules = arena, modules
        self._folded: dict[str, FoldedWeights] = {}
        self._folded_tables: dict[str, NDArray[np.int64]] = {}

    def add_folded(self, digest: str, weights: FoldedWeights) -> None:
        """Makes the folded weights of an adapter resident."""
        self._folded[digest] = weights

    def remove_folded(self, digest: str) -> None:
        """Removes the folded weights of an adapter."""
        del self._folded[digest]
        self._folded_tables.pop(digest, None)

    def folded(self, digest: str) -> FoldedWeights:
        """Returns the folded weights of an adapter. Raises KeyError for one that has none."""
        return self._folded[digest]

    def unmerged(self, digest: str) -> AdapterWeights:
        """Returns an adapter of the arena. Raises KeyError for one that is not resident."""
        return self._arena.weights(digest)

    def weights(self, adapter: AdapterRef) -> AdapterWeights:
        """Returns what an adapter does in its mode; of a merged one, beside its folded linears."""
        if adapter.mode is AdapterMode.MERGED:
            return self._folded[adapter.digest].rest
        return self._arena.weights(adapter.digest)

    def table_address(self, adapter: AdapterRef) -> int:
        """Returns the address of the table that the C decoder reads for an adapter in its mode."""
        if adapter.mode is AdapterMode.MERGED:
            return self._folded_table(adapter.digest).ctypes.data
        return self._arena.weights(adapter.digest).address

    def _folded_table(self, digest: str) -> NDArray[np.int64]:
        """Returns the table of folded weights; made at the first use, since only the C decoder,
        under which every linear has panels, needs one.
        """
        if digest not in self._folded_tables:
            self._folded_tables[digest] = self._folded[digest].table(self._modules)
        return self._folded_tables[digest]

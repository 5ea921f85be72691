"""AdapterKernels: everything that adapters do to the rows of a step, over tiles of rows.

A tile is neighbouring rows of one adapter. On devices without such kernels
`adapters.torch_rows` does the same in torch, with a LowRankKernel for the deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from adaplex.model.kernels.low_rank import LowRankKernel
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.step_context import AdapterRows
from adaplex.model.weights.adapter_weights import AdapterRun

ModuleProduct = Callable[[str, LinearBackend, Tensor], Tensor]
"""(module, the base's linear, x [rows, in]) -> [rows, out], to which kernels apply adapters."""


def base_product(_module: str, backend: LinearBackend, x: Tensor) -> Tensor:
    """x [rows, in] -> [rows, out], by the base's own linear."""
    return backend(x)


class Tile(NamedTuple):
    """Rows [start, start + rows) of one adapter, which is in a slot of the kernels' table."""

    slot: int
    start: int
    rows: int

    @staticmethod
    def none() -> Tile:
        """Returns a tile that kernels skip."""
        return Tile(-1, 0, 0)


class AdapterKernels(LowRankKernel, Protocol):
    """Kernels for everything that adapters do. They read on the device which rows have which
    adapter, so that one launch can be replayed for others.
    """

    def tiles(self, runs: Sequence[AdapterRun]) -> list[Tile]:
        """Puts the adapters of a step into the table; returns its tiles, at most one a row."""
        ...

    def launches(self, runs: Sequence[AdapterRun]) -> LaunchPlan:
        """Returns the launches of a step, after `tiles` was called for the same runs."""
        ...

    def rows(
        self,
        tiles: Tensor,
        launches: LaunchPlan,
        *,
        max_rank: int,
        virtual: Tensor | None = None,
        product: ModuleProduct = base_product,
    ) -> AdapterRows:
        """Returns what adapters do, by what `tiles` [3, tiles] int64 holds when a kernel runs; each
        column is a Tile.

        No adapter in it may need more than `launches`, or have a rank above `max_rank`. `virtual`
        [rows] int64 has the virtual token that a row is, -1 for none. `product` replaces the
        base's product at linears.
        """
        ...

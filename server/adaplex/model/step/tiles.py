"""AdapterKernels: all that adapters do to the rows of a step, over tiles of rows of one adapter.

Where there are none, `segments` does it in torch with a LowRankKernel for the deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from adaplex.model.linear.backend import LinearBackend
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.step_context import AdapterRows
from adaplex.model.weights.adapter_weights import LowRankKernel, Span

Product = Callable[[str, LinearBackend, Tensor], Tensor]
"""(module, the base's linear, x [rows, in]) -> [rows, out] to which adapters do the rest."""


def base_product(_module: str, backend: LinearBackend, x: Tensor) -> Tensor:
    """The base's own product."""
    return backend(x)


class Tile(NamedTuple):
    """Rows [start, start + rows) of one adapter, and where the kernel's table has it."""

    slot: int
    start: int
    rows: int

    @staticmethod
    def none() -> Tile:
        """A tile that is skipped."""
        return Tile(-1, 0, 0)


@runtime_checkable
class AdapterKernels(LowRankKernel, Protocol):
    """Kernels for everything that adapters do, which read on the device which rows have which, so
    that one launch can be replayed for others."""

    def tiles(self, spans: Sequence[Span]) -> list[Tile]:
        """The tiles of a step, at most one a row; their adapters are in the table from now on."""
        ...

    def launches(self, spans: Sequence[Span]) -> LaunchPlan:
        """What a step needs whose tiles were made."""
        ...

    def rows(
        self,
        tiles: Tensor,
        launches: LaunchPlan,
        *,
        max_rank: int,
        virtual: Tensor | None = None,
        product: Product = base_product,
    ) -> AdapterRows:
        """What adapters do by what `tiles` [3, tiles] int64 says when it runs; each column is a
        Tile.

        No adapter in it may need more than `launches`, or have a rank above `max_rank`. `virtual`
        [rows] int64 tells which virtual token a row is, -1 for none. `product` does what the base
        does at a linear.
        """
        ...

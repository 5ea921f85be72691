"""ResidentTable: where kernels on the device find what adapters do, and which rows have which.

A step's rows are cut into tiles of up to TILE rows of one adapter, whether they decode or belong to
a prompt. Everything that differs between steps lies in tensors on the device: the table of resident
adapters, which keeps its place while they come and go, and the tiles. So a captured launch can be
replayed with other adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.adapters.limits import ALIGNMENT
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.kernels.native.structs import SITE_FIELDS
from adaplex.model.kernels.triton.dot import LEAST
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.tiles import Tile
from adaplex.model.weights.adapter_weights import AdapterWeights, Span

TILE = tl.constexpr(LEAST)
"""Rows of one adapter in one product."""
RANKS = tl.constexpr(LEAST)
"""Ranks, or rows of a weight, in one product."""
FIELDS = tl.constexpr(len(SITE_FIELDS))
ALIGNED = tl.constexpr(ALIGNMENT)

Shared = tuple[Tensor, int, int, Tensor]
"""What every kernel is told first: table, its stride, module, tiles."""


@dataclass(frozen=True)
class _Resident:
    """One row of the table. The weights may be gone, and their identity another's."""

    row: int
    weights: weakref.ref[AdapterWeights]
    launches: LaunchPlan
    row_ids: Sequence[Tensor]
    """What the row points to."""


class ResidentTable:
    """Rows for the adapters that steps used last."""

    def __init__(
        self, modules: Mapping[str, BaseModule], device: torch.device, *, slots: int
    ) -> None:
        """`modules` are those of the base, in order; `slots` bounds the adapters of a step."""
        self.numbers = {name: number for number, name in enumerate(modules)}
        self._table = torch.zeros(
            slots, len(modules), len(SITE_FIELDS), dtype=torch.int64, device=device
        )
        """[slots, modules, SITE_FIELDS]: AdapterWeights.table, but row_ids are on the device."""
        self._resident: dict[int, _Resident] = {}
        """By identity of the weights, least recently used first."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._table.device

    def shared(self, module: int, tiles: Tensor) -> Shared:
        """See Shared."""
        return self._table, self._table.stride(0), module, tiles

    def tiles(self, spans: Sequence[Span]) -> list[Tile]:
        """The tiles of a step, at most one a row; their adapters are in the table from now on."""
        self._hold({id(span.weights): span.weights for span in spans})
        return [
            Tile(self._resident[id(span.weights)].row, start, min(LEAST, span.stop - start))
            for span in spans
            for start in range(span.start, span.stop, LEAST)
        ]

    def launches(self, spans: Sequence[Span]) -> LaunchPlan:
        """What a step needs whose tiles were made."""
        needed = LaunchPlan()
        for key in {id(span.weights) for span in spans}:
            needed |= self._resident[key].launches
        return needed

    def _hold(self, wanted: Mapping[int, AdapterWeights]) -> None:
        """Adapters that no longer are wanted make room for new ones."""
        resident = self._resident
        assert len(wanted) <= len(self._table)
        for key in wanted.keys() & resident.keys():
            resident[key] = resident.pop(key)
        for key, weights in wanted.items():
            known = resident.get(key)
            if known is None:
                full = len(resident) == len(self._table)
                row = resident.pop(next(iter(resident))).row if full else len(resident)
                resident[key] = self._placed(row, weights)
            elif known.weights() is not weights:
                resident[key] = self._placed(known.row, weights)

    def _placed(self, row: int, weights: AdapterWeights) -> _Resident:
        table, field = weights.table.copy(), SITE_FIELDS.index
        # Kernels read vectors of this alignment.
        assert not (table[:, (field("a"), field("b"))] % ALIGNMENT).any()
        launches, row_ids = LaunchPlan.of(table), []
        if table[:, field("row_count")].any():
            for name, site in weights.sites.items():
                if site.rows is not None:
                    ids = site.row_ids.to(self.device, torch.int32)
                    table[self.numbers[name], field("row_ids")] = ids.data_ptr()
                    row_ids.append(ids)
        self._table[row, : len(table)].copy_(torch.from_numpy(table))
        return _Resident(row, weakref.ref(weights), launches, row_ids)


@triton.jit
def tile_rows(tiles):
    """The rows of this program's tile, and which of them are live."""
    tile, count = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, TILE)
    return tl.load(tiles + count + tile) + i, i < tl.load(tiles + 2 * count + tile)


@triton.jit
def elements(site, FIELD: tl.constexpr, x):
    """What a field of a site points to, in the type of what x points to."""
    address = tl.load(site + FIELD).to(tl.pointer_type(x.dtype.element_ty))
    return tl.multiple_of(address, ALIGNED)


@triton.jit
def vector(site, FIELD: tl.constexpr, x, o, width, default):
    """fp32 elements `o` of a vector [width] that a field points to; `default` without one."""
    wanted = (o < width) & (tl.load(site + FIELD) != 0)
    return tl.load(elements(site, FIELD, x) + o, mask=wanted, other=default).to(tl.float32)

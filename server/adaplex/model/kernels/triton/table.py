"""ResidentTable: the sites of resident adapters and the tiles of a step, in device memory.

The rows of a step, decoding or of prompts, are divided into tiles of up to TILE rows of one
adapter. Everything that differs between steps is in tensors on the device: the table of resident
adapters, whose address does not change when adapters do, and the tiles. So a captured launch can be
replayed with other adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class SiteArguments(NamedTuple):
    """The first arguments of every kernel that applies adapters: where to find their sites."""

    table: Tensor
    """[slots, modules, SITE_FIELDS] int64: AdapterWeights.table of each resident adapter."""
    table_row: int
    """Stride of a slot."""
    module: int
    """Number of the module."""
    tiles: Tensor
    """[3, tiles] int64: slot, first row and number of rows of each tile; slot -1 to skip it."""


@dataclass(frozen=True)
class _Resident:
    """One slot of the table. Its weights may have been freed, and their id() reused."""

    row: int
    weights: weakref.ref[AdapterWeights]
    launches: LaunchPlan
    row_ids: Sequence[Tensor]
    """Tensors that the slot points to."""


class ResidentTable:
    """Table of the adapters that steps used most recently."""

    def __init__(
        self, modules: Mapping[str, BaseModule], device: torch.device, *, slots: int
    ) -> None:
        """`modules` are all of the base's, in order; `slots` limits the adapters of one step."""
        self.numbers = {name: number for number, name in enumerate(modules)}
        self._table = torch.zeros(
            slots, len(modules), len(SITE_FIELDS), dtype=torch.int64, device=device
        )
        """[slots, modules, SITE_FIELDS]: AdapterWeights.table with row_ids on the device."""
        self._resident: dict[int, _Resident] = {}
        """Slots by id() of the weights, least recently used first."""

    @property
    def device(self) -> torch.device:
        """Device of the table."""
        return self._table.device

    def site_arguments(self, module: int, tiles: Tensor) -> SiteArguments:
        """Returns the arguments for a module; tiles [3, tiles] int64."""
        return SiteArguments(self._table, self._table.stride(0), module, tiles)

    def tiles(self, spans: Sequence[Span]) -> list[Tile]:
        """Returns the tiles of a step, at most one a row, after copying their adapters to the
        table.
        """
        self._make_resident({id(span.weights): span.weights for span in spans})
        return [
            Tile(self._resident[id(span.weights)].row, start, min(LEAST, span.stop - start))
            for span in spans
            for start in range(span.start, span.stop, LEAST)
        ]

    def launches(self, spans: Sequence[Span]) -> LaunchPlan:
        """Returns the launches of a step, after `tiles` was called for the same spans."""
        needed = LaunchPlan()
        for key in {id(span.weights) for span in spans}:
            needed |= self._resident[key].launches
        return needed

    def _make_resident(self, wanted: Mapping[int, AdapterWeights]) -> None:
        """Copies new adapters to the table; if it is full, over the least recently used ones."""
        resident = self._resident
        assert len(wanted) <= len(self._table)
        for key in wanted.keys() & resident.keys():
            resident[key] = resident.pop(key)
        for key, weights in wanted.items():
            known = resident.get(key)
            if known is None:
                full = len(resident) == len(self._table)
                row = resident.pop(next(iter(resident))).row if full else len(resident)
                resident[key] = self._copied(row, weights)
            elif known.weights() is not weights:
                resident[key] = self._copied(known.row, weights)

    def _copied(self, row: int, weights: AdapterWeights) -> _Resident:
        """Copies the sites of an adapter to a slot."""
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
    """tiles: pointer to int64 [3, tiles] -> rows [TILE] of this program's tile, and bool [TILE]
    whether each is in use.
    """
    tile, count = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, TILE)
    return tl.load(tiles + count + tile) + i, i < tl.load(tiles + 2 * count + tile)


@triton.jit
def elements(site, FIELD: tl.constexpr, x):
    """site: pointer to int64 [SITE_FIELDS]; x: pointer to elements -> the address in a field of the
    site, as a pointer to elements.
    """
    address = tl.load(site + FIELD).to(tl.pointer_type(x.dtype.element_ty))
    return tl.multiple_of(address, ALIGNED)


@triton.jit
def vector(site, FIELD: tl.constexpr, x, o, width, default):
    """site: pointer to int64 [SITE_FIELDS]; o int -> fp32 elements `o` of the vector [width] whose
    address is in a field of the site; `default` if the field is zero.
    """
    wanted = (o < width) & (tl.load(site + FIELD) != 0)
    return tl.load(elements(site, FIELD, x) + o, mask=wanted, other=default).to(tl.float32)

"""ResidentTable: the tables of adapters on a CUDA device, and the tiles of a step.

See `kernels.triton.site` for how kernels read both.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.adapters.limits import ALIGNMENT
from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.kernels.triton.dot import LEAST
from adaplex.model.kernels.triton.site import SiteArguments
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.tiles import Tile
from adaplex.model.weights.adapter_weights import AdapterRun, AdapterWeights
from adaplex.model.weights.site_table import SiteField


@dataclass(frozen=True)
class _Resident:
    """One slot of the table. Its weights may have been freed, and their id() reused."""

    slot: int
    weights: weakref.ref[AdapterWeights]
    launches: LaunchPlan
    row_ids: Sequence[Tensor]
    """Tensors to which ROW_IDS of the slot points; they stay alive with it."""


class ResidentTable:
    """Table of the adapters that steps used most recently."""

    def __init__(
        self, modules: Mapping[str, BaseModule], device: torch.device, *, slots: int
    ) -> None:
        """`modules` are those of the base, in order; `slots` bounds the adapters of a step."""
        self.numbers = {name: number for number, name in enumerate(modules)}
        self._table = torch.zeros(
            slots, len(modules), len(SiteField), dtype=torch.int64, device=device
        )
        """[slots, modules, SiteField]: AdapterWeights.table, but ROW_IDS are on the device."""
        self._resident: dict[int, _Resident] = {}
        """Slots by id() of the weights, least recently used first."""

    @property
    def device(self) -> torch.device:
        """Device of the table."""
        return self._table.device

    def site_arguments(self, module: int, tiles: Tensor) -> SiteArguments:
        """Returns the arguments for a module; tiles [3, tiles] int64."""
        return SiteArguments(self._table, self._table.stride(0), module, tiles)

    def tiles(self, runs: Sequence[AdapterRun]) -> list[Tile]:
        """Puts the adapters of a step into the table; returns its tiles, at most one a row."""
        self._make_resident({id(run.weights): run.weights for run in runs})
        return [
            Tile(self._resident[id(run.weights)].slot, start, min(LEAST, run.stop - start))
            for run in runs
            for start in range(run.start, run.stop, LEAST)
        ]

    def launches(self, runs: Sequence[AdapterRun]) -> LaunchPlan:
        """Returns the launches of a step, after `tiles` was called for the same runs."""
        needed = LaunchPlan()
        for key in {id(run.weights) for run in runs}:
            needed |= self._resident[key].launches
        return needed

    def _make_resident(self, wanted: Mapping[int, AdapterWeights]) -> None:
        """Copies new adapters into the table; if it is full, over the least recently used ones."""
        resident = self._resident
        assert len(wanted) <= len(self._table)
        for key in wanted.keys() & resident.keys():
            resident[key] = resident.pop(key)
        for key, weights in wanted.items():
            known = resident.get(key)
            if known is None:
                full = len(resident) == len(self._table)
                slot = resident.pop(next(iter(resident))).slot if full else len(resident)
                resident[key] = self._write(slot, weights)
            elif known.weights() is not weights:
                resident[key] = self._write(known.slot, weights)

    def _write(self, slot: int, weights: AdapterWeights) -> _Resident:
        """Copies an adapter's table into a slot, with its row ids on the device."""
        table = weights.table.copy()
        # Kernels read vectors of this alignment.
        assert not (table[:, (SiteField.A, SiteField.B)] % ALIGNMENT).any()
        launches, row_ids = LaunchPlan.of(table), []
        if table[:, SiteField.ROW_COUNT].any():
            for name, site in weights.sites.items():
                if site.rows is not None:
                    ids = site.row_ids.to(self.device, torch.int32)
                    table[self.numbers[name], SiteField.ROW_IDS] = ids.data_ptr()
                    row_ids.append(ids)
        self._table[slot, : len(table)].copy_(torch.from_numpy(table))
        return _Resident(slot, weakref.ref(weights), launches, row_ids)

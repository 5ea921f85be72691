"""Packing: an adapter as one flat tensor in host memory, one copy away from the arena.

Policy (which adapters, and how many bytes) lives in `adaplex.engine.unmerged_residency`; the bytes
are here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.program import PANEL, AdapterProgram, ModuleProgram, PackedTensor
from adaplex.model.constants import PANEL_COLUMNS
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.weights.adapter_weights import AdapterWeights, SiteWeights
from adaplex.model.weights.site_table import SITE_FIELDS, SiteField, empty_table, shape_code

assert PANEL == PANEL_COLUMNS, (
    f"replaced weights are padded to {PANEL} rows, and C kernels read panels of {PANEL_COLUMNS}: "
    "no replaced weight could be packed for them"
)

ADDRESS_FIELD = dict(zip(SITE_FIELDS, SiteField, strict=True)) | {"weight": SiteField.DENSE}
"""Role of a packed tensor -> column of the table that has its address; not every role has one."""


@dataclass(frozen=True)
class TableRows:
    """The rows of an adapter's table that are not zero, before it has an address."""

    modules: NDArray[np.int64]
    """[touched]: numbers of the modules that the adapter touches."""
    values: NDArray[np.int64]
    """[touched, SiteField]: bytes from the start of the adapter where `placed`, else the value."""
    placed: NDArray[np.bool_]
    """[touched, SiteField]: True at addresses within the adapter."""
    row_ids: NDArray[np.int32]
    """Row ids of all modules, to which ROW_IDS in `values` point."""

    def at(self, address: int, modules: int) -> NDArray[np.int64]:
        """Returns the table [modules, SiteField] of a copy that begins at an address."""
        table = empty_table(modules)
        table[self.modules] = self.values + address * self.placed
        return table


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in the bytes that it has in the arena."""

    digest: str
    flat: Tensor
    """[elements] of the compute dtype, in host memory."""
    layout: tuple[PackedTensor, ...]
    traits: Mapping[str, SiteWeights]
    """Facts of sites that are no tensors in `flat`, by module."""
    modules: int
    """Modules of the base."""
    rows: TableRows

    def weights(self, extent: Tensor) -> AdapterWeights:
        """Returns the weights of a copy in `extent`, which has at least the elements of `flat`."""
        return AdapterWeights(
            self.rows.at(extent.data_ptr(), self.modules),
            self.plain,
            self.prefix_tokens,
            partial(_sites, self.layout, self.traits, extent),
            row_ids=self.rows.row_ids,
        )

    @cached_property
    def plain(self) -> bool:
        """True if the adapter only adds low-rank deltas to linears."""
        return not self.traits and all(place.role in ("a", "b") for place in self.layout)

    @cached_property
    def prefix_tokens(self) -> int:
        """Positions before the prompt whose keys and values the adapter has."""
        return max((place.shape[0] for place in self.layout if place.role == "keys"), default=0)


@dataclass(frozen=True)
class Packer:
    """Packs programs for one base."""

    modules: Mapping[str, BaseModule]
    """Every module of the base; their order numbers them."""
    dtype: torch.dtype
    pinned: bool = False
    """True to pack into pinned memory, so that copies to a CUDA device run asynchronously."""
    kernels: NativeKernels | None = None
    """C kernels, which read the b of linears in panels."""
    whole_model: bool = False
    """True if the C kernels run the whole model: then every b and replaced weight is in panels."""

    def pack(self, program: AdapterProgram) -> PackedAdapter:
        """Packs a program."""
        size = self.dtype.itemsize
        elements = program.packed_bytes(size) // size
        flat = torch.zeros(elements, dtype=self.dtype, pin_memory=self.pinned)
        program.pack_into(flat, self._numbers)
        layout = program.layout(size, self._numbers)
        for place in layout:
            part = flat[place.offset : place.offset + math.prod(place.shape)]
            self._reorder_for_panels(place, part)
        traits = {m.module: t for m in program.modules if (t := self._traits(m)) is not None}
        rows = self._table_rows(program, layout)
        return PackedAdapter(program.digest, flat, layout, traits, len(self.modules), rows)

    def _reorder_for_panels(self, place: PackedTensor, part: Tensor) -> None:
        """Reorders the elements of a packed tensor, in place, if C kernels read it in panels."""
        linear = self.modules[place.module].kind == "linear"
        if self.kernels is None or not (linear or self.whole_model):
            return
        view = part.view(place.shape)
        if place.role == "b":
            part.copy_(self.kernels.pack_low_rank(view))
        elif place.role == "weight" and linear and self.whole_model:
            part.copy_(self.kernels.pack_dense(view).view(-1))

    def _traits(self, program: ModuleProgram) -> SiteWeights | None:
        """Returns what a site has besides tensors; None for a linear without replaced rows."""
        module = self.modules[program.module]
        if program.bottleneck is not None:
            shape = program.bottleneck
            return SiteWeights(activation=shape.activation, reads=shape.reads)
        if program.rows is not None:
            return SiteWeights(row_ids=torch.tensor(program.rows.ids))
        if module.kind == "experts" and program.low_rank is not None:
            return SiteWeights(expert_rank=program.low_rank.rank // module.experts)
        return None if module.kind == "linear" else SiteWeights()

    def _table_rows(self, program: AdapterProgram, layout: Sequence[PackedTensor]) -> TableRows:
        row_of = {module.module: row for row, module in enumerate(program.modules)}
        values = empty_table(len(row_of))
        placed = np.zeros(values.shape, dtype=np.bool_)
        for place in layout:
            row = row_of[place.module]
            if (field := ADDRESS_FIELD.get(place.role)) is not None:
                values[row, field] = place.offset * self.dtype.itemsize
                placed[row, field] = True
            if place.role == "b":
                values[row, SiteField.RANK] = place.shape[0]
            if place.role == "virtual":
                values[row, SiteField.VIRTUAL_COUNT] = place.shape[0]
        ids = [i for m in program.modules if m.rows is not None for i in m.rows.ids]
        row_ids, begun = np.array(ids, dtype=np.int32), 0
        for row, module in enumerate(program.modules):
            if module.bottleneck is not None:
                values[row, SiteField.SHAPE] = shape_code(module.bottleneck)
            if module.rows is not None:
                address = row_ids.ctypes.data + row_ids.itemsize * begun
                values[row, SiteField.ROW_IDS] = address
                values[row, SiteField.ROW_COUNT] = len(module.rows.ids)
                begun += len(module.rows.ids)
        modules = np.array([self._numbers[name] for name in row_of], dtype=np.int64)
        return TableRows(modules, values, placed, row_ids)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.modules)}


def _sites(
    layout: Sequence[PackedTensor], traits: Mapping[str, SiteWeights], extent: Tensor
) -> dict[str, SiteWeights]:
    """Returns the sites of a packed adapter, as views of its extent."""
    sites = {name: replace(site) for name, site in traits.items()}
    for place in layout:
        end = place.offset + math.prod(place.shape)
        view = extent[place.offset : end].view(place.shape)
        setattr(sites.setdefault(place.module, SiteWeights()), place.role, view)
    return sites


class HostCache:
    """Packed adapters in host memory, by digest. Each digest is used by one thread at a time."""

    def __init__(self) -> None:
        self._copies: dict[str, PackedAdapter] = {}

    def store(self, packed: PackedAdapter) -> None:
        """Stores a packed adapter."""
        self._copies[packed.digest] = packed

    def get(self, digest: str) -> PackedAdapter | None:
        """Returns the copy of an adapter, None if there is none."""
        return self._copies.get(digest)

    def remove(self, digest: str) -> None:
        """Removes a copy."""
        del self._copies[digest]

"""HostCache: adapters packed in host memory, one copy away from the arena.

Policy (which, and how many bytes) lives in `adaplex.engine.unmerged_residency`; here are the bytes.
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
from adaplex.adapters.program.program import AdapterProgram, ModuleProgram, PackedTensor
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kernels.native.structs import SITE_FIELDS, shape_code
from adaplex.model.weights.adapter_weights import AdapterWeights, SiteWeights

FIELDS = {role: role for role in SITE_FIELDS} | {"weight": "dense"}
"""Role of a packed tensor -> where the table has its address."""


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as it lies in the arena."""

    digest: str
    flat: Tensor
    """[elements] of the compute dtype, in host memory."""
    layout: tuple[PackedTensor, ...]
    traits: Mapping[str, SiteWeights]
    """What is no tensor of the arena, by module."""
    modules: int
    """How many the base has."""
    lines: NDArray[np.int64]
    """[touched] numbers of the modules that it touches."""
    values: NDArray[np.int64]
    """[touched, SITE_FIELDS]: bytes from the start where `placed`, else what the table holds."""
    placed: NDArray[np.bool_]
    """[touched, SITE_FIELDS]."""
    row_ids: NDArray[np.int32]
    """What some of `values` point to."""

    def table(self, address: int) -> NDArray[np.int64]:
        """As in AdapterWeights, of a copy that begins at this address."""
        table = np.zeros((self.modules, len(SITE_FIELDS)), dtype=np.int64)
        table[self.lines] = self.values + address * self.placed
        return table

    def weights(self, extent: Tensor) -> AdapterWeights:
        """Of a copy in `extent`, which has at least as many elements as `flat`."""
        make_sites = partial(_sites, self.layout, self.traits, extent)
        return AdapterWeights(
            self.table(extent.data_ptr()),
            self.plain,
            self.prefix_tokens,
            make_sites,
            row_ids=self.row_ids,
        )

    @cached_property
    def plain(self) -> bool:
        """Whether it only adds low-rank deltas to linears."""
        return not self.traits and all(place.role in ("a", "b") for place in self.layout)

    @cached_property
    def prefix_tokens(self) -> int:
        """Positions whose keys and values it gives."""
        return max((place.shape[0] for place in self.layout if place.role == "keys"), default=0)


@dataclass(frozen=True)
class Packer:
    """Packs programs for one base."""

    modules: Mapping[str, BaseModule]
    """Every module of the base; their order numbers them."""
    dtype: torch.dtype
    pinned: bool = False
    """Whether copies to a CUDA device run beside it."""
    kernels: NativeKernels | None = None
    """Those that read the b of linears in panels."""
    decoder: bool = False
    """Whether they run the whole model: then every b and replaced weight lies in panels."""

    def pack(self, program: AdapterProgram) -> PackedAdapter:
        """Packs a program."""
        size = self.dtype.itemsize
        elements = program.packed_bytes(size) // size
        flat = torch.zeros(elements, dtype=self.dtype, pin_memory=self.pinned)
        program.pack_into(flat, self._numbers)
        layout = program.layout(size, self._numbers)
        for place in layout:
            self._into_panels(place, flat[place.offset : place.offset + math.prod(place.shape)])
        traits = {m.module: t for m in program.modules if (t := self._traits(m)) is not None}
        return PackedAdapter(
            program.digest, flat, layout, traits, len(self.modules), *self._lines(program, layout)
        )

    def _into_panels(self, place: PackedTensor, part: Tensor) -> None:
        """Puts a tensor the way the C kernels read it."""
        linear = self.modules[place.module].kind == "linear"
        if self.kernels is None or not (linear or self.decoder):
            return
        view = part.view(place.shape)
        if place.role == "b":
            part.copy_(self.kernels.pack_low_rank(view))
        elif place.role == "weight" and linear and self.decoder:
            part.copy_(self.kernels.pack_dense(view).view(-1))

    def _traits(self, program: ModuleProgram) -> SiteWeights | None:
        """What a site has besides tensors; None for linears, mostly."""
        module = self.modules[program.module]
        if program.bottleneck is not None:
            shape = program.bottleneck
            return SiteWeights(activation=shape.activation, reads=shape.reads)
        if program.rows is not None:
            return SiteWeights(row_ids=torch.tensor(program.rows.ids))
        if module.kind == "experts" and program.low_rank is not None:
            return SiteWeights(expert_rank=program.low_rank.rank // module.experts)
        return None if module.kind == "linear" else SiteWeights()

    def _lines(
        self, program: AdapterProgram, layout: Sequence[PackedTensor]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int32]]:
        """Lines, values, placed and row_ids of PackedAdapter."""
        line_of = {module.module: line for line, module in enumerate(program.modules)}
        values = np.zeros((len(line_of), len(SITE_FIELDS)), dtype=np.int64)
        placed = np.zeros(values.shape, dtype=np.bool_)
        field = {name: index for index, name in enumerate(SITE_FIELDS)}
        for place in layout:
            line = line_of[place.module]
            if place.role in FIELDS:
                at = line, field[FIELDS[place.role]]
                values[at], placed[at] = place.offset * self.dtype.itemsize, True
            if place.role == "b":
                values[line, field["rank"]] = place.shape[0]
            if place.role == "virtual":
                values[line, field["virtual_count"]] = place.shape[0]
        ids = [i for m in program.modules if m.rows is not None for i in m.rows.ids]
        row_ids, begun = np.array(ids, dtype=np.int32), 0
        for line, module in enumerate(program.modules):
            if module.bottleneck is not None:
                values[line, field["shape"]] = shape_code(module.bottleneck)
            if module.rows is not None:
                values[line, field["row_ids"]] = row_ids.ctypes.data + row_ids.itemsize * begun
                values[line, field["row_count"]] = len(module.rows.ids)
                begun += len(module.rows.ids)
        lines = np.array([self._numbers[name] for name in line_of], dtype=np.int64)
        return lines, values, placed, row_ids

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.modules)}


def _sites(
    layout: Sequence[PackedTensor], traits: Mapping[str, SiteWeights], extent: Tensor
) -> dict[str, SiteWeights]:
    """Views of a packed adapter in its extent."""
    sites = {name: replace(site) for name, site in traits.items()}
    for place in layout:
        end = place.offset + math.prod(place.shape)
        view = extent[place.offset : end].view(place.shape)
        setattr(sites.setdefault(place.module, SiteWeights()), place.role, view)
    return sites


class HostCache:
    """Packed adapters by digest. Each digest is used by one thread at a time."""

    def __init__(self) -> None:
        self._copies: dict[str, PackedAdapter] = {}

    def keep(self, packed: PackedAdapter) -> None:
        """Takes a packed adapter in."""
        self._copies[packed.digest] = packed

    def get(self, digest: str) -> PackedAdapter | None:
        """The copy of an adapter, if there is one."""
        return self._copies.get(digest)

    def remove(self, digest: str) -> None:
        """Forgets a copy."""
        del self._copies[digest]

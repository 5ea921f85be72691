"""HostCopies: adapters packed in host memory, one copy away from the arena.

Policy (which, and how many bytes) lives in `adaplex.engine.unmerged`; here are the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program import AdapterProgram, PackedTensor
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kernels.native.structs import SITE_FIELDS


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as it lies in the arena."""

    digest: str
    flat: Tensor
    """[elements] of the compute dtype, in host memory."""
    layout: tuple[PackedTensor, ...]
    offsets: NDArray[np.int64]
    """[modules, SITE_FIELDS]: bytes from the start, -1 where there is nothing, and ranks: what the
    table of the resident adapter differs from by its address."""

    def table(self, address: int) -> NDArray[np.int64]:
        """As in AdapterWeights, of a copy that begins at this address."""
        rank = SITE_FIELDS.index("rank")
        table: NDArray[np.int64] = np.where(self.offsets < 0, 0, self.offsets + address)
        table[:, rank] = np.maximum(self.offsets[:, rank], 0)
        return table

    @property
    def has_bias(self) -> bool:
        """Whether any site has one."""
        return any(place.role == "bias" for place in self.layout)


def pack(
    program: AdapterProgram,
    dtype: torch.dtype,
    *,
    modules: Mapping[str, int],
    pinned: bool,
    kernels: NativeKernels | None = None,
) -> PackedAdapter:
    """Packs a program; `modules` numbers every module of the base; `pinned` makes copies to a CUDA
    device run beside it. Where the C `kernels` will read it, every b lies in their panels.
    """
    size = dtype.itemsize
    elements = program.packed_bytes(size) // size
    flat = torch.zeros(elements, dtype=dtype, pin_memory=pinned)
    program.pack_into(flat)
    layout = program.layout(size)
    for place in layout:
        if kernels is not None and place.role == "b":
            part = flat[place.offset : place.offset + math.prod(place.shape)]
            part.copy_(kernels.pack_low_rank(part.view(place.shape)))
    return PackedAdapter(program.digest, flat, layout, _offsets(layout, modules, size))


def _offsets(
    layout: Sequence[PackedTensor], modules: Mapping[str, int], size: int
) -> NDArray[np.int64]:
    offsets = np.full((len(modules), len(SITE_FIELDS)), -1, dtype=np.int64)
    for place in layout:
        line = offsets[modules[place.module]]
        line[SITE_FIELDS.index(place.role)] = place.offset * size
        if place.role == "a":
            line[SITE_FIELDS.index("rank")] = place.shape[0]
    return offsets


class HostCopies:
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

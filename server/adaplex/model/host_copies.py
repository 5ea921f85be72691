"""HostCopies: adapters packed in host memory, one copy away from the arena.

Policy (which, and how many bytes) lives in `adaplex.engine.unmerged`; here are the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.adapters.program import AdapterProgram, PackedTensor
from adaplex.model.kernels.native.kernels import NativeKernels


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as it lies in the arena."""

    digest: str
    flat: Tensor
    """[elements] of the compute dtype, in host memory."""
    layout: tuple[PackedTensor, ...]


def pack(
    program: AdapterProgram,
    dtype: torch.dtype,
    *,
    pinned: bool,
    kernels: NativeKernels | None = None,
) -> PackedAdapter:
    """Packs a program; `pinned` makes copies to a CUDA device run beside it. Where the C `kernels`
    will read it, every b lies in their panels.
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
    return PackedAdapter(program.digest, flat, layout)


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

"""Arena: one preallocated tensor that holds every resident adapter, packed.

Policy (which adapter, where) lives in `adaplex.engine.residency`; here are the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaplex.adapters.program import AdapterProgram


@dataclass
class SiteWeights:
    """Views into the arena of what one adapter does at one module.

    a [rank, in], b [out, rank], bias [out]; None where the adapter has none.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None


class Arena:
    """A flat tensor of the compute dtype; an adapter is one contiguous extent of it."""

    def __init__(self, nbytes: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)
        self._sites: dict[str, dict[str, SiteWeights]] = {}

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the compute dtype."""
        return self._flat.element_size()

    def load(self, program: AdapterProgram, offset: int, nbytes: int) -> None:
        """Packs the program into bytes [offset, offset + nbytes) and makes it resident."""
        size = self.element_bytes
        assert offset % size == 0
        assert program.packed_bytes(size) <= nbytes
        extent = self._flat[offset // size : (offset + nbytes) // size]
        program.pack_into(extent)
        sites: dict[str, SiteWeights] = {}
        for place in program.layout(size):
            end = place.offset + torch.Size(place.shape).numel()
            view = extent[place.offset : end].view(place.shape)
            setattr(sites.setdefault(place.module, SiteWeights()), place.role, view)
        self._sites[program.digest] = sites

    def remove(self, digest: str) -> None:
        """Forgets a resident adapter; its extent may be overwritten from now on."""
        del self._sites[digest]

    def sites(self, digest: str) -> dict[str, SiteWeights]:
        """Module name -> weights of a resident adapter. KeyError when it is not resident."""
        return self._sites[digest]

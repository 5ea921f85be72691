"""Arena: one preallocated tensor that holds every resident adapter, packed.

Policy (which adapter, where) lives in `adaplex.engine.residency`; here are the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adaplex.adapters.program import AdapterProgram
from adaplex.model.kernels.low_rank import AdapterWeights, SiteWeights


class Arena:
    """A flat tensor of the compute dtype; an adapter is one contiguous extent of it."""

    def __init__(
        self,
        nbytes: int,
        modules: Mapping[str, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`modules` numbers every module of the base that adapters may touch."""
        self._flat = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)
        self._modules = modules
        self._resident: dict[str, AdapterWeights] = {}

    def load(self, program: AdapterProgram, offset: int, nbytes: int) -> None:
        """Packs the program into bytes [offset, offset + nbytes) and makes it resident."""
        size = self._flat.element_size()
        assert offset % size == 0
        assert program.packed_bytes(size) <= nbytes
        extent = self._flat[offset // size : (offset + nbytes) // size]
        program.pack_into(extent)
        sites: dict[str, SiteWeights] = {}
        for place in program.layout(size):
            end = place.offset + torch.Size(place.shape).numel()
            view = extent[place.offset : end].view(place.shape)
            setattr(sites.setdefault(place.module, SiteWeights()), place.role, view)
        self._resident[program.digest] = AdapterWeights.of(sites, self._modules)

    def remove(self, digest: str) -> None:
        """Forgets a resident adapter; its extent may be overwritten from now on."""
        del self._resident[digest]

    def weights(self, digest: str) -> AdapterWeights:
        """A resident adapter. KeyError when it is not."""
        return self._resident[digest]

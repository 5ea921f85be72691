"""Arena: one preallocated tensor that holds every resident adapter, packed.

Policy (which adapter, where) lives in `adaplex.engine.unmerged_residency`; the bytes are here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaplex.model import huge_pages
from adaplex.model.adapters.packing import PackedAdapter
from adaplex.model.weights.adapter_weights import AdapterWeights


class Arena:
    """A flat tensor of the compute dtype; an adapter is one contiguous extent of it."""

    def __init__(self, nbytes: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = huge_pages.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._freed = torch.cuda.Event() if self._stream else None
        """Recorded after the steps that may still read a removed adapter: a step that samples
        nothing is only queued when the engine goes on."""
        self._resident: dict[str, AdapterWeights] = {}

    def load(self, packed: PackedAdapter, offset: int, nbytes: int) -> None:
        """Copies a packed adapter into bytes [offset, offset + nbytes) and makes it resident."""
        size = self._flat.element_size()
        assert offset % size == 0
        assert packed.flat.nbytes <= nbytes
        extent = self._flat[offset // size : offset // size + packed.flat.numel()]
        self._copy(packed.flat, extent)
        self._resident[packed.digest] = packed.weights(extent)

    def remove(self, digest: str) -> None:
        """Removes a resident adapter; its extent may be overwritten from now on. Called on the
        thread that runs the steps.
        """
        del self._resident[digest]
        if self._freed is not None:
            self._freed.record(torch.cuda.current_stream(self._flat.device))

    def weights(self, digest: str) -> AdapterWeights:
        """Returns a resident adapter. Raises KeyError for one that is not resident."""
        return self._resident[digest]

    def _copy(self, source: Tensor, extent: Tensor) -> None:
        """Copies synchronously; on a CUDA device concurrently with the steps that run there, but
        after those that were queued before the last removal.
        """
        if self._stream is None or self._freed is None:
            extent.copy_(source)
            return
        self._stream.wait_event(self._freed)
        with torch.cuda.stream(self._stream):
            extent.copy_(source, non_blocking=True)
        self._stream.synchronize()

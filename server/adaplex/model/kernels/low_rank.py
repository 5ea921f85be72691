"""Low-rank deltas of all adapters of a step at one module: y += b (a x) by rows.

ReferenceLowRank computes them in torch, NativeLowRank in C; on CUDA devices TritonKernels does
everything that adapters do (see `adapters.triton_rows`). All are row-invariant; they round
differently from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from adaplex.model.kernels import reference
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.weights.adapter_weights import AdapterRun
from adaplex.model.weights.site_table import SiteField

AddLowRank = Callable[[str, Tensor, Tensor], None]
"""(module, x [rows, in], y [rows, out]): adds the delta of every run to y, in place."""


class LowRankKernel(Protocol):
    """Makes the function that a step calls at every module."""

    def plan(self, runs: Sequence[AdapterRun], modules: Mapping[str, int]) -> AddLowRank:
        """Prepares one step. `modules` numbers every module, as in AdapterWeights.of."""
        ...


class ReferenceLowRank:
    """Two products a run in torch, on any device."""

    def plan(self, runs: Sequence[AdapterRun], modules: Mapping[str, int]) -> AddLowRank:
        """See LowRankKernel."""

        def add(module: str, x: Tensor, y: Tensor) -> None:
            for run in runs:
                site = run.weights.sites.get(module)
                if site is not None and site.a is not None and site.b is not None:
                    rows = slice(run.start, run.stop)
                    reference.add_low_rank(y[rows], x[rows], site.a, site.b)

        return add


class NativeLowRank:
    """One call of a C kernel a module; fp32 and bf16 on the CPU."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def plan(self, runs: Sequence[AdapterRun], modules: Mapping[str, int]) -> AddLowRank:
        """See LowRankKernel."""
        return _NativePlan(self._kernels, runs, modules)


class _NativePlan:
    """One step; keeps what the addresses that it passes to C point to."""

    def __init__(
        self, kernels: NativeKernels, runs: Sequence[AdapterRun], modules: Mapping[str, int]
    ) -> None:
        self._kernels, self._modules = kernels, modules
        self._stop = max((run.stop for run in runs), default=0)
        self._tables = [run.weights.table for run in runs]
        self._bounds = np.array([(run.start, run.stop) for run in runs], dtype=np.int64)
        starts = np.array([table.ctypes.data for table in self._tables], dtype=np.int64)
        row_bytes = np.dtype(np.int64).itemsize * len(SiteField)
        # [modules, runs]: addresses of the rows of the runs' tables.
        self._sites = np.arange(len(modules))[:, None] * row_bytes + starts
        ranks = [table[:, SiteField.RANK] > 0 for table in self._tables]
        self._used: list[bool] = np.any(ranks, axis=0).tolist()

    def __call__(self, module: str, x: Tensor, y: Tensor) -> None:
        """See AddLowRank. Raises MemoryError."""
        index = self._modules[module]
        if not self._used[index]:
            return
        assert self._stop <= x.shape[0] == y.shape[0]
        assert x.dtype == y.dtype == self._kernels.dtype
        assert x.stride(1) == y.stride(1) == 1
        failed = self._kernels.low_rank(
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            y.data_ptr(),
            y.stride(0),
            y.shape[1],
            self._bounds.ctypes.data,
            self._sites.ctypes.data + index * self._sites.strides[0],
            len(self._tables),
        )
        if failed:
            raise MemoryError("no scratch memory for low-rank deltas")

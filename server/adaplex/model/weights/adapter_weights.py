"""Grouped low-rank deltas: all adapters of a step at one module, y += b (a x) by rows.

Three implementations of one protocol: the reference in torch, C on the CPU, and Triton on CUDA
devices, whose kernels do everything else too (`adapter_kernels`). All are row-invariant; they round
differently from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.adapters.program.primitives import Activation, Reads
from adaplex.model.kernels import reference
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kernels.native.structs import SITE_FIELDS

AddLowRank = Callable[[str, Tensor, Tensor], None]
"""(module, x [rows, in], y [rows, out]): adds every span's delta to y, in place."""


@dataclass
class SiteWeights:
    """What one adapter does at one module, as views into packed memory; None where the adapter has
    none. See ModuleProgram: a [rank, in], b [rank, out], of an embedding a [in, rank]; a replaced
    weight of a linear has zero rows up to a whole panel.

    For the C kernels the elements of b, and of a replaced weight, are those of their panels,
    whatever the shape says.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    inner: Tensor | None = None
    bias: Tensor | None = None
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None
    weight: Tensor | None = None
    rows: Tensor | None = None
    virtual: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    row_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Of `rows`, int64."""
    activation: Activation = Activation.IDENTITY
    reads: Reads = Reads.OUTPUT
    expert_rank: int = 0
    """Ranks of one expert."""


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """A resident adapter: the row of the table that kernels read, and its sites by module."""

    table: NDArray[np.int64]
    """[modules, SITE_FIELDS]: addresses and numbers, zero where there is nothing."""
    plain: bool
    """Whether it only adds low-rank deltas to linears."""
    prefix_tokens: int
    """Positions whose keys and values it gives."""
    make_sites: Callable[[], Mapping[str, SiteWeights]]
    row_ids: NDArray[np.int32] | None = None
    """What the table points to outside of the arena."""

    @cached_property
    def sites(self) -> Mapping[str, SiteWeights]:
        """By module; made when first asked for, since kernels that read the table do not."""
        return self.make_sites()

    @cached_property
    def address(self) -> int:
        """Of the table."""
        return self.table.ctypes.data

    @property
    def max_rank(self) -> int:
        """The largest rank of any site."""
        return int(self.table[:, 2].max(initial=0))

    @classmethod
    def of(cls, sites: Mapping[str, SiteWeights], modules: Mapping[str, int]) -> AdapterWeights:
        """Of low-rank deltas and biases at linears; `modules` numbers every module of the base."""
        table = np.zeros((len(modules), len(SITE_FIELDS)), dtype=np.int64)
        for name, site in sites.items():
            line = table[modules[name]]
            if site.a is not None and site.b is not None:
                line[:3] = site.a.data_ptr(), site.b.data_ptr(), site.a.shape[0]
            if site.bias is not None:
                line[SITE_FIELDS.index("bias")] = site.bias.data_ptr()
        plain = all(site.bias is None for site in sites.values())
        return cls(table, plain, 0, lambda: sites)


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) that one adapter changes."""

    start: int
    stop: int
    weights: AdapterWeights


class LowRankKernel(Protocol):
    """Makes the function that a step calls at every module."""

    def plan(self, spans: Sequence[Span], modules: Mapping[str, int]) -> AddLowRank:
        """Prepares one step. `modules` numbers every module, as in AdapterWeights.of."""
        ...


class ReferenceLowRank:
    """Two products a span in torch, on any device."""

    def plan(self, spans: Sequence[Span], modules: Mapping[str, int]) -> AddLowRank:
        """See LowRankKernel."""

        def add(module: str, x: Tensor, y: Tensor) -> None:
            for span in spans:
                site = span.weights.sites.get(module)
                if site is not None and site.a is not None and site.b is not None:
                    rows = slice(span.start, span.stop)
                    reference.add_low_rank(y[rows], x[rows], site.a, site.b)

        return add


class NativeLowRank:
    """One call of a C kernel a module; fp32 and bf16 on the CPU."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._dtype = kernels.dtype
        self._function = kernels.low_rank

    def plan(self, spans: Sequence[Span], modules: Mapping[str, int]) -> AddLowRank:
        """See LowRankKernel."""
        count, stop = len(spans), max((span.stop for span in spans), default=0)
        bounds = np.array([(span.start, span.stop) for span in spans], dtype=np.int64)
        tables = [span.weights.table for span in spans]
        starts = np.array([table.ctypes.data for table in tables], dtype=np.int64)
        # [modules, count]: where each span's adapter has its line for the module.
        lines = np.arange(len(modules))[:, None] * (8 * len(SITE_FIELDS)) + starts
        used: list[bool] = np.any([table[:, 2] > 0 for table in tables], axis=0).tolist()

        def add(module: str, x: Tensor, y: Tensor) -> None:
            index = modules[module]
            if not used[index]:
                return
            assert stop <= x.shape[0] == y.shape[0]
            assert x.dtype == y.dtype == self._dtype
            assert x.stride(1) == y.stride(1) == 1
            failed = self._function(
                *(x.data_ptr(), x.stride(0), x.shape[1]),
                *(y.data_ptr(), y.stride(0), y.shape[1]),
                *(bounds.ctypes.data, lines.ctypes.data + index * lines.strides[0], count),
            )
            if failed:
                raise MemoryError("no scratch memory for low-rank deltas")

        # The addresses above point into these arrays, which the function keeps alive.
        add.arrays = tables  # type: ignore[attr-defined]
        return add


def low_rank_kernel(
    kernels: NativeKernels | None, device: torch.device, modules: Mapping[str, BaseModule]
) -> LowRankKernel:
    """The fastest kernel that works here. `modules` are those of the base."""
    if device.type == "cuda":
        # Imported here, since only torch for CUDA brings Triton along.
        from adaplex.model.kernels.triton.adapter_rows import TritonKernels

        return TritonKernels(modules, device)
    return ReferenceLowRank() if kernels is None else NativeLowRank(kernels)

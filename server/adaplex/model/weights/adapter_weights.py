"""AdapterWeights: an adapter in memory, as kernels read it; and which rows of a step have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.adapters.program.primitives import Activation, Reads
from adaplex.model.weights.site_table import SiteField, empty_table


@dataclass
class SiteWeights:
    """Tensors of one adapter at one module, views into packed memory; None where it has none.

    Shapes are those of ModuleProgram: a [rank, in], b [rank, out], of an embedding a [in, rank]; a
    replaced weight of a linear has zero rows up to a whole panel. For the C kernels the elements of
    b, and of a replaced weight, are in the order of their panels, whatever the shape.
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
    """int64 [row_count]: the rows of the weight that `rows` replaces."""
    activation: Activation = Activation.IDENTITY
    reads: Reads = Reads.OUTPUT
    expert_rank: int = 0
    """Rank of one expert's delta."""


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter in memory: its table, which kernels read, and its sites, which torch reads."""

    table: NDArray[np.int64]
    """[modules, SiteField]; see `site_table`."""
    plain: bool
    """True if the adapter only adds low-rank deltas to linears."""
    prefix_tokens: int
    """Positions before the prompt whose keys and values the adapter has."""
    make_sites: Callable[[], Mapping[str, SiteWeights]]
    row_ids: NDArray[np.int32] | None = None
    """Numbers to which ROW_IDS of the table points; they stay alive with it."""

    @cached_property
    def sites(self) -> Mapping[str, SiteWeights]:
        """Sites by module; made at the first use, since kernels that read the table need none."""
        return self.make_sites()

    @cached_property
    def address(self) -> int:
        """Address of the table."""
        return self.table.ctypes.data

    @property
    def max_rank(self) -> int:
        """Largest rank of any site."""
        return int(self.table[:, SiteField.RANK].max(initial=0))

    @classmethod
    def of(cls, sites: Mapping[str, SiteWeights], modules: Mapping[str, int]) -> AdapterWeights:
        """Makes weights of low-rank deltas and biases at linears; `modules` numbers every module of
        the base.
        """
        table = empty_table(len(modules))
        for name, site in sites.items():
            row = table[modules[name]]
            if site.a is not None and site.b is not None:
                row[SiteField.A], row[SiteField.B] = site.a.data_ptr(), site.b.data_ptr()
                row[SiteField.RANK] = site.a.shape[0]
            if site.bias is not None:
                row[SiteField.BIAS] = site.bias.data_ptr()
        plain = all(site.bias is None for site in sites.values())
        return cls(table, plain, 0, lambda: sites)


@dataclass(frozen=True)
class AdapterRun:
    """Neighbouring rows [start, stop) of a step, and the adapter that they have."""

    start: int
    stop: int
    weights: AdapterWeights

"""Measures StepCosts of the C decoder: its first layers, with adapters and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.engine.merge_cost_model import StepCosts
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.linear.native import NativeLinear
from adaplex.model.measure_costs import ADAPTERS, ENOUGH_BYTES, RANK, REPEATS, ROWS
from adaplex.model.weights.site_table import SiteField, empty_table

Table = NDArray[np.int64]
"""[modules, SiteField], as in AdapterWeights."""


@dataclass(frozen=True)
class TimedLayer:
    """The linears of one layer, and the numbers of their modules."""

    linears: tuple[NativeLinear, ...]
    modules: tuple[int, ...]


class TimedDecoder(Protocol):
    """A decoder whose first layers can be timed."""

    @property
    def layers(self) -> Sequence[TimedLayer]:
        """Layers, in order."""
        ...

    @property
    def modules(self) -> int:
        """Modules of the base."""
        ...

    def seconds(self, rows: int, tables: Sequence[Table | None], layers: int) -> float:
        """Returns the seconds of the first `layers` for so many tokens, of which equally many have
        each of `tables`, None for the base.
        """
        ...


def measure(decoder: TimedDecoder, kernels: NativeKernels) -> StepCosts:
    """Runs as many layers as have ENOUGH_BYTES when they are dense, and scales to all of them; less
    than half a second for a small model.
    """
    bench = _Bench(decoder, kernels)
    base = [bench.seconds(rows, None) for rows in ROWS]
    adapted = [bench.seconds(rows, bench.adapters[0]) for rows in ROWS]
    more = bench.seconds(ADAPTERS, *bench.adapters) - bench.seconds(ADAPTERS, bench.adapters[0])
    return StepCosts(
        rows=ROWS,
        base=tuple(base),
        merged=tuple(bench.seconds(rows, bench.folded) for rows in ROWS),
        low_rank=tuple(max(0.0, a - b) for a, b in zip(adapted, base, strict=True)),
        another_adapter=max(0.0, more / (ADAPTERS - 1)),
        base_takes_merged=False,
    )


class _Bench:
    """Some layers, dense copies of their linears, and adapters on these."""

    def __init__(self, decoder: TimedDecoder, kernels: NativeKernels) -> None:
        self._decoder, self._kernels = decoder, kernels
        self._alive: list[Tensor] = []
        """Tensors to which the tables point."""
        elements = sum(linear.elements for linear in decoder.layers[0].linears)
        enough = -(-ENOUGH_BYTES // (elements * kernels.dtype.itemsize))
        self._layers = decoder.layers[:enough]
        self.folded = self._folded()
        self.adapters = [self._adapter() for _ in range(ADAPTERS)]

    def seconds(self, rows: int, *tables: Table | None) -> float:
        """Returns the least seconds of all layers over so many rows, equally many with each table,
        of REPEATS measurements.
        """
        count = len(self._layers)
        least = min(self._decoder.seconds(rows, tables, count) for _ in range(REPEATS))
        return least * len(self._decoder.layers) / count

    def _folded(self) -> Table:
        """Returns the table of an adapter whose linears are all folded, dense."""
        table = empty_table(self._decoder.modules)
        for layer in self._layers:
            for number, linear in zip(layer.modules, layer.linears, strict=True):
                weight = linear.dequantize().to(self._kernels.dtype)
                panels = self._kernels.pack_dense(weight)
                table[number, SiteField.DENSE] = self._address(panels)
        return table

    def _adapter(self) -> Table:
        """Returns the table of an adapter of RANK on every linear."""
        table = empty_table(self._decoder.modules)
        for layer in self._layers:
            for number, linear in zip(layer.modules, layer.linears, strict=True):
                row = table[number]
                row[SiteField.A] = self._address(self._full(RANK * linear.in_features))
                row[SiteField.B] = self._address(self._full(RANK * linear.out_features))
                row[SiteField.RANK] = RANK
        return table

    def _full(self, elements: int) -> Tensor:
        return torch.full((elements,), 0.01, dtype=self._kernels.dtype)

    def _address(self, tensor: Tensor) -> int:
        """Keeps a tensor alive; returns its address."""
        self._alive.append(tensor)
        return tensor.data_ptr()

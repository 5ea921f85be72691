"""NativeCosts: what the C decoder takes here: its first layers, with adapters and without."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaplex.engine.merge_cost_model import StepCosts
from adaplex.model.forward.native_forward import NativeForward
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.kernels.native.structs import SITE_FIELDS
from adaplex.model.linear.native import dense_linear
from adaplex.model.measure_costs import ADAPTERS, ENOUGH_BYTES, RANK, REPEATS, ROWS

Table = NDArray[np.int64]


def measure(forward: NativeForward, kernels: NativeKernels) -> StepCosts:
    """Runs as many layers as have enough bytes when they are dense, and scales to all; less than
    half a second for a small model.
    """
    bench = _Bench(forward, kernels)
    base = [bench.seconds(rows, None) for rows in ROWS]
    adapted = [bench.seconds(rows, bench.adapters[0]) for rows in ROWS]
    more = bench.seconds(ADAPTERS, *bench.adapters) - bench.seconds(ADAPTERS, bench.adapters[0])
    return StepCosts(
        rows=ROWS,
        base=tuple(base),
        merged=tuple(bench.seconds(rows, bench.merged) for rows in ROWS),
        low_rank=tuple(max(0.0, a - b) for a, b in zip(adapted, base, strict=True)),
        another_adapter=max(0.0, more / (ADAPTERS - 1)),
        base_takes_merged=False,
    )


class _Bench:
    """Some layers, dense copies of their linears, and adapters on these."""

    def __init__(self, forward: NativeForward, kernels: NativeKernels) -> None:
        self._forward, self._kernels = forward, kernels
        self._kept: list[Tensor] = []
        """What the tables point to."""
        one = sum(b.out_features * b.in_features for b in forward.layers[0].linears)
        enough = -(-ENOUGH_BYTES // (one * kernels.dtype.itemsize))
        self._layers = forward.layers[:enough]
        self.merged = self._merged()
        self.adapters = [self._adapter() for _ in range(ADAPTERS)]

    def seconds(self, rows: int, *tables: Table | None) -> float:
        """Of all layers over so many rows, shared out evenly; the least of several times."""
        count = len(self._layers)
        least = min(self._forward.seconds(rows, tables, count) for _ in range(REPEATS))
        return least * len(self._forward.layers) / count

    def _merged(self) -> Table:
        table = self._table()
        for layer in self._layers:
            for number, linear in zip(layer.modules, layer.linears, strict=True):
                weight = linear.dequantize().to(self._kernels.dtype)
                panels = dense_linear(self._kernels, weight, None).tensors()["panels"]
                table[number, SITE_FIELDS.index("dense")] = self._keep(panels)
        return table

    def _adapter(self) -> Table:
        table = self._table()
        for layer in self._layers:
            for number, linear in zip(layer.modules, layer.linears, strict=True):
                a, b = self._full(RANK * linear.in_features), self._full(RANK * linear.out_features)
                table[number, :3] = self._keep(a), self._keep(b), RANK
        return table

    def _table(self) -> Table:
        return np.zeros((self._forward.modules, len(SITE_FIELDS)), dtype=np.int64)

    def _full(self, elements: int) -> Tensor:
        return torch.full((elements,), 0.01, dtype=self._kernels.dtype)

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

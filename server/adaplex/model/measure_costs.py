"""Measures StepCosts: how long the linears of a base take on this device, in the base's format and
dense, and how long low-rank deltas take beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adaplex.engine.merge_cost_model import StepCosts
from adaplex.model.kernels.low_rank import LowRankKernel
from adaplex.model.linear.backend import DenseLinearMaker, LinearBackend
from adaplex.model.weights.adapter_weights import AdapterRun, AdapterWeights, SiteWeights

ROWS = (1, 4, 8, 16, 32, 128)
"""Numbers of rows that are measured."""
RANK = 16
ADAPTERS = 8
"""Adapters that share the rows where the cost of one more adapter is measured."""
REPEATS = 3
ENOUGH_BYTES = 40 << 20
"""Bytes of weights that one pass reads: more than a processor's cache has, so that each weight is
read from memory, as in a step."""

Apply = Callable[[str, Tensor, Tensor], object]
"""(module, x [rows, in], y [rows, out])."""


def measure(
    linears: Mapping[str, LinearBackend],
    low_rank: LowRankKernel,
    *,
    dense: DenseLinearMaker,
    dtype: torch.dtype,
    device: torch.device,
) -> StepCosts:
    """Times as many linears, in order, as have ENOUGH_BYTES, and scales to all of them by their
    size; half a second for a small model.
    """
    bench = _Bench(linears, low_rank, dense, dtype, device)
    base, merged, deltas = zip(*(bench.seconds(rows) for rows in ROWS), strict=True)
    return StepCosts(ROWS, base, merged, deltas, bench.another_adapter())


class _Bench:
    """Linears of the base, dense copies of some of them, and adapters on these."""

    def __init__(
        self,
        linears: Mapping[str, LinearBackend],
        low_rank: LowRankKernel,
        dense: DenseLinearMaker,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._linears, self._low_rank = linears, low_rank
        self._dtype, self._device = dtype, device
        self._base = _first(linears, lambda backend: backend.nbytes)
        copied = _first(linears, lambda backend: backend.elements * dtype.itemsize)
        self._dense = {
            name: dense(linears[name].dequantize().to(dtype), linears[name].bias) for name in copied
        }
        self._modules = {name: index for index, name in enumerate(copied)}
        self._adapters = [self._adapter() for _ in range(ADAPTERS)]

    def seconds(self, rows: int) -> tuple[float, float, float]:
        """Returns the seconds of the base, of dense weights and of one adapter's deltas."""
        return (
            self._best(rows, self._base, lambda name, x, _: self._linears[name](x)),
            self._best(rows, list(self._dense), lambda name, x, _: self._dense[name](x)),
            self._deltas(rows, 1),
        )

    def another_adapter(self) -> float:
        """Returns the seconds that one more adapter adds where each has a row."""
        one, all_of_them = self._deltas(ADAPTERS, 1), self._deltas(ADAPTERS, ADAPTERS)
        return max(0.0, (all_of_them - one) / (ADAPTERS - 1))

    def _deltas(self, rows: int, adapters: int) -> float:
        each = rows // adapters
        runs = [AdapterRun(i * each, (i + 1) * each, self._adapters[i]) for i in range(adapters)]
        return self._best(rows, list(self._dense), self._low_rank.plan(runs, self._modules))

    def _best(self, rows: int, names: Sequence[str], apply: Apply) -> float:
        """Returns the least seconds of `names`, scaled to all linears."""
        shapes = {(b.out_features, b.in_features) for b in self._linears.values()}
        x = {width: self._full(rows, width) for _, width in shapes}
        y = {width: self._full(rows, width) for width, _ in shapes}
        work = [(name, x[b.in_features], y[b.out_features]) for name, b in self._named(names)]
        part = sum(b.elements for _, b in self._named(names))
        whole = sum(b.elements for b in self._linears.values())
        return min(self._time(work, apply) for _ in range(REPEATS)) * whole / part

    def _time(self, work: Sequence[tuple[str, Tensor, Tensor]], apply: Apply) -> float:
        self._synchronize()
        begun = time.perf_counter()
        for name, x, y in work:
            apply(name, x, y)
        self._synchronize()
        return time.perf_counter() - begun

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _named(self, names: Sequence[str]) -> list[tuple[str, LinearBackend]]:
        return [(name, self._linears[name]) for name in names]

    def _adapter(self) -> AdapterWeights:
        """Returns an adapter of RANK on every linear that has a dense copy."""
        sites = {
            name: SiteWeights(a=self._full(RANK, b.in_features), b=self._full(RANK, b.out_features))
            for name, b in self._named(list(self._dense))
        }
        return AdapterWeights.of(sites, self._modules)

    def _full(self, *shape: int) -> Tensor:
        return torch.full(shape, 0.01, dtype=self._dtype, device=self._device)


def _first(
    linears: Mapping[str, LinearBackend], nbytes: Callable[[LinearBackend], int]
) -> list[str]:
    """Returns the first linears that together have ENOUGH_BYTES, or all."""
    chosen: list[str] = []
    total = 0
    for name, backend in linears.items():
        if total >= ENOUGH_BYTES:
            break
        chosen.append(name)
        total += nbytes(backend)
    return chosen

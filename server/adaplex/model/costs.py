"""Costs: what the linears of a base take here, quantized and dense, and low-rank deltas beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from adaplex.engine.cost_model import StepCosts
from adaplex.model.kernels.low_rank import AdapterWeights, LowRankKernel, SiteWeights, Span
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.linear import LinearBackend
from adaplex.model.native_linear import dense_linear

ROWS = (1, 4, 8, 16, 32, 128)
RANK = 16
ADAPTERS = 8
"""How many share the rows where their number is what is measured."""
REPEATS = 3
CACHE_BYTES = 32 << 20
"""Overwritten before each measurement: in a step, no weight is still in a processor's cache."""


def measure(
    linears: Mapping[str, LinearBackend],
    low_rank: LowRankKernel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: NativeKernels | None = None,
) -> StepCosts:
    """Times one linear of each shape and multiplies; a third of a second for a small model."""
    bench = _Bench(linears, low_rank, dtype, device, kernels)
    base, merged, deltas = zip(*(bench.seconds(rows) for rows in ROWS), strict=True)
    return StepCosts(ROWS, base, merged, deltas, bench.another_adapter())


Shape = tuple[int, int]
"""[out, in]"""
Work = Callable[[Tensor, Tensor], object]
"""(x [rows, in], y [rows, out])"""


class _Bench:
    """Two linears of each shape, dense copies of them, and adapters on all of them.

    One of the two is timed, the other runs before it: the code is then at hand and the weight is
    not, as in a step.
    """

    def __init__(
        self,
        linears: Mapping[str, LinearBackend],
        low_rank: LowRankKernel,
        dtype: torch.dtype,
        device: torch.device,
        kernels: NativeKernels | None,
    ) -> None:
        self._linears: dict[Shape, list[LinearBackend]] = {}
        for backend in linears.values():
            shape = backend.out_features, backend.in_features
            self._linears.setdefault(shape, []).append(backend)
        self._dense = {
            shape: [dense_linear(kernels, b.dequantize().to(dtype), b.bias) for b in backends[:2]]
            for shape, backends in self._linears.items()
        }
        self._modules = {str(shape): index for index, shape in enumerate(self._linears)}
        self._low_rank, self._dtype, self._device = low_rank, dtype, device
        self._adapters = [self._adapter() for _ in range(2 * ADAPTERS)]
        self._cache = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, rows: int) -> tuple[float, float, float]:
        """Of the base, of dense weights and of one adapter's deltas, over so many rows."""
        return (
            self._best(rows, lambda shape: [_product(b) for b in self._linears[shape][:2]]),
            self._best(rows, lambda shape: [_product(b) for b in self._dense[shape]]),
            self._deltas(rows, 1),
        )

    def another_adapter(self) -> float:
        """What one more adapter adds where each has a row."""
        one, all_of_them = self._deltas(ADAPTERS, 1), self._deltas(ADAPTERS, ADAPTERS)
        return max(0.0, (all_of_them - one) / (ADAPTERS - 1))

    def _deltas(self, rows: int, adapters: int) -> float:
        each = rows // adapters
        bounds = [(i * each, (i + 1) * each) for i in range(adapters)]
        plans = []
        for first in (0, ADAPTERS):
            chosen = self._adapters[first : first + adapters]
            spans = [Span(*bound, weights) for bound, weights in zip(bounds, chosen, strict=True)]
            plans.append(self._low_rank.plan(spans, self._modules))
        return self._best(rows, lambda shape: [partial(add, str(shape)) for add in plans])

    def _best(self, rows: int, works: Callable[[Shape], Sequence[Work]]) -> float:
        """Least seconds of all linears; `works` gives what is timed and, last, what goes before."""
        total = 0.0
        for shape, backends in self._linears.items():
            x = self._random(rows, shape[1])
            y = torch.zeros(rows, shape[0], dtype=self._dtype, device=self._device)
            both = [partial(work, x, y) for work in works(shape)]
            timed, before = both[0], both[-1]  # one and the same where a shape is unique
            timed()
            total += len(backends) * min(self._time(timed, before) for _ in range(REPEATS))
        return total

    def _time(self, work: Callable[[], object], before: Callable[[], object]) -> float:
        self._cache.add_(1)
        before()
        self._wait()
        begun = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _adapter(self) -> AdapterWeights:
        """A random one of the rank on one linear of each shape."""
        sites = {
            str(shape): SiteWeights(a=self._random(RANK, shape[1]), b=self._random(RANK, shape[0]))
            for shape in self._linears
        }
        return AdapterWeights.of(sites, self._modules)

    def _random(self, *shape: int) -> Tensor:
        return (0.01 * torch.randn(*shape, device=self._device)).to(self._dtype)


def _product(backend: LinearBackend) -> Work:
    return lambda x, _: backend(x)

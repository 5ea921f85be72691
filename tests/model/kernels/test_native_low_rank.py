"""The C kernel of low-rank deltas against the reference in torch over adapter mixes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from adaplex.model.base.source import default_cache
from adaplex.model.kernels.low_rank import NativeLowRank, ReferenceLowRank
from adaplex.model.kernels.native.kernels import NativeKernels
from adaplex.model.weights.adapter_weights import AdapterRun, AdapterWeights, SiteWeights
from mixes import runs_of_mix

MODULES = {"narrow": 0, "wide": 1, "odd": 2, "untouched": 3}
SHAPES = {"narrow": (64, 48), "wide": (128, 320), "odd": (37, 21), "untouched": (8, 8)}
"""Module -> (in, out)."""
ROWS = 41


def native(dtype: torch.dtype) -> NativeLowRank:
    return NativeLowRank(NativeKernels(dtype, default_cache()))


def adapter(rank: int, dtype: torch.dtype, modules: tuple[str, ...]) -> AdapterWeights:
    sites = {}
    for name in modules:
        width, out = SHAPES[name]
        a, b = torch.randn(rank, width) * 0.3, torch.randn(rank, out) * 0.3
        sites[name] = SiteWeights(a.to(dtype), b.to(dtype))
    return AdapterWeights.of(sites, MODULES)


def packed(weights: AdapterWeights) -> AdapterWeights:
    """Returns the same adapter with b in panels, as the C kernels read it."""
    sites = {}
    for name, site in weights.sites.items():
        assert site.a is not None
        assert site.b is not None
        kernels = NativeKernels(site.b.dtype, default_cache())
        sites[name] = SiteWeights(site.a, kernels.pack_low_rank(site.b).view_as(site.b))
    return AdapterWeights.of(sites, MODULES)


def mixes() -> dict[str, list[int | None]]:
    """Name -> number of the adapter of each row, None for rows of the base."""
    chance = random.Random(3)
    zipf = sorted(min(int(1 / (1 - chance.random())) - 1, 7) for _ in range(ROWS - 1))
    return {
        "distinct": [*range(8), None],
        "identical": [None, *[0] * (ROWS - 1)],
        "uniform": [*sorted(i % 6 for i in range(ROWS - 1)), None],
        "skewed": [0] * 30 + [None] * 3 + [1, 2, 2, 3, 4, 5, 6, 7],
        "zipf": [*zipf, None],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", sorted(mixes()))
def test_native_equals_reference_and_leaves_base_rows_alone(dtype: torch.dtype, mix: str) -> None:
    torch.manual_seed(1)
    touched = [("narrow", "wide", "odd"), ("wide",), ("odd", "narrow"), ("narrow", "wide", "odd")]
    adapters = [adapter((1, 2, 3, 8, 16, 5, 64, 7)[i], dtype, touched[i % 4]) for i in range(8)]
    chosen = mixes()[mix]
    panels = [packed(each) for each in adapters]
    fast = native(dtype).plan(runs_of_mix(chosen, panels), MODULES)
    slow = ReferenceLowRank().plan(runs_of_mix(chosen, adapters), MODULES)
    for module, (width, out) in SHAPES.items():
        x = torch.randn(len(chosen), width).to(dtype)
        start = torch.randn(len(chosen), out).to(dtype)
        expected, got = start.clone(), start.clone()
        slow(module, x, expected)
        fast(module, x, got)
        bound = 1e-4 if dtype == torch.float32 else 6e-2
        scale = max(1.0, float(expected.float().abs().max()))
        assert (got.float() - expected.float()).abs().max() < bound * scale
        for row, name in enumerate(chosen):
            if name is None:
                assert torch.equal(got[row], start[row])
        if module != "untouched":
            assert not torch.equal(got, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", ["narrow", "wide", "odd"])
def test_a_row_has_the_same_bits_alone_and_in_any_block(dtype: torch.dtype, module: str) -> None:
    kernel, weights = native(dtype), packed(adapter(15, dtype, (module,)))
    width, out = SHAPES[module]
    x, y = torch.randn(ROWS, width).to(dtype), torch.randn(ROWS, out).to(dtype)

    def run(start: int, stop: int) -> Tensor:
        rows = y[start:stop].clone()
        run_of_rows = AdapterRun(0, stop - start, weights)
        kernel.plan([run_of_rows], MODULES)(module, x[start:stop], rows)
        return rows

    whole = run(0, ROWS)
    for start, stop in [*((i, i + 1) for i in range(ROWS)), (0, 3), (1, 8), (5, 41), (2, 7)]:
        assert torch.equal(run(start, stop), whole[start:stop])


def test_rows_may_have_gaps_between_them() -> None:
    weights = adapter(4, torch.float32, ("narrow",))
    x, y = torch.randn(9, 200)[:, 10:74], torch.randn(9, 100)[:, 20:68]
    expected = y.clone()
    ReferenceLowRank().plan([AdapterRun(2, 9, weights)], MODULES)("narrow", x, expected)
    weights = packed(weights)
    native(torch.float32).plan([AdapterRun(2, 9, weights)], MODULES)("narrow", x, y)
    assert (y - expected).abs().max() < 1e-5


def test_one_adapters_nan_stays_in_its_rows() -> None:
    good, bad = (adapter(4, torch.bfloat16, ("wide",)) for _ in range(2))
    site = bad.sites["wide"]
    assert site.a is not None
    site.a.fill_(torch.nan)
    x, y = torch.randn(6, 128).bfloat16(), torch.randn(6, 320).bfloat16()
    kernel, good, bad = native(torch.bfloat16), packed(good), packed(bad)
    kernel.plan([AdapterRun(0, 2, good), AdapterRun(2, 4, bad)], MODULES)("wide", x, y)
    assert bool(torch.isnan(y[2:4]).all())
    assert bool(torch.isfinite(y[[0, 1, 4, 5]]).all())

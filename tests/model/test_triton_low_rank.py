"""Triton's grouped low-rank deltas against the reference, over adapter mixes. On the GPU, or
interpreted on a CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adaplex.model.kernels.low_rank import (
    AdapterWeights,
    ReferenceLowRank,
    SiteWeights,
    Span,
    Tile,
    TiledLowRank,
    low_rank_kernel,
)
from adaplex.model.kernels.triton_low_rank import TritonLowRank

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"up": (576, 1536), "down": (1536, 576), "key": (576, 192), "odd": (37, 21), "no": (8, 8)}
"""Module -> (in, out)."""
MODULES = {name: index for index, name in enumerate(SHAPES)}
RANKS = (1, 3, 8, 16, 64, 17)
ROWS = 25
ALIGNED = 32
"""Elements between the starts of tensors."""


class Adapters:
    """Adapters in one flat tensor, as they lie in the arena, with NaN between them."""

    def __init__(self, dtype: torch.dtype, ranks: Sequence[int] = RANKS) -> None:
        torch.manual_seed(2)
        sites: list[dict[str, tuple[Tensor, Tensor]]] = []
        for i, rank in enumerate(ranks):
            touched = [name for name in SHAPES if name != "no" and (i % 3 or name != "key")]
            made = {
                n: (torch.randn(rank, SHAPES[n][0]), torch.randn(rank, SHAPES[n][1]))
                for n in touched
            }
            sites.append(made)
        places = [t for site in sites for pair in site.values() for t in pair]
        room = sum(-(-t.numel() // ALIGNED) * ALIGNED + ALIGNED for t in places)
        self.flat = torch.full((room,), torch.nan, dtype=dtype, device=DEVICE)
        self._next = 0
        self.weights = [self._placed(site) for site in sites]

    def _placed(self, sites: dict[str, tuple[Tensor, Tensor]]) -> AdapterWeights:
        placed = {
            name: SiteWeights(self._place(a * 0.2), self._place(b * 0.2))
            for name, (a, b) in sites.items()
        }
        return AdapterWeights.of(placed, MODULES)

    def _place(self, tensor: Tensor) -> Tensor:
        view = self.flat[self._next : self._next + tensor.numel()].view(tensor.shape)
        self._next += -(-tensor.numel() // ALIGNED) * ALIGNED + ALIGNED
        return view.copy_(tensor)


def mixes() -> dict[str, list[int | None]]:
    """Name -> adapter of each row, None for base rows; one adapter's rows are neighbours."""
    chance = random.Random(3)
    zipf = sorted(min(int(1 / (1 - chance.random())) - 1, 5) for _ in range(ROWS - 1))
    return {
        "distinct": [None, *range(6)],
        "identical": [None, *[4] * (ROWS - 1)],
        "uniform": [*sorted(i % 5 for i in range(ROWS - 1)), None],
        "skewed": [4] * 18 + [None] * 2 + [0, 1, 1, 2, 5],
        "zipf": [*zipf, None],
    }


def spans(mix: Sequence[int | None], adapters: Adapters) -> list[Span]:
    """The spans of a mix, in the order of their rows."""
    made: list[Span] = []
    for row, used in enumerate(mix):
        if used is None:
            continue
        weights = adapters.weights[used]
        if made and made[-1].stop == row and made[-1].weights is weights:
            made[-1] = Span(made[-1].start, row + 1, weights)
        else:
            made.append(Span(row, row + 1, weights))
    return made


def rows(module: str, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random x and y of a module."""
    width, out = SHAPES[module]
    x, y = torch.randn(count, width).to(dtype), torch.randn(count, out).to(dtype)
    return x.to(DEVICE), y.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", sorted(mixes()))
def test_equals_the_reference_and_leaves_base_rows_alone(mix: str, dtype: torch.dtype) -> None:
    adapters, chosen = Adapters(dtype), mixes()[mix]
    used = spans(chosen, adapters)
    fast = TritonLowRank(len(MODULES), DEVICE).plan(used, MODULES)
    slow = ReferenceLowRank().plan(used, MODULES)
    for module in SHAPES:
        x, start = rows(module, len(chosen), dtype)
        expected, got = start.clone(), start.clone()
        slow(module, x, expected)
        fast(module, x, got)
        bound = 2e-6 if dtype == torch.float32 else 2e-2
        scale = max(1.0, float(expected.float().abs().max()))
        assert (got.float() - expected.float()).abs().max() < bound * scale
        base = torch.tensor([name is None for name in chosen], device=DEVICE)
        assert torch.equal(got[base], start[base])
        assert torch.equal(got, start) == (module == "no")


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module", ["up", "odd"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(module: str, dtype: torch.dtype) -> None:
    adapters = Adapters(dtype)
    x, y = rows(module, ROWS, dtype)

    def run(start: int, stop: int, before: int = 0) -> Tensor:
        """Rows [start, stop) of one adapter after `before` rows of another."""
        got = torch.cat([y[:before], y[start:stop]])
        used = [Span(before, len(got), adapters.weights[3])]
        if before:
            used.insert(0, Span(0, before, adapters.weights[4]))
        inputs = torch.cat([x[:before], x[start:stop]])
        TritonLowRank(len(MODULES), DEVICE).plan(used, MODULES)(module, inputs, got)
        return got[before:]

    whole = run(0, ROWS)
    for start, stop, before in [(0, 1, 0), (7, 8, 0), (24, 25, 3), (3, 20, 17), (5, 25, 1)]:
        assert torch.equal(run(start, stop, before), whole[start:stop])


def test_one_adapters_nan_stays_in_its_rows() -> None:
    adapters = Adapters(torch.bfloat16)
    poisoned = adapters.weights[1].sites["up"].a
    assert poisoned is not None
    poisoned.fill_(torch.nan)
    x, y = rows("up", 6, torch.bfloat16)
    used = [Span(0, 2, adapters.weights[2]), Span(2, 4, adapters.weights[1])]
    TritonLowRank(len(MODULES), DEVICE).plan(used, MODULES)("up", x, y)
    assert bool(torch.isnan(y[2:4]).all())
    assert bool(torch.isfinite(y[[0, 1, 4, 5]]).all())


def test_rows_may_have_gaps_between_them() -> None:
    adapters = Adapters(torch.float32)
    x = torch.randn(9, 700, device=DEVICE)[:, 64:640]
    y = torch.randn(9, 300, device=DEVICE)[:, 50:242]
    expected = y.clone()
    used = [Span(2, 9, adapters.weights[1])]
    ReferenceLowRank().plan(used, MODULES)("key", x, expected)
    TritonLowRank(len(MODULES), DEVICE).plan(used, MODULES)("key", x, y)
    assert (y - expected).abs().max() < 1e-5


def test_adapters_share_few_table_rows_in_turn() -> None:
    """Six adapters over a table of two, in an order that evicts what comes back."""
    adapters = Adapters(torch.float32)
    kernel = TritonLowRank(len(MODULES), DEVICE, slots=2)
    for pair in [(0, 1), (2, 1), (0, 3), (3, 4), (5, 3), (1, 0)]:
        used = [Span(i, i + 1, adapters.weights[which]) for i, which in enumerate(pair)]
        x, y = rows("odd", 2, torch.float32)
        expected = y.clone()
        ReferenceLowRank().plan(used, MODULES)("odd", x, expected)
        kernel.plan(used, MODULES)("odd", x, y)
        assert (y - expected).abs().max() < 1e-5


def test_one_adder_serves_whatever_its_tiles_say() -> None:
    """The same call after the tiles, the table and the arena's bytes were changed in place."""
    adapters = Adapters(torch.float32)
    kernel = TritonLowRank(len(MODULES), DEVICE, slots=3)
    tiles = torch.zeros(3, 8, dtype=torch.int64, device=DEVICE)
    adder = kernel.adder(tiles, MODULES, max_rank=64)

    def check(mix: list[int | None]) -> None:
        used = spans(mix, adapters)
        made = kernel.tiles(used)
        tiles.copy_(torch.tensor([*made, *[Tile.none()] * (8 - len(made))]).T)
        x, y = rows("down", 8, torch.float32)
        expected = y.clone()
        ReferenceLowRank().plan(used, MODULES)("down", x, expected)
        adder("down", x, y)
        assert (y - expected).abs().max() < 1e-4

    check([0, None, 1, 1, 1, 2, None, None])
    check([None] * 8)
    check([5] * 8)
    check([4, 3, 3, None, None, None, None, None])
    adapters.flat.nan_to_num_(0.3).mul_(-0.5)
    check([4, 3, 3, None, None, None, None, None])


def test_cuda_devices_get_triton() -> None:
    made = low_rank_kernel(None, DEVICE, modules=2)
    assert isinstance(made, TritonLowRank) == isinstance(made, TiledLowRank)
    assert isinstance(made, TritonLowRank) == (DEVICE.type == "cuda")

"""Triton's grouped low-rank deltas against the reference, over adapter mixes. On the GPU, or
interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.adapters.triton_rows import TritonKernels
from adaplex.model.kernels.low_rank import ReferenceLowRank
from adaplex.model.linear.dense import DenseLinear
from adaplex.model.select import adapter_kernels
from adaplex.model.step.launch_plan import LaunchPlan
from adaplex.model.step.tiles import Tile
from adaplex.model.weights.adapter_weights import AdapterRun, AdapterWeights, SiteWeights
from mixes import MIXES, ROWS, runs_of_mix

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"up": (576, 1536), "down": (1536, 576), "key": (576, 192), "odd": (37, 21), "no": (8, 8)}
"""Module -> (in, out)."""
MODULES = {name: index for index, name in enumerate(SHAPES)}
LINEARS = {name: BaseModule(name, "linear", *shape) for name, shape in SHAPES.items()}
RANKS = (1, 3, 8, 16, 64, 17)
ALIGNED = 32
"""Elements between the starts of tensors."""
BACKEND = DenseLinear(torch.zeros(8, 8), None)
"""A backend that these tests do not call."""


class Adapters:
    """Adapters in one flat tensor, as in the arena, with NaN between them."""

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


def spans(mix: Sequence[int | None], adapters: Adapters) -> list[AdapterRun]:
    """The spans of a mix, in the order of their rows."""
    return runs_of_mix(mix, adapters.weights)


def rows(module: str, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random x and y of a module."""
    width, out = SHAPES[module]
    x, y = torch.randn(count, width).to(dtype), torch.randn(count, out).to(dtype)
    return x.to(DEVICE), y.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", sorted(MIXES))
def test_equals_the_reference_and_leaves_base_rows_alone(mix: str, dtype: torch.dtype) -> None:
    adapters, chosen = Adapters(dtype), MIXES[mix]
    used = spans(chosen, adapters)
    fast = TritonKernels(LINEARS, DEVICE).plan(used, MODULES)
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
        used = [AdapterRun(before, len(got), adapters.weights[3])]
        if before:
            used.insert(0, AdapterRun(0, before, adapters.weights[4]))
        inputs = torch.cat([x[:before], x[start:stop]])
        TritonKernels(LINEARS, DEVICE).plan(used, MODULES)(module, inputs, got)
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
    used = [AdapterRun(0, 2, adapters.weights[2]), AdapterRun(2, 4, adapters.weights[1])]
    TritonKernels(LINEARS, DEVICE).plan(used, MODULES)("up", x, y)
    assert bool(torch.isnan(y[2:4]).all())
    assert bool(torch.isfinite(y[[0, 1, 4, 5]]).all())


def test_rows_may_have_gaps_between_them() -> None:
    adapters = Adapters(torch.float32)
    x = torch.randn(9, 700, device=DEVICE)[:, 64:640]
    y = torch.randn(9, 300, device=DEVICE)[:, 50:242]
    expected = y.clone()
    used = [AdapterRun(2, 9, adapters.weights[1])]
    ReferenceLowRank().plan(used, MODULES)("key", x, expected)
    # The base has one more module than the adapters' tables, as when costs are measured.
    modules = {**LINEARS, "another": BaseModule("another", "linear", 8, 8)}
    TritonKernels(modules, DEVICE).plan(used, MODULES)("key", x, y)
    assert (y - expected).abs().max() < 1e-5


def test_adapters_share_few_table_rows_in_turn() -> None:
    """Six adapters in a table of two, in an order that evicts adapters which are used again."""
    adapters = Adapters(torch.float32)
    kernel = TritonKernels(LINEARS, DEVICE, slots=2)
    for pair in [(0, 1), (2, 1), (0, 3), (3, 4), (5, 3), (1, 0)]:
        used = [AdapterRun(i, i + 1, adapters.weights[which]) for i, which in enumerate(pair)]
        x, y = rows("odd", 2, torch.float32)
        expected = y.clone()
        ReferenceLowRank().plan(used, MODULES)("odd", x, expected)
        kernel.plan(used, MODULES)("odd", x, y)
        assert (y - expected).abs().max() < 1e-5


def test_another_adapter_of_the_same_identity_is_another() -> None:
    adapters = Adapters(torch.float32)
    kernel = TritonKernels(LINEARS, DEVICE)
    kernel.tiles([AdapterRun(0, 2, adapters.weights[1])])
    known = kernel._table._resident
    known[id(adapters.weights[2])] = known.pop(id(adapters.weights[1]))
    x, y = rows("odd", 2, torch.float32)
    expected, used = y.clone(), [AdapterRun(0, 2, adapters.weights[2])]
    ReferenceLowRank().plan(used, MODULES)("odd", x, expected)
    kernel.plan(used, MODULES)("odd", x, y)
    assert (y - expected).abs().max() < 1e-5


def test_one_step_serves_whatever_its_tiles_say() -> None:
    """Repeats a call after the tiles, the table and the arena's bytes were changed in place."""
    adapters = Adapters(torch.float32)
    kernel = TritonKernels(LINEARS, DEVICE, slots=3)
    tiles = torch.zeros(3, 8, dtype=torch.int64, device=DEVICE)
    launches = LaunchPlan.of(adapters.weights[1].table)
    y = torch.zeros(8, SHAPES["down"][1], device=DEVICE)
    made = kernel.rows(tiles, launches, max_rank=64, product=lambda *_: y)

    def check(mix: list[int | None]) -> None:
        used = spans(mix, adapters)
        found = kernel.tiles(used)
        assert kernel.launches(used) in launches
        tiles.copy_(torch.tensor([*found, *[Tile.none()] * (8 - len(found))]).T)
        x, start = rows("down", 8, torch.float32)
        expected = start.clone()
        ReferenceLowRank().plan(used, MODULES)("down", x, expected)
        y.copy_(start)
        assert made.linear("down", BACKEND, x) is y
        assert (y - expected).abs().max() < 1e-4

    check([0, None, 1, 1, 1, 2, None, None])
    check([None] * 8)
    check([5] * 8)
    check([4, 3, 3, None, None, None, None, None])
    adapters.flat.nan_to_num_(0.3).mul_(-0.5)
    check([4, 3, 3, None, None, None, None, None])


def test_cuda_devices_get_triton() -> None:
    made = adapter_kernels(DEVICE, LINEARS)
    assert isinstance(made, TritonKernels) == (DEVICE.type == "cuda")
    assert (made is None) == (DEVICE.type != "cuda")

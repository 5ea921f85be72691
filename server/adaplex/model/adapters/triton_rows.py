"""TritonKernels: the changes of adapters to their rows, in Triton, for all rows at once.

A kernel is launched only at modules that some adapter of the step changes; each adapter's changes
are read on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adaplex.adapters.program.base_spec import BaseModule
from adaplex.model.adapters.resident_table import ResidentTable
from adaplex.model.adapters.torch_rows import table_scale, with_weight
from adaplex.model.kernels.low_rank import AddLowRank
from adaplex.model.kernels.triton import embedding as triton_embedding
from adaplex.model.kernels.triton import low_rank as triton_low_rank
from adaplex.model.kernels.triton import replaced as triton_replaced
from adaplex.model.kernels.triton.site import SiteArguments
from adaplex.model.linear.backend import LinearBackend
from adaplex.model.step.launch_plan import Launch, LaunchPlan
from adaplex.model.step.tiles import ModuleProduct, Tile, base_product
from adaplex.model.tensors import int64_tensor
from adaplex.model.weights.adapter_weights import AdapterRun


class TritonKernels:
    """AdapterKernels for CUDA devices; they run on the CPU if TRITON_INTERPRET=1."""

    def __init__(
        self, modules: Mapping[str, BaseModule], device: torch.device, *, slots: int = 1024
    ) -> None:
        """`modules` are all of the base's; `slots` limits the different adapters of one step."""
        self._modules = modules
        self._table = ResidentTable(modules, device, slots=slots)

    def plan(self, runs: Sequence[AdapterRun], modules: Mapping[str, int]) -> AddLowRank:
        """See LowRankKernel. The adapters must have no other changes."""
        assert all(run.weights.plain for run in runs)
        tiles = int64_tensor(self.tiles(runs), self._table.device).T.contiguous()
        launches = self.launches(runs)
        max_rank = max((run.weights.max_rank for run in runs), default=0)

        def add(module: str, x: Tensor, y: Tensor) -> None:
            if Launch.NARROW in launches.at(modules[module]):
                site = self._table.site_arguments(modules[module], tiles)
                parts = triton_low_rank.shrink(site, x, max_rank=max_rank)
                triton_low_rank.expand(site, parts, y)

        return add

    def tiles(self, runs: Sequence[AdapterRun]) -> list[Tile]:
        """See AdapterKernels."""
        return self._table.tiles(runs)

    def launches(self, runs: Sequence[AdapterRun]) -> LaunchPlan:
        """See AdapterKernels."""
        return self._table.launches(runs)

    def rows(
        self,
        tiles: Tensor,
        launches: LaunchPlan,
        *,
        max_rank: int,
        virtual: Tensor | None = None,
        product: ModuleProduct = base_product,
    ) -> TritonRows:
        """See AdapterKernels."""
        return TritonRows(self._modules, self._table, tiles, launches, max_rank, virtual, product)


class TritonRows:
    """AdapterRows in Triton; see AdapterKernels.rows."""

    any = True

    def __init__(
        self,
        modules: Mapping[str, BaseModule],
        table: ResidentTable,
        tiles: Tensor,
        launches: LaunchPlan,
        max_rank: int,
        virtual: Tensor | None,
        product: ModuleProduct,
    ) -> None:
        self._modules, self._table, self._product = modules, table, product
        self._tiles, self._launches = tiles, launches
        self._max_rank, self._virtual = max_rank, virtual

    def linear(self, name: str, backend: LinearBackend, x: Tensor) -> Tensor:
        """See AdapterRows."""
        launches, site = self._at(name)
        if Launch.INPUT in launches:
            x = triton_replaced.scaled(site, x)
        y = self._product(name, backend, x)
        if Launch.WEIGHT in launches:
            triton_replaced.replace_product(site, x, backend.bias, y)
        if Launch.ROWS in launches:
            triton_replaced.replace_rows(site, x, backend.bias, y)
        if Launch.OUTPUT in launches:
            parts = triton_low_rank.no_parts(x)
            if Launch.NARROW in launches:
                parts = triton_low_rank.shrink(site, x, max_rank=self._max_rank)
            triton_low_rank.expand(site, parts, y)
        return y

    def norm(self, name: str, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        """See AdapterRows."""
        launches, site = self._at(name)
        if Launch.WEIGHT in launches:
            own = norm.get_parameter("weight")
            weights, replaced = triton_embedding.row_weights(site, own, len(x))
            replaced = replaced.view(-1, *[1] * (y.dim() - 1))
            y.copy_(torch.where(replaced, normed(norm, weights, x), y))
        if Launch.OUTPUT in launches:
            for part in (y,) if y.dim() == 2 else y.unbind(1):
                triton_low_rank.expand(site, triton_low_rank.no_parts(part), part)

    def embedding(self, name: str, embedding: nn.Module, ids: Tensor, y: Tensor) -> None:
        """See AdapterRows."""
        launches, site = self._at(name)
        if not launches:
            return
        if self._virtual is not None:
            ids = torch.where(self._virtual < 0, ids, -1 - self._virtual)
        triton_embedding.embed(site, ids, y, table_scale(embedding, y))

    def block(self, name: str, x: Tensor, residual: Tensor, y: Tensor) -> None:
        """See AdapterRows."""
        launches, site = self._at(name)
        if Launch.NARROW in launches:
            around = (x, residual)
            parts = triton_low_rank.shrink(site, y, max_rank=self._max_rank, around=around)
            triton_low_rank.expand(site, parts, y, block=True)

    def expert(self, name: str, expert: int, rows: Tensor, x: Tensor, y: Tensor) -> None:
        """See AdapterRows. Neighbouring rows of an expert may have different adapters, so each row
        is a tile.
        """
        if Launch.NARROW in self._at(name)[0]:
            slots, starts, counts = self._tiles
            mine = (rows[:, None] >= starts) & (rows[:, None] < starts + counts)
            slot = torch.where(mine, slots, -1).amax(1)
            each = torch.arange(len(rows), device=rows.device)
            tiles = torch.stack([slot, each, torch.ones_like(slot)])
            site = self._table.site_arguments(self._table.numbers[name], tiles)
            shares = self._modules[name].experts
            parts = triton_low_rank.shrink(
                site, x, max_rank=self._max_rank, share=expert, shares=shares
            )
            triton_low_rank.expand(site, parts, y, share=expert, shares=shares)

    def _at(self, name: str) -> tuple[frozenset[Launch], SiteArguments]:
        """Returns the launches at a module and the first arguments of its kernels."""
        number = self._table.numbers[name]
        return self._launches.at(number), self._table.site_arguments(number, self._tiles)


def normed(norm: nn.Module, weights: Tensor, x: Tensor) -> Tensor:
    """weights [rows, features], x [rows, .., features] -> the norm of x with a weight for each row;
    any kind of norm.
    """

    def row(weight: Tensor, x: Tensor) -> Tensor:
        y: Tensor = with_weight(norm, weight).forward(x)
        return y

    made: Tensor = torch.vmap(row)(weights, x)
    return made

"""Grouped low-rank deltas in Triton, over the places and ranks of what lies in the arena.

A step's rows are cut into tiles of up to TILE rows of one adapter, whether they decode or belong to
a prompt. The input is cut into splits of a fixed size: `_shrink` writes the partial a x of each,
`_expand` adds them in order and multiplies by b. No atomics, and a row's arithmetic depends on the
row and its adapter alone.

What differs between steps lies in tensors on the device: the table of resident adapters, which
keeps its place while they come and go, and the tiles. So a captured launch can be replayed with
other adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.adapters.limits import ALIGNMENT
from adaplex.model.kernels.low_rank import AdapterWeights, AddLowRank, Span, Tile
from adaplex.model.kernels.triton_dot import LEAST, dot_type

TILE = LEAST
"""Rows of one adapter in one product."""
SPLIT = 1024
"""Inputs that one program of `_shrink` sums, at most."""
BLOCK_IN = 128
"""Inputs in one product; divides SPLIT."""
BLOCK_OUT = 128
"""Outputs of one program of `_expand`."""


class TritonLowRank:
    """The kernel of CUDA devices; runs on the CPU under TRITON_INTERPRET=1."""

    def __init__(self, modules: int, device: torch.device, *, slots: int = 1024) -> None:
        """`modules` counts those of the base; `slots` bounds the different adapters of a step."""
        self._table = torch.zeros(slots, modules, 3, dtype=torch.int64, device=device)
        """[slots, modules, 3]: a, b and rank of AdapterWeights.table, of the adapters used last."""
        self._slots: dict[int, tuple[int, AdapterWeights]] = {}
        """Table rows by identity, least recently used first. Holding the weights keeps an identity
        from being given to others."""

    def plan(self, spans: Sequence[Span], modules: Mapping[str, int]) -> AddLowRank:
        """See LowRankKernel."""
        used = {i for span in spans for i in span.weights.table[:, 2].nonzero()[0].tolist()}
        tiles = torch.tensor(self.tiles(spans), device=self._table.device).T.contiguous()
        add_all = self.adder(tiles, modules, max_rank=max(span.weights.max_rank for span in spans))

        def add(module: str, x: Tensor, y: Tensor) -> None:
            if modules[module] in used:
                add_all(module, x, y)

        return add

    def tiles(self, spans: Sequence[Span]) -> list[Tile]:
        """See TiledLowRank."""
        found = self._rows_of({id(span.weights): span.weights for span in spans})
        return [
            Tile(found[id(span.weights)], start, min(TILE, span.stop - start))
            for span in spans
            for start in range(span.start, span.stop, TILE)
        ]

    def adder(self, tiles: Tensor, modules: Mapping[str, int], *, max_rank: int) -> AddLowRank:
        """See TiledLowRank."""

        def add(module: str, x: Tensor, y: Tensor) -> None:
            assert x.stride(1) == y.stride(1) == 1
            assert x.dtype == y.dtype
            rows, width, count = x.shape[0], x.shape[1], tiles.shape[1]
            splits = triton.cdiv(width, SPLIT)
            split = min(SPLIT, triton.cdiv(width, BLOCK_IN) * BLOCK_IN)
            parts = x.new_empty(splits, rows, max_rank, dtype=torch.float32)
            shared = (self._table, self._table.stride(0), modules[module], tiles)
            types = {"TILE": TILE, "RANKS": LEAST, "ALIGNMENT": ALIGNMENT, "DOT": dot_type(x)}
            _shrink[(count, splits)](
                *(*shared, x, x.stride(0), width, parts, rows, max_rank),
                *(split, BLOCK_IN),
                **types,
            )
            _expand[(count, triton.cdiv(y.shape[1], BLOCK_OUT))](
                *(*shared, y, y.stride(0), y.shape[1], parts, rows, max_rank),
                *(splits, BLOCK_OUT),
                **types,
            )

        return add

    def _rows_of(self, wanted: Mapping[int, AdapterWeights]) -> dict[int, int]:
        """Identity -> table row; adapters that no longer are wanted make room for new ones."""
        slots, table = self._slots, self._table
        assert len(wanted) <= len(table)
        for key in wanted.keys() & slots.keys():
            slots[key] = slots.pop(key)
        for key in wanted.keys() - slots.keys():
            # Kernels read vectors of this alignment.
            assert not (wanted[key].table[:, :2] % ALIGNMENT).any()
            row = len(slots) if len(slots) < len(table) else slots.pop(next(iter(slots)))[0]
            table[row].copy_(torch.from_numpy(wanted[key].table[:, :3]))
            slots[key] = row, wanted[key]
        return {key: slots[key][0] for key in wanted}


@triton.jit(do_not_specialize=["module", "rows", "max_rank"])
def _shrink(
    table,
    table_row,
    module,
    tiles,
    x,
    x_row,
    width,
    parts,
    rows,
    max_rank,
    SPLIT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    DOT: tl.constexpr,
):
    """parts [splits, rows, max_rank] = a x over one split of the inputs, for one tile."""
    tile, count = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(tiles + tile)
    if slot >= 0:
        site = table + slot * table_row + module * 3
        a = tl.load(site).to(tl.pointer_type(x.dtype.element_ty))
        a, rank = tl.multiple_of(a, ALIGNMENT), tl.load(site + 2)
        row = tl.load(tiles + count + tile) + tl.arange(0, TILE)
        live = tl.arange(0, TILE) < tl.load(tiles + 2 * count + tile)
        split = tl.program_id(1)
        first = 0
        while first < rank:
            r = first + tl.arange(0, RANKS)
            sums = tl.zeros((TILE, RANKS), tl.float32)
            for offset in range(0, SPLIT, BLOCK_IN):
                i = split * SPLIT + offset + tl.arange(0, BLOCK_IN)
                inside = i < width
                xs = x + row[:, None] * x_row + i[None, :]
                a_s = a + r[None, :] * width + i[:, None]
                xs = tl.load(xs, mask=live[:, None] & inside[None, :], other=0.0)
                a_s = tl.load(a_s, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
                sums = tl.dot(xs.to(DOT), a_s.to(DOT), sums, input_precision="ieee")
            to = parts + (split * rows + row[:, None]) * max_rank + r[None, :]
            tl.store(to, sums, mask=live[:, None] & (r < rank)[None, :])
            first += RANKS


@triton.jit(do_not_specialize=["module", "rows", "max_rank"])
def _expand(
    table,
    table_row,
    module,
    tiles,
    y,
    y_row,
    width,
    parts,
    rows,
    max_rank,
    SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    DOT: tl.constexpr,
):
    """y += b (sum of parts), for one tile and BLOCK_OUT outputs.

    The sum is rounded to y's type before the product, as in the reference.
    """
    tile, count = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(tiles + tile)
    if slot >= 0:
        site = table + slot * table_row + module * 3
        b = tl.load(site + 1).to(tl.pointer_type(y.dtype.element_ty))
        b, rank = tl.multiple_of(b, ALIGNMENT), tl.load(site + 2)
        row = tl.load(tiles + count + tile) + tl.arange(0, TILE)
        live = tl.arange(0, TILE) < tl.load(tiles + 2 * count + tile)
        o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        if rank > 0:
            delta = tl.zeros((TILE, BLOCK_OUT), tl.float32)
            first = 0
            while first < rank:
                r = first + tl.arange(0, RANKS)
                wanted = live[:, None] & (r < rank)[None, :]
                h = tl.zeros((TILE, RANKS), tl.float32)
                for split in range(0, SPLITS):
                    part = parts + (split * rows + row[:, None]) * max_rank + r[None, :]
                    h += tl.load(part, mask=wanted, other=0.0)
                inside = (r < rank)[:, None] & (o < width)[None, :]
                bs = tl.load(b + r[:, None] * width + o[None, :], mask=inside, other=0.0)
                h = h.to(y.dtype.element_ty).to(DOT)
                delta = tl.dot(h, bs.to(DOT), delta, input_precision="ieee")
                first += RANKS
            ys = y + row[:, None] * y_row + o[None, :]
            inside = live[:, None] & (o < width)[None, :]
            old = tl.load(ys, mask=inside, other=0.0).to(tl.float32)
            tl.store(ys, (old + delta).to(y.dtype.element_ty), mask=inside)

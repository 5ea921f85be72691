"""Adapters' changes to embeddings and to the weights of norms, in Triton: look-ups by row. See
`site` for slots and tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.model.kernels.triton.dot import dot_type
from adaplex.model.kernels.triton.site import (
    FIELDS,
    RANKS,
    TILE,
    SiteArguments,
    elements,
    tile_rows,
)
from adaplex.model.weights.site_table import SITE_FIELDS

BLOCK = 128
"""Features of one program."""

A, B, RANK, DENSE, ROWS, ROW_IDS, ROW_COUNT, VIRTUAL = (
    tl.constexpr(SITE_FIELDS.index(name))
    for name in ("a", "b", "rank", "dense", "rows", "row_ids", "row_count", "virtual")
)


def embed(site: SiteArguments, ids: Tensor, y: Tensor, factor: Tensor | None) -> None:
    """ids [rows] int64, -1 - i for virtual token i; y [rows, hidden]: the base's embeddings; factor
    [] of y's type: the base's factor of its table, None for 1.

    Replaces y of the rows of every tile by the adapter's embedding of their ids, in place.
    """
    assert y.stride(1) == ids.stride(0) == 1
    grid = site.tiles.shape[1], triton.cdiv(y.shape[1], BLOCK)
    scale = y if factor is None else factor
    rows = y, y.stride(0), y.shape[1]
    _embed[grid](*site, ids, *rows, scale, factor is not None, BLOCK, dot_type(y))


def row_weights(site: SiteArguments, own: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """own [features] of the compute dtype: the base's weight of a norm -> the weight of each row
    [rows, features], and bool [rows, 1] whether it is its adapter's.
    """
    weights = own.repeat(rows, 1)  # a copy even of a single row
    replaced = torch.zeros(rows, 1, dtype=torch.bool, device=own.device)
    grid = site.tiles.shape[1], triton.cdiv(len(own), BLOCK)
    _weights[grid](*site, weights, replaced, len(own), BLOCK)
    return weights, replaced


@triton.jit(do_not_specialize=["module"], do_not_specialize_on_alignment=["tiles"])
def _embed(
    table,
    table_row,
    module,
    tiles,
    ids,
    y,
    y_row,
    width,
    factor,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """table [slots, modules, FIELDS] int64, slots table_row apart; tiles [3, tiles] int64; ids
    [rows] int64; y [rows, width], rows y_row apart; factor [] (read if SCALED).

    y = y + b a[id], where the adapter's table or replaced row replaces y if it has one for the id;
    for a negative id the adapter's virtual token. For one tile and BLOCK features. Grid: (tiles,
    blocks of features).
    """
    slot = tl.load(tiles + tl.program_id(0))
    if slot >= 0:
        site = table + slot * table_row + module * FIELDS
        row, live = tile_rows(tiles)
        token = tl.load(ids + row, mask=live, other=0)
        real = live & (token >= 0)
        o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (o < width)[None, :]
        ys = y + row[:, None] * y_row + o[None, :]
        new = tl.load(ys, mask=live[:, None] & inside, other=0.0).to(tl.float32)
        times = 1.0
        if SCALED:
            times = tl.load(factor).to(tl.float32)

        mine = (real & (tl.load(site + DENSE) != 0))[:, None]
        dense = elements(site, DENSE, y) + token[:, None] * width + o[None, :]
        dense = tl.load(dense, mask=mine & inside, other=0.0).to(tl.float32)
        new = tl.where(mine, dense * times, new)

        # place [TILE]: index of each token among the replaced rows, -1 if it is not there.
        place = tl.full((TILE,), -1, tl.int32)
        row_ids = tl.load(site + ROW_IDS).to(tl.pointer_type(tl.int32))
        count = tl.load(site + ROW_COUNT)
        first = 0
        while first < count:
            k = first + tl.arange(0, RANKS)
            found = tl.load(row_ids + k, mask=k < count, other=-1)[None, :] == token[:, None]
            place = tl.maximum(place, tl.max(tl.where(found, k[None, :], -1), 1))
            first += RANKS
        mine = (real & (place >= 0))[:, None]
        others = elements(site, ROWS, y) + place[:, None].to(tl.int64) * width + o[None, :]
        others = tl.load(others, mask=mine & inside, other=0.0).to(tl.float32)
        new = tl.where(mine, others * times, new)

        rank = tl.load(site + RANK)
        a, b = elements(site, A, y), elements(site, B, y)
        delta = tl.zeros((TILE, BLOCK), tl.float32)
        first = 0
        while first < rank:
            r = first + tl.arange(0, RANKS)
            known = (r < rank)[None, :]
            h = a + token[:, None] * rank + r[None, :]
            h = tl.load(h, mask=real[:, None] & known, other=0.0)
            bs = b + r[:, None] * width + o[None, :]
            bs = tl.load(bs, mask=(r < rank)[:, None] & inside, other=0.0)
            delta = tl.dot(h.to(DOT), bs.to(DOT), delta, input_precision="ieee")
            first += RANKS
        new += delta * times

        mine = (live & (token < 0))[:, None]
        virtual = elements(site, VIRTUAL, y) + (-1 - token)[:, None] * width + o[None, :]
        virtual = tl.load(virtual, mask=mine & inside, other=0.0).to(tl.float32)
        new = tl.where(mine, virtual, new)
        tl.store(ys, new.to(y.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit(do_not_specialize=["module"], do_not_specialize_on_alignment=["tiles"])
def _weights(table, table_row, module, tiles, weights, replaced, width, BLOCK: tl.constexpr):
    """table [slots, modules, FIELDS] int64, slots table_row apart; tiles [3, tiles] int64; weights
    [rows, width]; replaced [rows] bool.

    weights = the adapter's weight of the norm and replaced = true, if it has one; for one tile and
    BLOCK features. Grid: (tiles, blocks of features).
    """
    slot = tl.load(tiles + tl.program_id(0))
    if slot >= 0:
        site = table + slot * table_row + module * FIELDS
        if tl.load(site + DENSE) != 0:
            row, live = tile_rows(tiles)
            o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            weight = tl.load(elements(site, DENSE, weights) + o, mask=o < width, other=0.0)
            to = weights + row[:, None] * width + o[None, :]
            wanted = live[:, None] & (o < width)[None, :]
            tl.store(to, tl.broadcast_to(weight[None, :], (TILE, BLOCK)), mask=wanted)
            tl.store(replaced + row, live, mask=live)

"""Adapters' changes to a linear other than low-rank deltas, in Triton: scaled inputs, a replaced
weight, replaced rows of it. See `site` for slots and tiles.

Every program writes its own elements, and sums over inputs have one order, so the arithmetic of a
row depends on the row and its adapter alone.
"""

from __future__ import annotations

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
    vector,
)
from adaplex.model.weights.site_table import SITE_FIELDS

BLOCK_IN = 128
"""Inputs of one product."""
BLOCK_OUT = 64
"""Outputs of one program."""
SEARCHERS = 16
"""Programs that divide the replaced rows of a tile among them."""

DENSE, INPUT_SCALE, ROWS, ROW_IDS, ROW_COUNT = (
    tl.constexpr(SITE_FIELDS.index(name))
    for name in ("dense", "input_scale", "rows", "row_ids", "row_count")
)


def scaled(site: SiteArguments, x: Tensor) -> Tensor:
    """x [rows, in] -> a copy in which the rows of every tile are scaled by input_scale."""
    x = x.contiguous().clone()
    grid = site.tiles.shape[1], triton.cdiv(x.shape[1], BLOCK_IN)
    _scale[grid](*site, x, x.stride(0), x.shape[1], BLOCK_IN)
    return x


def replace_product(site: SiteArguments, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x [rows, in]; bias [out] of the base; y [rows, out].

    y = W x + bias for every tile whose adapter has its own W [out, in], in place.
    """
    assert x.stride(1) == y.stride(1) == 1
    grid = site.tiles.shape[1], triton.cdiv(y.shape[1], BLOCK_OUT)
    _product[grid](
        *site,
        x,
        x.stride(0),
        y,
        y.stride(0),
        y.shape[1],
        y if bias is None else bias,
        bias is not None,
        x.shape[1],
        BLOCK_IN,
        BLOCK_OUT,
        dot_type(x),
    )


def replace_rows(site: SiteArguments, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x [rows, in]; bias [out] of the base; y [rows, out].

    y[:, ids] = W[ids] x + bias[ids] for every tile whose adapter replaces the rows `ids` of W.
    """
    assert x.stride(1) == y.stride(1) == 1
    _rows[(site.tiles.shape[1], SEARCHERS)](
        *site,
        x,
        x.stride(0),
        y,
        y.stride(0),
        y if bias is None else bias,
        bias is not None,
        x.shape[1],
        BLOCK_IN,
        dot_type(x),
    )


@triton.jit(do_not_specialize=["module"], do_not_specialize_on_alignment=["tiles"])
def _scale(table, table_row, module, tiles, x, x_row, width, BLOCK_IN: tl.constexpr):
    """table [slots, modules, FIELDS] int64, slots table_row apart; tiles [3, tiles] int64; x [rows,
    width], rows x_row apart.

    x *= input_scale, for one tile and BLOCK_IN inputs. Grid: (tiles, blocks of inputs).
    """
    slot = tl.load(tiles + tl.program_id(0))
    if slot >= 0:
        site = table + slot * table_row + module * FIELDS
        if tl.load(site + INPUT_SCALE) != 0:
            row, live = tile_rows(tiles)
            i = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
            xs = x + row[:, None] * x_row + i[None, :]
            wanted = live[:, None] & (i < width)[None, :]
            new = tl.load(xs, mask=wanted, other=0.0).to(tl.float32)
            new *= vector(site, INPUT_SCALE, x, i, width, 1.0)[None, :]
            tl.store(xs, new.to(x.dtype.element_ty), mask=wanted)


@triton.jit
def _summed(
    sums,
    x,
    x_row,
    row,
    live,
    weight,
    line,
    inside,
    INPUTS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
):
    """sums [TILE, lines] fp32; x: pointer to [rows, INPUTS], rows x_row apart; row [TILE], live
    [TILE] bool; weight: pointer to W [.., INPUTS]; line [lines], inside [lines] bool -> sums +
    x[row] W[line]'.
    """
    for offset in range(0, INPUTS, BLOCK_IN):
        i = offset + tl.arange(0, BLOCK_IN)
        wanted = live[:, None] & (i < INPUTS)[None, :]
        xs = tl.load(x + row[:, None] * x_row + i[None, :], mask=wanted, other=0.0)
        wanted = inside[None, :] & (i < INPUTS)[:, None]
        ws = tl.load(weight + line[None, :] * INPUTS + i[:, None], mask=wanted, other=0.0)
        sums = tl.dot(xs.to(DOT), ws.to(DOT), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["module"], do_not_specialize_on_alignment=["tiles"])
def _product(
    table,
    table_row,
    module,
    tiles,
    x,
    x_row,
    y,
    y_row,
    width,
    bias,
    BIAS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """table [slots, modules, FIELDS] int64, slots table_row apart; tiles [3, tiles] int64; x [rows,
    INPUTS], rows x_row apart; y [rows, width], rows y_row apart; bias [width].

    y = W x (+ bias if BIAS) by the adapter's W [width, INPUTS], if it has one; for one tile and
    BLOCK_OUT outputs. Grid: (tiles, blocks of outputs).
    """
    slot = tl.load(tiles + tl.program_id(0))
    if slot >= 0:
        site = table + slot * table_row + module * FIELDS
        if tl.load(site + DENSE) != 0:
            row, live = tile_rows(tiles)
            o = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            inside = o < width
            weight = elements(site, DENSE, x)
            sums = tl.zeros((TILE, BLOCK_OUT), tl.float32)
            sums = _summed(sums, x, x_row, row, live, weight, o, inside, INPUTS, BLOCK_IN, DOT)
            if BIAS:
                sums += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[None, :]
            ys = y + row[:, None] * y_row + o[None, :]
            tl.store(ys, sums.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["module"], do_not_specialize_on_alignment=["tiles"])
def _rows(
    table,
    table_row,
    module,
    tiles,
    x,
    x_row,
    y,
    y_row,
    bias,
    BIAS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
):
    """table [slots, modules, FIELDS] int64, slots table_row apart; tiles [3, tiles] int64; x [rows,
    INPUTS], rows x_row apart; y [rows, out], rows y_row apart; bias [out].

    y[:, ids] = W[ids] x (+ bias[ids] if BIAS) for the rows ids that the adapter replaces; for one
    tile and every n-th RANKS of them, n being the number of programs of a tile. Grid: (tiles, n).
    """
    slot = tl.load(tiles + tl.program_id(0))
    if slot >= 0:
        site = table + slot * table_row + module * FIELDS
        count = tl.load(site + ROW_COUNT)
        ids = tl.load(site + ROW_IDS).to(tl.pointer_type(tl.int32))
        weight = elements(site, ROWS, x)
        row, live = tile_rows(tiles)
        first = tl.program_id(1) * RANKS
        while first < count:
            k = first + tl.arange(0, RANKS)
            inside = k < count
            sums = tl.zeros((TILE, RANKS), tl.float32)
            sums = _summed(sums, x, x_row, row, live, weight, k, inside, INPUTS, BLOCK_IN, DOT)
            o = tl.load(ids + k, mask=inside, other=0)
            if BIAS:
                sums += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[None, :]
            ys = y + row[:, None] * y_row + o[None, :]
            tl.store(ys, sums.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])
            first += tl.num_programs(1) * RANKS

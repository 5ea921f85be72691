"""Grouped low-rank deltas and bottlenecks in Triton, by the addresses and ranks of weights in the
arena; also the scales and biases of outputs.

The inputs are divided into splits of a fixed size: `_shrink` writes the partial a x of each split,
`_expand` sums them in order and multiplies by b. There are no atomics, and the arithmetic of a row
depends on the row and its adapter alone. See `site` for slots and tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.adapters.program.primitives import Activation, Reads
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
from adaplex.model.weights.site_table import ACTIVATIONS, READS, SITE_FIELDS

SPLIT = 1024
"""Largest number of inputs that one program of `_shrink` sums."""
BLOCK_IN = 128
"""Inputs of one product; divides SPLIT."""
BLOCK_OUT = 128
"""Outputs of one program of `_expand`."""

A, B, RANK, BIAS, OUTPUT_SCALE, INNER, SHAPE = (
    tl.constexpr(SITE_FIELDS.index(name))
    for name in ("a", "b", "rank", "bias", "output_scale", "inner", "shape")
)
SUM, INPUT, RESIDUAL = (
    tl.constexpr(READS.index(reads)) for reads in (Reads.SUM, Reads.INPUT, Reads.RESIDUAL)
)
RELU, GELU, GELU_TANH, SILU, TANH, SIGMOID, LEAKY_RELU = (
    tl.constexpr(ACTIVATIONS.index(activation))
    for activation in Activation
    if activation is not Activation.IDENTITY
)


def shrink(
    site: SiteArguments,
    x: Tensor,
    *,
    max_rank: int,
    around: tuple[Tensor, Tensor] | None = None,
    share: int = 0,
    shares: int = 1,
) -> Tensor:
    """x [rows, in] -> a x of the rows of every tile, as fp32 parts [splits, rows, max_rank] to be
    summed.

    At a block, x is its output and `around` its input and the residual stream, [rows, in] each,
    which a bottleneck may read instead. Only part `share` of `shares` equal parts of every rank is
    used.
    """
    rows, width = x.shape
    entered, residual = (x, x) if around is None else around
    assert x.stride(1) == 1
    assert around is None or x.is_contiguous()
    assert entered.stride() == residual.stride() == x.stride()
    split = min(SPLIT, triton.cdiv(width, BLOCK_IN) * BLOCK_IN)
    splits = triton.cdiv(width, SPLIT)
    parts = x.new_empty(splits, rows, max_rank, dtype=torch.float32)
    _shrink[(site.tiles.shape[1], splits)](
        *site,
        x,
        entered,
        residual,
        x.stride(0),
        width,
        parts,
        rows,
        max_rank,
        share,
        shares,
        around is not None,
        split,
        BLOCK_IN,
        dot_type(x),
    )
    return parts


def expand(
    site: SiteArguments,
    parts: Tensor,
    y: Tensor,
    *,
    block: bool = False,
    share: int = 0,
    shares: int = 1,
) -> None:
    """parts [splits, rows, max_rank] fp32 of `shrink`; y [rows, out].

    y = output_scale * y + b (sum of parts) + bias for every tile, in place. At a `block` the
    bottleneck's inner bias and activation are applied to the sum first.
    """
    assert y.stride(1) == 1
    splits, rows, max_rank = parts.shape
    _expand[(site.tiles.shape[1], triton.cdiv(y.shape[1], BLOCK_OUT))](
        *site,
        y,
        y.stride(0),
        y.shape[1],
        parts,
        rows,
        max_rank,
        share,
        shares,
        block,
        splits,
        BLOCK_OUT,
        dot_type(y),
    )


def no_parts(x: Tensor) -> Tensor:
    """x [rows, in] -> empty parts [splits, rows, 0] for `expand`, if no tile has a low-rank delta;
    as many splits as `shrink` returns, so that the same kernel is launched.
    """
    return x.new_empty(triton.cdiv(x.shape[1], SPLIT), len(x), 0, dtype=torch.float32)


@triton.jit(
    do_not_specialize=["module", "rows", "max_rank", "share"],
    do_not_specialize_on_alignment=["tiles"],
)
def _shrink(
    table,
    table_row,
    module,
    tiles,
    x,
    entered,
    residual,
    x_row,
    width,
    parts,
    rows,
    max_rank,
    share,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
):
    """table [slots, modules, FIELDS] int64, slots table_row apart; tiles [3, tiles] int64; x,
    entered, residual [rows, width], rows x_row apart; parts [splits, rows, max_rank] fp32.

    parts = a x over one split of the inputs, for one tile. If BLOCK, the bottleneck reads x, x +
    residual, entered or residual. Grid: (tiles, splits).
    """
    slot = tl.load(tiles + tl.program_id(0))
    if slot >= 0:
        site = table + slot * table_row + module * FIELDS
        rank = tl.load(site + RANK) // SHARES
        a = elements(site, A, x) + share * rank * width
        row, live = tile_rows(tiles)
        reads = tl.load(site + SHAPE) // 16
        source = x
        if BLOCK:
            if reads == INPUT:
                source = entered
            if reads == RESIDUAL:
                source = residual
        split = tl.program_id(1)
        first = 0
        while first < rank:
            r = first + tl.arange(0, RANKS)
            sums = tl.zeros((TILE, RANKS), tl.float32)
            for offset in range(0, SPLIT, BLOCK_IN):
                i = split * SPLIT + offset + tl.arange(0, BLOCK_IN)
                inside = i < width
                at = row[:, None] * x_row + i[None, :]
                wanted = live[:, None] & inside[None, :]
                xs = tl.load(source + at, mask=wanted, other=0.0)
                if BLOCK:
                    added = tl.load(residual + at, mask=wanted & (reads == SUM), other=0.0)
                    xs = (xs.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
                a_s = a + r[None, :] * width + i[:, None]
                a_s = tl.load(a_s, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
                sums = tl.dot(xs.to(DOT), a_s.to(DOT), sums, input_precision="ieee")
            to = parts + (split * rows + row[:, None]) * max_rank + r[None, :]
            tl.store(to, sums, mask=live[:, None] & (r < rank)[None, :])
            first += RANKS


@triton.jit(
    do_not_specialize=["module", "rows", "max_rank", "share"],
    do_not_specialize_on_alignment=["tiles"],
)
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
    share,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """table [slots, modules, FIELDS] int64, slots table_row apart; tiles [3, tiles] int64; y [rows,
    width], rows y_row apart; parts [SPLITS, rows, max_rank] fp32.

    y = output_scale * y + b h + bias, for one tile and BLOCK_OUT outputs; h is the sum of parts,
    activated if BLOCK, and rounded to y's type, as in the reference. Grid: (tiles, blocks of
    outputs).
    """
    slot = tl.load(tiles + tl.program_id(0))
    if slot >= 0:
        site = table + slot * table_row + module * FIELDS
        rank = tl.load(site + RANK) // SHARES
        if (rank > 0) | (tl.load(site + BIAS) != 0) | (tl.load(site + OUTPUT_SCALE) != 0):
            row, live = tile_rows(tiles)
            o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            delta = tl.zeros((TILE, BLOCK_OUT), tl.float32)
            b = elements(site, B, y) + share * rank * width
            first = 0
            while first < rank:
                r = first + tl.arange(0, RANKS)
                wanted = live[:, None] & (r < rank)[None, :]
                h = tl.zeros((TILE, RANKS), tl.float32)
                for split in range(0, SPLITS):
                    part = parts + (split * rows + row[:, None]) * max_rank + r[None, :]
                    h += tl.load(part, mask=wanted, other=0.0)
                if BLOCK:
                    h += vector(site, INNER, y, r, rank, 0.0)[None, :]
                    h = _activated(h, tl.load(site + SHAPE) % 16)
                inside = (r < rank)[:, None] & (o < width)[None, :]
                bs = tl.load(b + r[:, None] * width + o[None, :], mask=inside, other=0.0)
                h = h.to(y.dtype.element_ty).to(DOT)
                delta = tl.dot(h, bs.to(DOT), delta, input_precision="ieee")
                first += RANKS
            ys = y + row[:, None] * y_row + o[None, :]
            inside = live[:, None] & (o < width)[None, :]
            new = tl.load(ys, mask=inside, other=0.0).to(tl.float32)
            new = new * vector(site, OUTPUT_SCALE, y, o, width, 1.0)[None, :] + delta
            new += vector(site, BIAS, y, o, width, 0.0)[None, :]
            tl.store(ys, new.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _activated(h, activation):
    """h [TILE, RANKS] fp32 -> h after the activation with this number. tanh(x) is computed as
    2 sigmoid(2 x) - 1, which has the right limits at both ends.
    """
    if activation == RELU:
        h = tl.maximum(h, 0.0)
    elif activation == GELU:
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif activation == GELU_TANH:
        # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif activation == SILU:
        h = h * tl.sigmoid(h)
    elif activation == TANH:
        h = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    elif activation == SIGMOID:
        h = tl.sigmoid(h)
    elif activation == LEAKY_RELU:
        h = tl.where(h < 0.0, 0.01 * h, h)
    return h

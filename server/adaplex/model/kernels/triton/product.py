"""Products by frozen weights of any format in Triton.

A WeightFormat has a function that adds the product of one block of inputs (see weight_formats).
Inputs are divided into splits, whose size depends only on the weight's shape. Few rows have a
program for each split, so that there are enough programs, and a second kernel that sums; for many
rows one program sums its splits itself. Blocks and splits are added in the same order either way
and there are no atomics, so the arithmetic of a row depends on the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.model.kernels.triton.dot import LEAST, dot_type

PROMPT_ROWS = 64
"""Rows of a tile if there are more than LEAST. With more rows than this, a program sums all splits.
"""
EVERY_TILE = (1, LEAST + 1, PROMPT_ROWS + 1)
"""Numbers of rows that together launch every variant of the kernels."""
PROGRAMS = 256
"""Target number of programs: about two for each multiprocessor of a large GPU."""
SUMMED = 256
"""Outputs of one program of `_add`."""


@dataclass(frozen=True)
class WeightFormat:
    """A storage format of weights [out, in]."""

    add: Any
    """Triton function (part, from_row, live, weight, o, inside, start, width, GROUP, ROWS,
    BLOCK_IN, BLOCK_OUT, DOT) -> part + the product of inputs [start, start + BLOCK_IN).

    part [BLOCK_OUT, ROWS] fp32; from_row [ROWS] pointers to rows [width] of x, live [ROWS] bool;
    weight: pointers to the format's tensors; o [BLOCK_OUT] outputs, inside [BLOCK_OUT] bool.
    """
    block_in: int
    """Inputs of one call of `add`."""
    block_out: int
    """Outputs of one program; an instruction of Hopper's tensor cores computes 64, by a whole warp
    group."""

    def split_size(self, outs: int, width: int) -> int:
        """Returns the inputs of one split of a weight [outs, width], a multiple of block_in."""
        blocks = triton.cdiv(width, self.block_in)
        splits = max(1, min(blocks, PROGRAMS // triton.cdiv(outs, self.block_out)))
        split: int = triton.cdiv(blocks, splits) * self.block_in
        return split


def product(
    weight_format: WeightFormat,
    x: Tensor,
    weight: tuple[Tensor, ...],
    outs: int,
    bias: Tensor | None,
    *,
    group: int = 1,
) -> Tensor:
    """x [rows, in]; bias [out] of x's type; weight: the contiguous tensors of W [out, in] in its
    format -> x W' + bias [rows, out].

    `group` inputs share a scale; block_in of the format is a multiple of it.
    """
    rows, width = x.shape
    assert x.stride(1) == 1
    assert all(part.is_contiguous() for part in weight)
    split = weight_format.split_size(outs, width)
    splits = triton.cdiv(width, split)
    together = 1 if rows <= PROMPT_ROWS else splits
    tile = LEAST if rows <= LEAST else PROMPT_ROWS
    y = x.new_empty(rows, outs)
    apart = splits > together
    sums = x.new_empty(splits, rows, outs, dtype=torch.float32) if apart else y
    added = y if bias is None else bias
    grid = (triton.cdiv(rows, tile), triton.cdiv(outs, weight_format.block_out), splits // together)
    # Without fusion, products and sums are rounded separately, as everywhere else.
    _multiply[grid](
        x,
        x.stride(0),
        rows,
        width,
        weight,
        added,
        sums,
        outs,
        bias is not None and not apart,
        group,
        together,
        split,
        tile,
        weight_format.block_in,
        weight_format.block_out,
        dot_type(x),
        weight_format.add,
        enable_fp_fusion=False,
    )
    if apart:
        blocks = (rows, triton.cdiv(outs, SUMMED))
        _add[blocks](sums, added, y, rows, outs, bias is not None, splits, SUMMED)
    return y


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x,
    x_row,
    rows,
    width,
    weight,
    bias,
    sums,
    outs,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
    ADD: tl.constexpr,
):
    """x [rows, width], rows x_row apart; weight: pointers to the tensors of W [outs, width] in its
    format; bias [outs]; sums [splits / SPLITS, rows, outs].

    sums = x W' (+ bias if BIAS) over SPLITS splits, for ROWS rows and BLOCK_OUT outputs. Outputs
    are the first dimension of the products, of which tensor cores compute 64 at once, so that tiles
    of few and of many rows are the narrow side of the same instruction. Grid: (tiles of rows,
    blocks of outputs, splits / SPLITS).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live, inside = row < rows, o < outs
    from_row = x + row.to(tl.int64) * x_row
    total = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    for split in range(0, SPLITS):
        first = (tl.program_id(2) * SPLITS + split) * SPLIT
        part = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        for offset in range(0, SPLIT, BLOCK_IN):
            part = ADD(
                part,
                from_row,
                live,
                weight,
                o,
                inside,
                first + offset,
                width,
                GROUP,
                ROWS,
                BLOCK_IN,
                BLOCK_OUT,
                DOT,
            )
        total += part
    if BIAS:
        total += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[:, None]
    line = tl.program_id(2).to(tl.int64) * rows + row
    to = sums + line[None, :] * outs + o[:, None]
    tl.store(to, total.to(sums.dtype.element_ty), mask=inside[:, None] & live[None, :])


@triton.jit(do_not_specialize=["rows"])
def _add(
    sums,
    bias,
    y,
    rows,
    outs,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums [SPLITS, rows, outs] fp32; bias [outs]; y [rows, outs].

    y = the sum of the splits in order (+ bias if BIAS), for one row and BLOCK outputs. Grid: (rows,
    blocks of outputs).
    """
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < outs
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, SPLITS):
        line = split * rows.to(tl.int64) + row
        total += tl.load(sums + line * outs + o, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * outs + o, total.to(y.dtype.element_ty), mask=inside)

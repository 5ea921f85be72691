"""Products by frozen weights in Triton, in whatever form they are kept.

A form is a function that adds the product of one block of inputs (see Add, triton_forms). Inputs
are cut into splits whose size the weight's shape alone decides. Few rows have a program for each
split, so that there are enough of them, and a second kernel that adds; many rows add as they go.
Blocks and splits go in one order either way and there are no atomics, so a row's arithmetic depends
on the row alone.
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
"""Rows of a tile where LEAST are too few. More have a program for all splits."""
EVERY_TILE = (1, LEAST + 1, PROMPT_ROWS + 1)
"""Numbers of rows that together take every kernel there is."""
PROGRAMS = 256
"""Enough of them: about two for each multiprocessor of a large GPU."""
SUMMED = 256
"""Outputs of one program of `_add`."""


@dataclass(frozen=True)
class WeightFormat:
    """How a weight [out, in] is kept."""

    add: Any
    """A function of Triton: (part, from_row, live, weight, o, inside, start, width, GROUP, ROWS,
    BLOCK_IN, BLOCK_OUT, DOT) -> part [BLOCK_OUT, ROWS] and the product of BLOCK_IN inputs from
    `start`: of rows `live` of x, which begin at `from_row`, and of outputs `o` that are `inside`.
    """
    block_in: int
    """Inputs that it takes at once."""
    block_out: int
    """Outputs of one program; Hopper's tensor cores take 64 at a time, by a whole warp group."""

    def split_size(self, outs: int, width: int) -> int:
        """Inputs of one split of a weight [outs, width], whole blocks of them."""
        blocks = triton.cdiv(width, self.block_in)
        splits = max(1, min(blocks, PROGRAMS // triton.cdiv(outs, self.block_out)))
        split: int = triton.cdiv(blocks, splits) * self.block_in
        return split


def product(
    form: WeightFormat,
    x: Tensor,
    weight: tuple[Tensor, ...],
    outs: int,
    bias: Tensor | None,
    *,
    group: int = 1,
) -> Tensor:
    """x W' + bias; x [rows, in], bias [out] in x's type -> [rows, out].

    `weight` are the contiguous tensors of W [out, in], as its form has them; `group` inputs share
    a scale, and the form's blocks are multiples of it.
    """
    rows, width = x.shape
    assert x.stride(1) == 1
    assert all(part.is_contiguous() for part in weight)
    split = form.split_size(outs, width)
    splits = triton.cdiv(width, split)
    together = 1 if rows <= PROMPT_ROWS else splits
    tile = LEAST if rows <= LEAST else PROMPT_ROWS
    y = x.new_empty(rows, outs)
    apart = splits > together
    sums = x.new_empty(splits, rows, outs, dtype=torch.float32) if apart else y
    # A product and a sum are rounded one by one, as they are wherever else a weight is made.
    _multiply[(triton.cdiv(rows, tile), triton.cdiv(outs, form.block_out), splits // together)](
        *(x, x.stride(0), rows, width, weight),
        *(y if bias is None else bias, sums, outs, bias is not None and not apart),
        *(group, together, split, tile, form.block_in, form.block_out, dot_type(x), form.add),
        enable_fp_fusion=False,
    )
    if apart:
        _add[(rows, triton.cdiv(outs, SUMMED))](
            *(sums, y if bias is None else bias, y, rows, outs, bias is not None, splits, SUMMED)
        )
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
    """sums [.., rows, outs] = x W' + bias over SPLITS splits, for ROWS rows and BLOCK_OUT outputs.

    Outputs are the first side of the products, which tensor cores take 64 at a time: so both tiles
    of rows are the narrow side of one instruction.
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
    """y [rows, outs] = the splits of sums [SPLITS, rows, outs] in order, and bias; of one row."""
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

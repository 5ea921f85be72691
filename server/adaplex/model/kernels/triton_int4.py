"""Products by int4-group weights in Triton, which read the codes and write no weight.

A tile of codes is dequantized in registers, to the values that Int4Weight.dequantized gives in x's
type. The nibbles of a byte belong to neighbouring inputs: those in the high halves multiply the
even ones, those in the low halves the odd ones, so that nothing has to be interleaved.

Inputs are cut into splits whose size the weight's shape alone decides. Few rows have a program for
each split, so that there are enough of them, and a second kernel that adds; many rows add as they
go. Blocks and splits go in one order either way and there are no atomics, so a row's arithmetic
depends on the row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.model.int4_group import CENTER, Int4Weight
from adaplex.model.kernels.triton_dot import LEAST, dot_type

BLOCK_IN = 128
"""Inputs in one pair of products; a multiple of every group."""
BLOCK_OUT = 64
"""Outputs of one program; the least for which Hopper's tensor cores take a whole warp group."""
PROMPT_ROWS = 64
"""Rows of a tile where LEAST are too few. More have a program for all splits."""
EVERY_TILE = (1, LEAST + 1, PROMPT_ROWS + 1)
"""Numbers of rows that together take every kernel there is."""
PROGRAMS = 256
"""Enough of them: about two for each multiprocessor of a large GPU."""
SUMMED = 256
"""Outputs of one program of `_add`."""
MIDDLE = tl.constexpr(CENTER)


def int4_product(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x W' + bias; x [rows, in], weight [out, in], bias [out] in x's type -> [rows, out]."""
    (rows, width), outs = x.shape, weight.codes.shape[0]
    assert x.stride(1) == 1
    assert weight.codes.is_contiguous()
    assert weight.scales.is_contiguous()
    assert weight.zeros.is_contiguous()
    split = split_size(outs, width)
    splits = triton.cdiv(width, split)
    together = 1 if rows <= PROMPT_ROWS else splits
    tile = LEAST if rows <= LEAST else PROMPT_ROWS
    y = x.new_empty(rows, outs)
    apart = splits > together
    sums = x.new_empty(splits, rows, outs, dtype=torch.float32) if apart else y
    _multiply[(triton.cdiv(rows, tile), triton.cdiv(outs, BLOCK_OUT), splits // together)](
        *(x, x.stride(0), rows, width, weight.codes, weight.scales, weight.zeros),
        *(y if bias is None else bias, sums, outs, bias is not None and not apart),
        *(width // weight.scales.shape[1], together, split, tile, BLOCK_IN, BLOCK_OUT),
        dot_type(x),
    )
    if apart:
        _add[(rows, triton.cdiv(outs, SUMMED))](
            *(sums, y if bias is None else bias, y, rows, outs, bias is not None, splits, SUMMED)
        )
    return y


def split_size(outs: int, width: int) -> int:
    """Inputs of one split of a weight [outs, width], whole blocks of them."""
    blocks = triton.cdiv(width, BLOCK_IN)
    splits = max(1, min(blocks, PROGRAMS // triton.cdiv(outs, BLOCK_OUT)))
    split: int = triton.cdiv(blocks, splits) * BLOCK_IN
    return split


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x,
    x_row,
    rows,
    width,
    codes,
    scales,
    zeros,
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
):
    """sums [.., rows, outs] = x W' + bias over SPLITS splits, for ROWS rows and BLOCK_OUT outputs.

    Outputs are the first side of the products, which tensor cores take 64 at a time: so both tiles
    of rows are the narrow side of one instruction.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live, inside = row < rows, o < outs
    total = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    for split in range(0, SPLITS):
        first = (tl.program_id(2) * SPLITS + split) * SPLIT
        part = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        for offset in range(0, SPLIT, BLOCK_IN):
            start = first + offset
            even, odd = _inputs(x + row.to(tl.int64) * x_row, live, start, width, ROWS, BLOCK_IN)
            high, low = _weights(
                codes, scales, zeros, o, inside, start, width, GROUP, BLOCK_IN, BLOCK_OUT
            )
            high, low = high.to(x.dtype.element_ty).to(DOT), low.to(x.dtype.element_ty).to(DOT)
            part = tl.dot(high, tl.trans(even.to(DOT)), part, input_precision="ieee")
            part = tl.dot(low, tl.trans(odd.to(DOT)), part, input_precision="ieee")
        total += part
    if BIAS:
        total += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[:, None]
    line = tl.program_id(2).to(tl.int64) * rows + row
    to = sums + line[None, :] * outs + o[:, None]
    tl.store(to, total.to(sums.dtype.element_ty), mask=inside[:, None] & live[None, :])


@triton.jit
def _inputs(from_row, live, start, width, ROWS: tl.constexpr, BLOCK_IN: tl.constexpr):
    """The even and the odd ones of BLOCK_IN inputs, [ROWS, BLOCK_IN / 2] each."""
    i = start + tl.arange(0, BLOCK_IN)
    wanted = live[:, None] & (i < width)[None, :]
    xs = tl.load(from_row[:, None] + i[None, :], mask=wanted, other=0.0)
    return tl.split(tl.reshape(xs, (ROWS, BLOCK_IN // 2, 2)))


@triton.jit
def _weights(
    codes,
    scales,
    zeros,
    o,
    inside,
    start,
    width,
    GROUP: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """fp32 weights of the even and of the odd ones of BLOCK_IN inputs, [BLOCK_OUT, BLOCK_IN / 2]
    each; of outputs and inputs that there are not, zero.
    """
    groups: tl.constexpr = BLOCK_IN // GROUP
    byte = start // 2 + tl.arange(0, BLOCK_IN // 2)
    wanted = inside[:, None] & (byte < width // 2)[None, :]
    pairs = tl.load(codes + o[:, None] * (width // 2) + byte[None, :], mask=wanted, other=0)
    pairs = tl.reshape(pairs, (BLOCK_OUT, groups, GROUP // 2))
    g = start // GROUP + tl.arange(0, groups)
    wanted = inside[:, None] & (g < width // GROUP)[None, :]
    at = o[:, None] * (width // GROUP) + g[None, :]
    scale = tl.load(scales + at, mask=wanted, other=0.0).to(tl.float32)[:, :, None]
    zero = tl.load(zeros + at, mask=wanted, other=0.0).to(tl.float32)[:, :, None]
    high = (((pairs >> 4).to(tl.float32) - MIDDLE) - zero) * scale
    low = (((pairs & 15).to(tl.float32) - MIDDLE) - zero) * scale
    return (
        tl.reshape(high, (BLOCK_OUT, BLOCK_IN // 2)),
        tl.reshape(low, (BLOCK_OUT, BLOCK_IN // 2)),
    )


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

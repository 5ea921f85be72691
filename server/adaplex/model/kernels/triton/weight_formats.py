"""Weight formats of `product`: dense, nf4 and int4-group.

A tile of codes is decoded in registers: int4-group to the values that the whole weight has in x's
type, nf4 to values before scaling. The two codes of a byte belong to neighbouring inputs: the high
halves multiply the even inputs and the low halves the odd inputs, so that codes need not be
interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adaplex.model.kernels.triton.product import WeightFormat, product
from adaplex.model.weights.int4_group import CENTER, Int4Weight
from adaplex.model.weights.nf4 import NESTED, NF4_BLOCK, Nf4Weight

MIDDLE = tl.constexpr(CENTER)
NESTED_BLOCKS = tl.constexpr(NESTED)


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in]; weight [out, in] and bias [out] of x's type -> x W' + bias [rows, out].

    A weight that is stored transposed, as that of some experts, is copied for each product.
    """
    return product(DENSE, x, (weight.contiguous(),), weight.shape[0], bias)


def nf4_product(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
    """x [rows, in]; nf4 weight [out, in]; bias [out] of x's type -> x W' + bias [rows, out]."""
    outs = weight.codes.shape[0]
    return product(NF4, x, weight.parts, outs, bias, group=NF4_BLOCK)


def int4_product(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [rows, in]; int4 weight [out, in]; bias [out] of x's type -> x W' + bias [rows, out]."""
    parts, outs = (weight.codes, weight.scales, weight.zeros), weight.codes.shape[0]
    return product(INT4, x, parts, outs, bias, group=x.shape[1] // weight.scales.shape[1])


@triton.jit
def _add_dense(
    part,
    from_row,
    live,
    weight,
    o,
    inside,
    start,
    width,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """part [BLOCK_OUT, ROWS] fp32; from_row [ROWS] pointers to rows [width]; weight: (pointer to
    [outs, width]) -> part + the product of inputs [start, start + BLOCK_IN); see WeightFormat.
    """
    i = start + tl.arange(0, BLOCK_IN)
    wanted = inside[:, None] & (i < width)[None, :]
    ws = tl.load(weight[0] + o[:, None] * width + i[None, :], mask=wanted, other=0.0)
    xs = _inputs(from_row, live, start, width, BLOCK_IN)
    return tl.dot(ws.to(DOT), tl.trans(xs.to(DOT)), part, input_precision="ieee")


@triton.jit
def _add_nf4(
    part,
    from_row,
    live,
    weight,
    o,
    inside,
    start,
    width,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """part [BLOCK_OUT, ROWS] fp32; from_row [ROWS] pointers to rows [width]; weight: pointers to
    codes [outs, width / 2] uint8, values [16], maxima [blocks] uint8, steps [256], scales
    [blocks / NESTED] and offset [1], fp32 -> part + the product of one block of inputs.

    See WeightFormat. Values are rounded to x's type, and the sum of a block is scaled, as on CPUs.
    """
    codes, values, maxima, steps, scales, offset = weight
    block, there = o * (width // GROUP) + start // GROUP, inside & (start < width)
    scale = tl.load(steps + tl.load(maxima + block, mask=there, other=0).to(tl.int32))
    scale *= tl.load(scales + block // NESTED_BLOCKS, mask=there, other=0.0)
    scale += tl.load(offset)
    table = tl.load(values + tl.arange(0, 16)).to(from_row.dtype.element_ty).to(DOT)
    pairs = _pairs(codes, o, inside, start, width, GROUP, BLOCK_IN, BLOCK_OUT).to(tl.int32)
    pairs = tl.reshape(pairs, (BLOCK_OUT * BLOCK_IN // 2,))
    high, low = tl.gather(table, pairs >> 4, 0), tl.gather(table, pairs & 15, 0)
    whole = tl.zeros_like(part)
    whole = _add_pairs(
        whole, from_row, live, high, low, start, width, ROWS, BLOCK_IN, BLOCK_OUT, DOT
    )
    return part + whole * scale[:, None]


@triton.jit
def _add_int4(
    part,
    from_row,
    live,
    weight,
    o,
    inside,
    start,
    width,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """part [BLOCK_OUT, ROWS] fp32; from_row [ROWS] pointers to rows [width]; weight: pointers to
    codes [outs, width / 2] uint8, scales and zeros [outs, width / GROUP] -> part + the product of
    inputs [start, start + BLOCK_IN); see WeightFormat. Inputs beyond `width` have a scale of zero.
    """
    codes, scales, zeros = weight
    at, wanted = _groups(o, inside, start, width, GROUP, BLOCK_IN)
    scale = tl.load(scales + at, mask=wanted, other=0.0).to(tl.float32)[:, :, None]
    zero = tl.load(zeros + at, mask=wanted, other=0.0).to(tl.float32)[:, :, None]
    pairs = _pairs(codes, o, inside, start, width, GROUP, BLOCK_IN, BLOCK_OUT)
    high = (((pairs >> 4).to(tl.float32) - MIDDLE) - zero) * scale
    low = (((pairs & 15).to(tl.float32) - MIDDLE) - zero) * scale
    return _add_pairs(part, from_row, live, high, low, start, width, ROWS, BLOCK_IN, BLOCK_OUT, DOT)


@triton.jit
def _inputs(from_row, live, start, width, BLOCK_IN: tl.constexpr):
    """from_row [ROWS] pointers to rows [width]; live [ROWS] bool -> inputs [start, start +
    BLOCK_IN) of each row [ROWS, BLOCK_IN], zero in dead rows and beyond `width`.
    """
    i = start + tl.arange(0, BLOCK_IN)
    wanted = live[:, None] & (i < width)[None, :]
    return tl.load(from_row[:, None] + i[None, :], mask=wanted, other=0.0)


@triton.jit
def _groups(o, inside, start, width, GROUP: tl.constexpr, BLOCK_IN: tl.constexpr):
    """o [BLOCK_OUT] outputs, inside [BLOCK_OUT] bool -> indices of the groups of inputs [start,
    start + BLOCK_IN) of each output [BLOCK_OUT, groups], and which of them exist.
    """
    g = start // GROUP + tl.arange(0, BLOCK_IN // GROUP)
    at = o[:, None] * (width // GROUP) + g[None, :]
    return at, inside[:, None] & (g < width // GROUP)[None, :]


@triton.jit
def _pairs(
    codes,
    o,
    inside,
    start,
    width,
    GROUP: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """codes: pointer to uint8 [outs, width / 2]; o [BLOCK_OUT] outputs, inside [BLOCK_OUT] bool ->
    bytes of the codes of inputs [start, start + BLOCK_IN) [BLOCK_OUT, groups, GROUP / 2], zero
    where there are none.
    """
    byte = start // 2 + tl.arange(0, BLOCK_IN // 2)
    wanted = inside[:, None] & (byte < width // 2)[None, :]
    pairs = tl.load(codes + o[:, None] * (width // 2) + byte[None, :], mask=wanted, other=0)
    return tl.reshape(pairs, (BLOCK_OUT, BLOCK_IN // GROUP, GROUP // 2))


@triton.jit
def _add_pairs(
    part,
    from_row,
    live,
    high,
    low,
    start,
    width,
    ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
):
    """part [BLOCK_OUT, ROWS] fp32; from_row [ROWS] pointers to rows [width]; high, low [BLOCK_OUT,
    BLOCK_IN / 2] in any shape: weights of the even and of the odd inputs -> part + the product of
    inputs [start, start + BLOCK_IN).
    """
    xs = _inputs(from_row, live, start, width, BLOCK_IN)
    even, odd = tl.split(tl.reshape(xs, (ROWS, BLOCK_IN // 2, 2)))
    high = tl.reshape(high, (BLOCK_OUT, BLOCK_IN // 2)).to(xs.dtype).to(DOT)
    low = tl.reshape(low, (BLOCK_OUT, BLOCK_IN // 2)).to(xs.dtype).to(DOT)
    part = tl.dot(high, tl.trans(even.to(DOT)), part, input_precision="ieee")
    return tl.dot(low, tl.trans(odd.to(DOT)), part, input_precision="ieee")


DENSE = WeightFormat(_add_dense, block_in=64, block_out=64)
NF4 = WeightFormat(_add_nf4, block_in=NF4_BLOCK, block_out=128)
INT4 = WeightFormat(_add_int4, block_in=128, block_out=64)
"""Its block_in is a multiple of every group size."""

"""What attention to a partition of keys leaves, and how that of several is merged, in Triton.

Partitions have a fixed size and lie at fixed positions. The state of some keys is peak [rows], the
largest score, total [rows], the sum of exp(score - peak), and mixed [rows, dv], that of the values
by the same weights. Each partition is taken from a fresh state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adaplex.model.kernels import reference

PARTITION = tl.constexpr(reference.PARTITION)
MASKED = tl.constexpr(reference.MASKED)
BLOCK_KEYS = tl.constexpr(64)
"""Keys in one product; divides PARTITION."""


@triton.jit
def reach(position, live, WINDOW: tl.constexpr):
    """First and last position that any row of the tile sees."""
    last = tl.max(position, 0)
    first = last * 0
    if WINDOW > 0:
        lowest = tl.min(tl.where(live, position, last), 0)
        first = tl.maximum(lowest - WINDOW + 1, 0)
    return first, last


@triton.jit
def query_rows(rows, live, DK: tl.constexpr, DK_PADDED: tl.constexpr, DOT: tl.constexpr):
    """[ROWS, DK_PADDED] from pointers to the rows' first elements."""
    d = tl.arange(0, DK_PADDED)
    wanted = live[:, None] & (d < DK)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=wanted, other=0.0).to(DOT)


@triton.jit
def nothing(ROWS: tl.constexpr, DV_PADDED: tl.constexpr):
    """Peak, total and mix of rows that have seen no key."""
    peak = tl.full((ROWS,), MASKED, tl.float32)
    return peak, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DV_PADDED), tl.float32)


@triton.jit
def partition_state(
    q,
    key_head,
    value_head,
    table,
    position,
    first,
    last,
    start,
    scale,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    DK: tl.constexpr,
    DK_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
):
    """Peak, total and mix of the keys [start, start + PARTITION) alone.

    Nothing before `first` or after `last` is read: it may be another owner's.
    """
    dk, dv = tl.arange(0, DK_PADDED), tl.arange(0, DV_PADDED)
    peak, total, mixed = nothing(ROWS, DV_PADDED)
    for offset in range(0, PARTITION, BLOCK_KEYS):
        at = start + offset + tl.arange(0, BLOCK_KEYS)
        seen = (at >= first) & (at <= last)
        block = tl.load(table + at // BLOCK_TOKENS, mask=seen, other=0)
        slot = block * BLOCK_TOKENS + at % BLOCK_TOKENS
        keys = key_head + slot[None, :] * DK + dk[:, None]
        k = tl.load(keys, mask=seen[None, :] & (dk < DK)[:, None], other=0.0)
        scores = tl.dot(q, k.to(DOT), input_precision="ieee") * scale
        if SOFTCAP > 0.0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends.
            scores = SOFTCAP * (1.0 - 2.0 / (tl.exp(2.0 * scores / SOFTCAP) + 1.0))
        visible = at[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, -float("inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - top[:, None])
        fade = tl.exp(peak - top)
        values = value_head + slot[:, None] * DV + dv[None, :]
        v = tl.load(values, mask=seen[:, None] & (dv < DV)[None, :], other=0.0)
        part = tl.dot(weights.to(v.dtype).to(DOT), v.to(DOT), input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None] + part
        peak = top
    return peak, total, mixed


@triton.jit
def merged(peak, total, mixed, other_peak, other_total, other_mixed):
    """Takes the state of one partition into that of those before it."""
    top = tl.maximum(peak, other_peak)
    fade, weight = tl.exp(peak - top), tl.exp(other_peak - top)
    mixed = mixed * fade[:, None] + other_mixed * weight[:, None]
    return top, total * fade + other_total * weight, mixed


@triton.jit
def finish(
    peak,
    total,
    mixed,
    sinks,
    rows,
    live,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Divides by the total, sinks included, and stores the live rows."""
    if SINKS:
        total += tl.exp(tl.load(sinks, mask=live, other=MASKED).to(tl.float32) - peak)
    d = tl.arange(0, DV_PADDED)
    wanted = live[:, None] & (d < DV)[None, :]
    total = tl.where(live, total, 1.0)
    tl.store(rows[:, None] + d[None, :], mixed / total[:, None], mask=wanted)

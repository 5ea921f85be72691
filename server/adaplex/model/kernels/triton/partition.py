"""Attention to one partition of keys, and merging of partitions, in Triton.

Partitions have a fixed size and start at its multiples. The state of attention to some keys is peak
[rows], the largest score; total [rows], the sum of exp(score - peak); and weighted [rows, dv], the
sum of the values by the same weights; all fp32. Each partition starts from an empty state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adaplex.model.kernels import reference

PARTITION = tl.constexpr(reference.PARTITION)
MASKED = tl.constexpr(reference.MASKED)
BLOCK_KEYS = tl.constexpr(64)
"""Keys of one product; divides PARTITION."""


@triton.jit
def visible_range(position, live, WINDOW: tl.constexpr):
    """position [ROWS] int, live [ROWS] bool -> first and last position that any row of the tile
    attends to.
    """
    last = tl.max(position, 0)
    first = last * 0
    if WINDOW > 0:
        lowest = tl.min(tl.where(live, position, last), 0)
        first = tl.maximum(lowest - WINDOW + 1, 0)
    return first, last


@triton.jit
def query_rows(rows, live, DK: tl.constexpr, DK_PADDED: tl.constexpr, DOT: tl.constexpr):
    """rows [ROWS] pointers to rows [DK], live [ROWS] bool -> the rows [ROWS, DK_PADDED], padded
    with zeros.
    """
    d = tl.arange(0, DK_PADDED)
    wanted = live[:, None] & (d < DK)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=wanted, other=0.0).to(DOT)


@triton.jit
def empty_state(ROWS: tl.constexpr, DV_PADDED: tl.constexpr):
    """Returns peak [ROWS], total [ROWS] and weighted [ROWS, DV_PADDED] of no keys."""
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
    """q [ROWS, DK_PADDED]; key_head pointer to [blocks, BLOCK_TOKENS, DK], value_head to [blocks,
    BLOCK_TOKENS, DV]; table pointer to int64 [blocks of the sequence]; position [ROWS] int
    -> peak [ROWS], total [ROWS] and weighted [ROWS, DV_PADDED] of keys [start, start + PARTITION).

    Keys before `first` or after `last` are not read: their blocks may have another owner.
    """
    dk, dv = tl.arange(0, DK_PADDED), tl.arange(0, DV_PADDED)
    peak, total, weighted = empty_state(ROWS, DV_PADDED)
    for offset in range(0, PARTITION, BLOCK_KEYS):
        at = start + offset + tl.arange(0, BLOCK_KEYS)
        seen = (at >= first) & (at <= last)
        block = tl.load(table + at // BLOCK_TOKENS, mask=seen, other=0)
        slot = block * BLOCK_TOKENS + at % BLOCK_TOKENS
        keys = key_head + slot[None, :] * DK + dk[:, None]
        k = tl.load(keys, mask=seen[None, :] & (dk < DK)[:, None], other=0.0)
        scores = tl.dot(q, k.to(DOT), input_precision="ieee") * scale
        if SOFTCAP > 0.0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which has the right limits at both ends.
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
        weighted = weighted * fade[:, None] + part
        peak = top
    return peak, total, weighted


@triton.jit
def merge_states(peak, total, weighted, other_peak, other_total, other_weighted):
    """peak, total [rows] and weighted [rows, dv] of one set of keys and of another -> of both."""
    top = tl.maximum(peak, other_peak)
    fade, weight = tl.exp(peak - top), tl.exp(other_peak - top)
    weighted = weighted * fade[:, None] + other_weighted * weight[:, None]
    return top, total * fade + other_total * weight, weighted


@triton.jit
def store_attention(
    peak,
    total,
    weighted,
    sinks,
    rows,
    live,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """peak, total [ROWS] and weighted [ROWS, DV_PADDED] of all keys; sinks [ROWS] pointers to extra
    logits; rows [ROWS] pointers to the results [DV]; live [ROWS] bool.

    Stores weighted / (total + exp(sink - peak)) in the live rows; without the sink if not SINKS.
    """
    if SINKS:
        total += tl.exp(tl.load(sinks, mask=live, other=MASKED).to(tl.float32) - peak)
    d = tl.arange(0, DV_PADDED)
    wanted = live[:, None] & (d < DV)[None, :]
    total = tl.where(live, total, 1.0)
    tl.store(rows[:, None] + d[None, :], weighted / total[:, None], mask=wanted)

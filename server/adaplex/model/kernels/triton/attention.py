"""Paged attention in Triton: what `reference.attend` computes, without gathering.

Keys are taken in partitions (see triton_partition), which are merged in order. Decoding rows have
a program for each partition and a second kernel that merges; prompt tiles merge as they go. So a
row's arithmetic depends on the row alone, and there are no atomics. Tables and positions are read
on the device: a captured launch fixes nothing but their shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.model.kernels import reference
from adaplex.model.kernels.triton.dot import LEAST, dot_type
from adaplex.model.kernels.triton.partition import (
    MASKED,
    PARTITION,
    finish,
    merged,
    nothing,
    partition_state,
    query_rows,
    reach,
)

PROMPT_ROWS = 64
"""Pairs of token and head in a prompt tile, at most, unless a group has more heads."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `reference.attend`. The query may be a view with any strides but the last."""
    batch, heads, n, dk = query.shape
    kv_heads, blocks, block_tokens, dv = values.shape
    assert query.stride(3) == 1
    assert all(t.is_contiguous() for t in (keys, values, tables, positions))
    group = heads // kv_heads
    tokens = 1 if n == 1 else max(1, PROMPT_ROWS // group)
    shape = {
        "TOKENS": tokens,
        "GROUP": group,
        "ROWS": max(LEAST, triton.next_power_of_2(tokens * group)),
        "DV": dv,
        "DV_PADDED": max(LEAST, triton.next_power_of_2(dv)),
        "WINDOW": window or 0,
    }
    products = {
        "DK": dk,
        "DK_PADDED": max(LEAST, triton.next_power_of_2(dk)),
        "BLOCK_TOKENS": block_tokens,
        "SOFTCAP": softcap or 0.0,
        "DOT": dot_type(query),
    }
    inputs = (
        *(query, query.stride(0), query.stride(1), query.stride(2), scale),
        *(keys, values, blocks, tables, tables.shape[1], positions, n),
    )
    out = query.new_empty(batch, n, heads, dv)
    ends = {"sinks": out if sinks is None else sinks, "SINKS": sinks is not None, "out": out}
    if n > 1:
        tiles = triton.cdiv(n, tokens)
        _prompt[(tiles, kv_heads, batch)](*inputs, **shape, **products, **ends)
        return out.transpose(1, 2)
    partitions = triton.cdiv(tables.shape[1] * block_tokens, reference.PARTITION)
    parts = query.new_empty(partitions, batch, heads, dv + 2, dtype=torch.float32)
    _decode[(partitions, kv_heads, batch)](*inputs, parts, **shape, **products)
    _combine[(kv_heads, batch)](parts, positions, **shape, **ends)
    return out.transpose(1, 2)


@triton.jit(do_not_specialize=["width", "n"], do_not_specialize_on_alignment=["positions"])
def _prompt(
    query,
    query_batch,
    query_head,
    query_token,
    scale,
    keys,
    values,
    blocks,
    tables,
    width,
    positions,
    n,
    sinks,
    out,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    DK: tl.constexpr,
    DK_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    SINKS: tl.constexpr,
):
    """A tile of TOKENS tokens of a sequence, one group of heads, every partition in order."""
    kv_head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, ROWS)
    token, head = tl.program_id(0) * TOKENS + i // GROUP, kv_head * GROUP + i % GROUP
    live = (i < TOKENS * GROUP) & (token < n)
    position = tl.load(positions + sequence * n + token, mask=live, other=-1)
    first, last = reach(position, live, WINDOW)
    from_row = query + sequence * query_batch + head * query_head + token * query_token
    q = query_rows(from_row, live, DK, DK_PADDED, DOT)
    key_head = keys + kv_head * blocks * BLOCK_TOKENS * DK
    value_head = values + kv_head * blocks * BLOCK_TOKENS * DV
    peak, total, mixed = nothing(ROWS, DV_PADDED)
    start = first // PARTITION * PARTITION
    while start <= last:
        p, t, m = partition_state(
            *(q, key_head, value_head, tables + sequence * width, position, first, last, start),
            *(scale, ROWS, DV, DV_PADDED, WINDOW, DK, DK_PADDED, BLOCK_TOKENS, SOFTCAP, DOT),
        )
        peak, total, mixed = merged(peak, total, mixed, p, t, m)
        start += PARTITION
    row = (sequence * n + token) * tl.num_programs(1) * GROUP + head
    finish(peak, total, mixed, sinks + head, out + row * DV, live, DV, DV_PADDED, SINKS)


@triton.jit(do_not_specialize=["width", "n"], do_not_specialize_on_alignment=["positions"])
def _decode(
    query,
    query_batch,
    query_head,
    query_token,
    scale,
    keys,
    values,
    blocks,
    tables,
    width,
    positions,
    n,
    parts,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
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
    """One partition of keys for the group of heads of one row.

    parts [partitions, batch, heads, dv + 2] gets mix, peak and total; nothing where the row sees
    no key of the partition.
    """
    kv_head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * PARTITION
    i = tl.arange(0, ROWS)
    live, head = i < GROUP, kv_head * GROUP + i % GROUP
    position = tl.load(positions + sequence + tl.zeros_like(i), mask=live, other=-1)
    first, last = reach(position, live, WINDOW)
    if (start <= last) & (start + PARTITION > first):
        q = query_rows(query + sequence * query_batch + head * query_head, live, DK, DK_PADDED, DOT)
        key_head = keys + kv_head * blocks * BLOCK_TOKENS * DK
        value_head = values + kv_head * blocks * BLOCK_TOKENS * DV
        peak, total, mixed = partition_state(
            *(q, key_head, value_head, tables + sequence * width, position, first, last, start),
            *(scale, ROWS, DV, DV_PADDED, WINDOW, DK, DK_PADDED, BLOCK_TOKENS, SOFTCAP, DOT),
        )
        rows = (tl.program_id(0) * tl.num_programs(2) + sequence) * tl.num_programs(1) * GROUP
        at = parts + (rows + head) * (DV + 2)
        d = tl.arange(0, DV_PADDED)
        tl.store(at[:, None] + d[None, :], mixed, mask=live[:, None] & (d < DV)[None, :])
        tl.store(at + DV, peak, mask=live)
        tl.store(at + DV + 1, total, mask=live)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _combine(
    parts,
    positions,
    sinks,
    out,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merges the partitions of a row that `_decode` wrote, in order."""
    kv_head, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, d = tl.arange(0, ROWS), tl.arange(0, DV_PADDED)
    live, head = i < GROUP, kv_head * GROUP + i % GROUP
    wanted = live[:, None] & (d < DV)[None, :]
    position = tl.load(positions + sequence + tl.zeros_like(i), mask=live, other=-1)
    first, last = reach(position, live, WINDOW)
    peak, total, mixed = nothing(ROWS, DV_PADDED)
    partition = first // PARTITION
    while partition * PARTITION <= last:
        rows = (partition * tl.num_programs(1) + sequence) * tl.num_programs(0) * GROUP
        at = parts + (rows + head) * (DV + 2)
        m = tl.load(at[:, None] + d[None, :], mask=wanted, other=0.0)
        p = tl.load(at + DV, mask=live, other=MASKED)
        t = tl.load(at + DV + 1, mask=live, other=0.0)
        peak, total, mixed = merged(peak, total, mixed, p, t, m)
        partition += 1
    row = sequence * tl.num_programs(0) * GROUP + head
    finish(peak, total, mixed, sinks + head, out + row * DV, live, DV, DV_PADDED, SINKS)

"""Paged attention in Triton: computes `reference.attend` without gathering keys and values.

Keys are processed in partitions (see partition), which are merged in order. Decoding rows have a
program for each partition and a second kernel that merges; a program of a prompt tile merges its
partitions itself. So the arithmetic of a row depends on the row alone, and there are no atomics.
Tables and positions are read on the device, so a captured launch fixes only their shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaplex.model.kernels import reference
from adaplex.model.kernels.paged_kv import AttentionOptions, PagedKV
from adaplex.model.kernels.triton.dot import LEAST, dot_type
from adaplex.model.kernels.triton.partition import (
    MASKED,
    PARTITION,
    empty_state,
    merge_states,
    partition_state,
    query_rows,
    store_attention,
    visible_range,
)

PROMPT_ROWS = 64
"""Largest number of pairs of token and head in a prompt tile, unless a group has more heads."""


def attend(query: Tensor, kv: PagedKV, options: AttentionOptions) -> Tensor:
    """query [batch, heads, n, dk], contiguous in its last dimension; kv as in PagedKV, contiguous
    -> [batch, heads, n, dv].

    Computes `reference.attend`.
    """
    batch, heads, n, dk = query.shape
    kv_heads, blocks, block_tokens, dv = kv.values.shape
    keys, values, tables, positions = kv.keys, kv.values, kv.tables, kv.positions
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
        "WINDOW": options.window or 0,
    }
    products = {
        "DK": dk,
        "DK_PADDED": max(LEAST, triton.next_power_of_2(dk)),
        "BLOCK_TOKENS": block_tokens,
        "SOFTCAP": options.softcap or 0.0,
        "DOT": dot_type(query),
    }
    strides = query.stride(0), query.stride(1), query.stride(2)
    cache = keys, values, blocks, tables, tables.shape[1]
    inputs = (query, *strides, options.scale, *cache, positions, n)
    out = query.new_empty(batch, n, heads, dv)
    sinks = options.sinks
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
    """query [batch, heads, n, DK] by the strides query_batch, query_head and query_token; keys
    [kv_heads, blocks, BLOCK_TOKENS, DK]; values [kv_heads, blocks, BLOCK_TOKENS, DV]; tables
    [batch, width] int64; positions [batch, n] int64; sinks [heads]; out [batch, n, heads, DV].

    out = attention of TOKENS tokens of one sequence and GROUP heads, over all partitions in order.
    Grid: (tiles of tokens, kv_heads, batch).
    """
    kv_head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, ROWS)
    token, head = tl.program_id(0) * TOKENS + i // GROUP, kv_head * GROUP + i % GROUP
    live = (i < TOKENS * GROUP) & (token < n)
    position = tl.load(positions + sequence * n + token, mask=live, other=-1)
    first, last = visible_range(position, live, WINDOW)
    from_row = query + sequence * query_batch + head * query_head + token * query_token
    q = query_rows(from_row, live, DK, DK_PADDED, DOT)
    key_head = keys + kv_head * blocks * BLOCK_TOKENS * DK
    value_head = values + kv_head * blocks * BLOCK_TOKENS * DV
    peak, total, weighted = empty_state(ROWS, DV_PADDED)
    start = first // PARTITION * PARTITION
    while start <= last:
        p, t, w = partition_state(
            q,
            key_head,
            value_head,
            tables + sequence * width,
            position,
            first,
            last,
            start,
            scale,
            ROWS,
            DV,
            DV_PADDED,
            WINDOW,
            DK,
            DK_PADDED,
            BLOCK_TOKENS,
            SOFTCAP,
            DOT,
        )
        peak, total, weighted = merge_states(peak, total, weighted, p, t, w)
        start += PARTITION
    row = (sequence * n + token) * tl.num_programs(1) * GROUP + head
    store_attention(peak, total, weighted, sinks + head, out + row * DV, live, DV, DV_PADDED, SINKS)


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
    """query, keys, values, tables and positions as in `_prompt`, n = 1; parts [partitions, batch,
    heads, DV + 2] fp32.

    parts = weighted [DV], peak and total of one partition of keys, for one row and GROUP heads; not
    written if the row attends to no key of the partition. Grid: (partitions, kv_heads, batch).
    """
    kv_head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * PARTITION
    i = tl.arange(0, ROWS)
    live, head = i < GROUP, kv_head * GROUP + i % GROUP
    position = tl.load(positions + sequence + tl.zeros_like(i), mask=live, other=-1)
    first, last = visible_range(position, live, WINDOW)
    if (start <= last) & (start + PARTITION > first):
        q = query_rows(query + sequence * query_batch + head * query_head, live, DK, DK_PADDED, DOT)
        key_head = keys + kv_head * blocks * BLOCK_TOKENS * DK
        value_head = values + kv_head * blocks * BLOCK_TOKENS * DV
        peak, total, weighted = partition_state(
            q,
            key_head,
            value_head,
            tables + sequence * width,
            position,
            first,
            last,
            start,
            scale,
            ROWS,
            DV,
            DV_PADDED,
            WINDOW,
            DK,
            DK_PADDED,
            BLOCK_TOKENS,
            SOFTCAP,
            DOT,
        )
        rows = (tl.program_id(0) * tl.num_programs(2) + sequence) * tl.num_programs(1) * GROUP
        at = parts + (rows + head) * (DV + 2)
        d = tl.arange(0, DV_PADDED)
        tl.store(at[:, None] + d[None, :], weighted, mask=live[:, None] & (d < DV)[None, :])
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
    """parts [partitions, batch, heads, DV + 2] fp32 as `_decode` writes it; positions [batch]
    int64; sinks [heads]; out [batch, 1, heads, DV].

    out = attention of one row and GROUP heads: its partitions merged in order. Grid: (kv_heads,
    batch).
    """
    kv_head, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, d = tl.arange(0, ROWS), tl.arange(0, DV_PADDED)
    live, head = i < GROUP, kv_head * GROUP + i % GROUP
    wanted = live[:, None] & (d < DV)[None, :]
    position = tl.load(positions + sequence + tl.zeros_like(i), mask=live, other=-1)
    first, last = visible_range(position, live, WINDOW)
    peak, total, weighted = empty_state(ROWS, DV_PADDED)
    partition = first // PARTITION
    while partition * PARTITION <= last:
        rows = (partition * tl.num_programs(1) + sequence) * tl.num_programs(0) * GROUP
        at = parts + (rows + head) * (DV + 2)
        w = tl.load(at[:, None] + d[None, :], mask=wanted, other=0.0)
        p = tl.load(at + DV, mask=live, other=MASKED)
        t = tl.load(at + DV + 1, mask=live, other=0.0)
        peak, total, weighted = merge_states(peak, total, weighted, p, t, w)
        partition += 1
    row = sequence * tl.num_programs(0) * GROUP + head
    store_attention(peak, total, weighted, sinks + head, out + row * DV, live, DV, DV_PADDED, SINKS)

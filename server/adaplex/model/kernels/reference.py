"""Reference kernels in torch: slow and correct on every device; fast kernels are tested against
them.

They are row-invariant: the bits of row i of a result depend on row i of the inputs alone, not on
the content or the number of other rows. BLAS chooses the order of sums by the number of rows;
oneDNN does not, if rows are padded to whole tiles of ROW_TILE.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from adaplex.model.kernels import onednn
from adaplex.model.kernels.paged_kv import AttentionOptions, PagedKV
from adaplex.model.weights.int4_group import Int4Weight
from adaplex.model.weights.integer_weight import INT8_BLOCK, IntegerWeight

ROW_TILE = 4
"""Rows of a tile. Products of whole tiles give each row the same bits, on any number of threads.
Measured, see server/DECISIONS.md."""

SHORT_SUM = 64
"""Inner size of a batch of fp32 products, which BLAS adds in one order for all whole tiles of rows.
Measured: up to 80 on Intel processors, any size on AMD's; see server/DECISIONS.md."""

PARTITION = 256
"""Keys of one partition of attention. All products of partitions have the same inner size."""

LEAST_MAXIMUM = 1e-30
"""Blocks of smaller activations are rounded to zeros of 8 bits."""

MASKED = -1e30
"""Running maximum before the first key; finite, so that differences are never NaN."""


def padded_rows(rows: int, least: int = 1) -> int:
    """Returns the smallest positive multiple of ROW_TILE that is at least `rows` and `least`."""
    return max(1, -(-max(rows, least) // ROW_TILE)) * ROW_TILE


def whole_tiles(x: Tensor) -> Tensor:
    """x [rows, features] -> x with zero rows added up to whole tiles of ROW_TILE rows."""
    missing = padded_rows(x.shape[0]) - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in], weight [out, in] -> x @ weight.T [rows, out], row-invariant."""
    product = onednn.multiply if x.shape[1] and onednn.multiplies(weight) else F.linear
    return product(whole_tiles(x), weight)[: x.shape[0]]


def batch_product(x: Tensor, y: Tensor) -> Tensor:
    """x [batch, rows, inner], y [batch, inner, out] -> x y [batch, rows, out], row-invariant if
    rows are whole tiles.
    """
    if x.dtype == torch.bfloat16 or x.device.type != "cpu":
        return torch.bmm(x, y)
    parts = zip(x.split(SHORT_SUM, dim=2), y.split(SHORT_SUM, dim=1), strict=True)
    return functools.reduce(torch.add, itertools.starmap(torch.bmm, parts))


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in], weight [out, in], bias [out] or None -> x W' + bias [rows, out]."""
    y = linear_rows(x, weight)
    return y if bias is None else y + bias


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in] -> integers of -127 to 127, fp64 [rows, in / INT8_BLOCK, INT8_BLOCK], and the
    scale of each block, fp32 [rows, in / INT8_BLOCK].
    """
    blocks = x.float().view(len(x), -1, INT8_BLOCK)
    largest = blocks.abs().amax(-1)
    # not 127 / largest, which torch computes by the reciprocal
    inverse = torch.where(largest > LEAST_MAXIMUM, torch.full_like(largest, 127) / largest, 0)
    return (blocks * inverse[..., None]).round().double(), largest / 127


def int8_product(x: Tensor, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """x [rows, in], weight [out, in], bias [out] or None -> fp32 x W' + bias [rows, out], with x
    rounded to 8 bits; the sums of blocks are added in their order.
    """
    values, block_scales = int8_rows(x)
    codes = weight.codes.double().unflatten(-1, (-1, INT8_BLOCK))
    sums = torch.einsum("rbi,obi->bro", values, codes)
    totals = values.sum(-1)
    each = codes.shape[1] // weight.scales.shape[1]
    y = x.new_zeros(len(x), len(weight.codes), dtype=torch.float32)
    for block, products in enumerate(sums):
        group = block // each
        centered = products - totals[:, block, None] * weight.zeros[:, group].double()
        y += centered.float() * (weight.scales[:, group].float() * block_scales[:, block, None])
    y /= weight.units
    return y if bias is None else y + bias.float()


def int4_product(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """x [rows, in], weight [out, in], bias [out] or None -> x W' + bias [rows, out] in x's type.

    Dequantizes the whole weight for each product.
    """
    return dense_product(x, weight.dequantized().to(x.dtype), bias)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """y [rows, out] += b (a x), in place; x [rows, in], a [rank, in], b [rank, out]."""
    y += linear_rows(linear_rows(x, a), b.T)


def attend(query: Tensor, kv: PagedKV, options: AttentionOptions) -> Tensor:
    """query [batch, heads, n, dk], strides free; kv as in PagedKV -> [batch, heads, n, dv] in the
    query's type.

    Causal attention over paged keys and values, one partition of keys after another.
    """
    batch, heads, n, dk = query.shape
    kv_heads, _, block_tokens, dv = kv.values.shape
    group, window = heads // kv_heads, options.window
    rows = padded_rows(group * n)
    per_partition = PARTITION // block_tokens
    q = query.reshape(batch, kv_heads, group * n, dk).transpose(0, 1)
    q = F.pad(q, (0, 0, 0, rows - group * n)).reshape(kv_heads * batch, rows, dk)
    row_positions = F.pad(kv.positions.repeat(1, group), (0, rows - group * n))[:, :, None]

    peak = query.new_full((kv_heads, batch, rows, 1), MASKED, dtype=torch.float32)
    total = torch.zeros_like(peak)
    weighted = peak.new_zeros(kv_heads, batch, rows, dv)
    last = int(kv.positions.max())
    first = 0 if window is None else max(0, int(kv.positions.min()) - window + 1)
    tables = F.pad(kv.tables, (0, -kv.tables.shape[1] % per_partition))
    for start in range(first // PARTITION * PARTITION, last + 1, PARTITION):
        blocks = tables[:, start // block_tokens :][:, :per_partition].reshape(-1)
        k = kv.keys.index_select(1, blocks).view(kv_heads * batch, PARTITION, dk)
        v = kv.values.index_select(1, blocks).view(kv_heads * batch, PARTITION, dv)
        scores = batch_product(q, k.transpose(1, 2)).view(kv_heads, batch, rows, PARTITION)
        scores = scores.float() * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        key_positions = torch.arange(start, start + PARTITION, device=query.device)
        visible = key_positions <= row_positions
        if window is not None:
            visible &= key_positions > row_positions - window
        scores = scores.masked_fill_(~visible, -torch.inf)
        peak, total, weighted = _merge(peak, total, weighted, scores, v)
    if options.sinks is not None:
        sink = options.sinks.float().view(kv_heads, 1, group, 1, 1).expand(-1, batch, -1, n, -1)
        sink = F.pad(sink.reshape(kv_heads, batch, group * n, 1), (0, 0, 0, rows - group * n))
        total = total + torch.exp(sink - peak)
    out = (weighted / total)[:, :, : group * n].to(query.dtype)
    return out.transpose(0, 1).reshape(batch, heads, n, dv)


def _merge(
    peak: Tensor, total: Tensor, weighted: Tensor, scores: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """peak, total [kv_heads, batch, rows, 1] and weighted [kv_heads, batch, rows, dv] of the
    partitions so far; scores [kv_heads, batch, rows, PARTITION] and values [kv_heads * batch,
    PARTITION, dv] of the next one -> peak, total and weighted of all.

    A partition that is masked for a row does not change the bits of the row's state.
    """
    new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores - new_peak)
    fade = torch.exp(peak - new_peak)
    kv_heads, batch, rows, partition = scores.shape
    part = batch_product(weights.view(-1, rows, partition).to(values.dtype), values)
    total = total * fade + weights.sum(-1, keepdim=True)
    return new_peak, total, weighted * fade + part.view(kv_heads, batch, rows, -1).float()

"""Reference kernels in torch: slow and correct on every device; fast kernels are tested against
them.

They are row-invariant: the bits of row i of a result depend on row i of the inputs alone, not on
the content or the number of other rows. BLAS sums the rows that remain after tiles of ROW_TILE in
another order, so fp32 products are padded to whole tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_TILE = 4
"""Rows of a tile. fp32 products of whole tiles give each row the same bits, on any number of
threads; bf16 products of any number of rows do. Measured on 1 to 8 threads, see
server/DECISIONS.md."""

CUDA_ROWS = 16
"""Smallest number of rows of a step on a CUDA device: torch sums up to 16 rows with a block of 512
threads, and fewer rows in another order. Source: setReduceConfig in torch's
ATen/native/cuda/Reduce.cuh.
"""

PARTITION = 256
"""Keys of one partition of attention. All products of partitions have the same inner size."""

MASKED = -1e30
"""Running maximum before the first key; finite, so that differences are never NaN."""


def least_rows(device: torch.device) -> int:
    """Returns the smallest number of rows of a step that keeps a row's bits independent of it."""
    return CUDA_ROWS if device.type == "cuda" else 1


def padded_rows(rows: int, least: int = 1) -> int:
    """Returns the smallest positive multiple of ROW_TILE that is at least `rows` and `least`."""
    return max(1, -(-max(rows, least) // ROW_TILE)) * ROW_TILE


def whole_tiles(x: Tensor) -> Tensor:
    """x [rows, features] -> x with zero rows added up to whole tiles of ROW_TILE rows."""
    missing = padded_rows(x.shape[0]) - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in], weight [out, in] -> x @ weight.T [rows, out], row-invariant."""
    if x.dtype == torch.bfloat16:
        return F.linear(x, weight)
    return F.linear(whole_tiles(x), weight)[: x.shape[0]]


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> None:
    """y [rows, out], x [rows, in], a [rank, in], b [rank, out]. y += b (a x) in place."""
    y += linear_rows(linear_rows(x, a), b.T)


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
    """query [batch, heads, n, dk] of any strides: n consecutive tokens of each of `batch`
    sequences; keys [kv_heads, blocks, block_tokens, dk], values [kv_heads, blocks, block_tokens,
    dv]; tables [batch, table] int64, padded with any valid block; positions [batch, n] int64; sinks
    [heads]: extra logits in the softmax without a value -> [batch, heads, n, dv] in the query's
    dtype.

    Causal attention over paged keys and values, one partition of keys after another. `window` is
    the number of visible keys, including the token's own.
    """
    batch, heads, n, dk = query.shape
    kv_heads, _, block_tokens, dv = values.shape
    group = heads // kv_heads
    rows = padded_rows(group * n)
    per_partition = PARTITION // block_tokens
    q = query.reshape(batch, kv_heads, group * n, dk).transpose(0, 1)
    q = F.pad(q, (0, 0, 0, rows - group * n)).reshape(kv_heads * batch, rows, dk)
    row_positions = F.pad(positions.repeat(1, group), (0, rows - group * n))[:, :, None]

    peak = query.new_full((kv_heads, batch, rows, 1), MASKED, dtype=torch.float32)
    total = torch.zeros_like(peak)
    weighted = peak.new_zeros(kv_heads, batch, rows, dv)
    last = int(positions.max())
    first = 0 if window is None else max(0, int(positions.min()) - window + 1)
    tables = F.pad(tables, (0, -tables.shape[1] % per_partition))
    for start in range(first // PARTITION * PARTITION, last + 1, PARTITION):
        blocks = tables[:, start // block_tokens :][:, :per_partition].reshape(-1)
        k = keys.index_select(1, blocks).view(kv_heads * batch, PARTITION, dk)
        v = values.index_select(1, blocks).view(kv_heads * batch, PARTITION, dv)
        scores = torch.bmm(q, k.transpose(1, 2)).view(kv_heads, batch, rows, PARTITION)
        scores = scores.float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        key_positions = torch.arange(start, start + PARTITION, device=query.device)
        visible = key_positions <= row_positions
        if window is not None:
            visible &= key_positions > row_positions - window
        scores = scores.masked_fill_(~visible, -torch.inf)
        peak, total, weighted = _merge(peak, total, weighted, scores, v)
    if sinks is not None:
        sink = sinks.float().view(kv_heads, 1, group, 1, 1).expand(-1, batch, -1, n, -1)
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
    part = torch.bmm(weights.view(-1, rows, partition).to(values.dtype), values)
    total = total * fade + weights.sum(-1, keepdim=True)
    return new_peak, total, weighted * fade + part.view(kv_heads, batch, rows, -1).float()
